"""Tables as LaTeX with booktabs; names from runs are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bench.measures import MISSING
from reports.cells import Setting
from reports.summary import subject, summary
from reports.table import Column, Entry, Row, Table

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "[": "{[}",
    "]": "{]}",
    "-": "{-}",
    MISSING: "--",
    "…": r"\ldots{}",
    "×": r"$\times$",
}
_SPECIAL = re.compile("|".join(re.escape(character) for character in _ESCAPES))
#: Numbers keep their minus sign and brackets.
_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?")
#: Columns of a page's width, after those that name the row.
_WIDTH = 8


def escape(text: str) -> str:
    r"""``text`` as LaTeX shows it, on one line.

    Example:
        >>> escape("50% of $x_1$")
        '50\\% of \\$x\\_1\\$'
    """
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], " ".join(text.split()))


def report_latex(settings: Sequence[Setting], speed: Table | None = None) -> str:
    """The summaries of all settings, each as tables that fit a page."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc} with \\usepackage{textcomp}."]
    for number, setting in enumerate(settings, start=1):
        parts.append(f"% {escape(subject(setting))}")
        parts += _tables(summary(setting, number))
    parts += [] if speed is None else _tables(speed)
    return "\n\n".join(parts) + "\n"


def _tables(table: Table) -> Iterable[str]:
    """A wide table in several, each with the columns that name the row."""
    names = list(range(table.headers))
    for start in range(table.headers, len(table.columns), _WIDTH):
        yield _table(table, [*names, *range(start, min(start + _WIDTH, len(table.columns)))])


def _table(table: Table, places: Sequence[int]) -> str:
    columns = [table.columns[place] for place in places]
    shape = "".join("r" if column.numeric else "l" for column in columns)
    lines = [
        r"\begin{table*}",
        r"\centering\small",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\begin{{tabular}}{{@{{}}{shape}@{{}}}}",
        r"\toprule",
        _line(_heading(column) for column in columns),
        r"\midrule",
        *(_row(row, places) for row in table.rows),
    ]
    if table.foot:
        lines += [r"\midrule", *(_row(row, places) for row in table.foot)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"])


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _heading(column: Column) -> str:
    return escape(column.heading)


def _row(row: Row, places: Sequence[int]) -> str:
    return _line(_entry(row.entries[place]) for place in places)


def _entry(entry: Entry) -> str:
    if entry.number is None:
        return escape(f"{entry.text} ({entry.note})" if entry.note else entry.text)
    value = f"${entry.text}$" if entry.text.startswith("-") and _NUMBER.fullmatch(entry.text) else escape(entry.text)
    if entry.best:
        value = rf"\textbf{{{value}}}"
    return rf"{value} {{\scriptsize {escape(entry.interval)}}}" if entry.interval else value
