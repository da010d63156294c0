"""A report as Markdown, LaTeX and CSV, in which nothing of a run can act as markup, command or formula."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.measures import KINDS, MISSING
from bench.results import Measure, measures
from reports.cells import Cell, Setting
from reports.provenance import provenance, warnings
from reports.summary import failures, findings, recovery_table, subject, summary
from reports.table import Entry, Row, Table

# -- Markdown ---------------------------------------------------------------------------------------

#: What Markdown reads as markup anywhere in a line; a backslash before it keeps it literal.
_MARKUP = re.compile(r"([\\`*_{}\[\]#~$!])")
#: What HTML, or a table before Markdown is read, would take; and addresses that some dialects make links of.
_REFERENCES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "://": "&#58;//", "www.": "www&#46;"}
_REFERRED = re.compile("|".join(re.escape(taken) for taken in _REFERENCES), re.IGNORECASE)


def markdown_text(text: str) -> str:
    """``text`` on one line, every character of it literal.

    Example:
        >>> markdown_text("a|b <i> x_1")
        'a&#124;b &lt;i&gt; x\\\\_1'
    """
    literal = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return _REFERRED.sub(lambda match: _REFERENCES[match[0].lower()], literal)


def report_markdown(settings: Sequence[Setting], speed: Table | None = None) -> str:
    """The report without its figures."""
    parts = ["# What leaks, and what it costs"]
    if notes := markdown_notes(settings):
        parts += ["## Before you quote a figure", "\n".join(notes)]
    for number, setting in enumerate(settings, start=1):
        parts += [
            f"## {markdown_text(subject(setting))}",
            "\n".join(f"- {markdown_text(str(finding))}" for finding in findings(setting)),
        ]
        tables = (summary(setting, number), recovery_table(setting, number))
        parts += [table_markdown(table) for table in tables if table is not None]
    if speed is not None:
        parts += ["## Speed", table_markdown(speed)]
    parts += ["## Provenance", table_markdown(provenance(settings))]
    return "\n\n".join(parts) + "\n"


def markdown_notes(settings: Sequence[Setting]) -> list[str]:
    """What to know before quoting a figure, a line each."""
    failed = [f"- **failed:** {markdown_text(f'{label}: {reason}')}" for label, reason in failures(settings)]
    warned = warnings(settings).items()
    return failed + [f"- {markdown_text(text)} ({markdown_text('; '.join(labels))})" for text, labels in warned]


def table_markdown(table: Table) -> str:
    """A pipe table under its caption; notes and intervals stand beside the values."""
    head = "| " + " | ".join(markdown_text(column.heading) for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    rows = [_markdown_row(row) for row in (*table.rows, *table.foot)]
    return "\n".join([f"*{markdown_text(table.caption)}*", "", head, rule, *rows])


def _markdown_row(row: Row) -> str:
    return "| " + " | ".join(_markdown_entry(entry) for entry in row.entries) + " |"


def _markdown_entry(entry: Entry) -> str:
    value = markdown_text(entry.text)
    parts = [f"**{value}**" if entry.best else value]
    if entry.interval:
        parts.append(entry.interval)  # digits between brackets
    if entry.note:
        parts.append(f"({markdown_text(entry.note)})")
    return " ".join(parts)


# -- LaTeX -----------------------------------------------------------------------------------------

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


def latex_text(text: str) -> str:
    r"""``text`` as LaTeX shows it, on one line.

    Example:
        >>> latex_text("50% of $x_1$")
        '50\\% of \\$x\\_1\\$'
    """
    return _SPECIAL.sub(lambda match: _ESCAPES[match[0]], " ".join(text.split()))


def report_latex(settings: Sequence[Setting], speed: Table | None = None) -> str:
    """The summaries of all settings, each as tables that fit a page."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc} with \\usepackage{textcomp}."]
    for number, setting in enumerate(settings, start=1):
        parts.append(f"% {latex_text(subject(setting))}")
        parts += _latex_tables(summary(setting, number))
    parts += [] if speed is None else _latex_tables(speed)
    return "\n\n".join(parts) + "\n"


def _latex_tables(table: Table) -> Iterable[str]:
    """A wide table in several, each with the columns that name the row."""
    names = list(range(table.headers))
    for start in range(table.headers, len(table.columns), _WIDTH):
        yield _latex_table(table, [*names, *range(start, min(start + _WIDTH, len(table.columns)))])


def _latex_table(table: Table, places: Sequence[int]) -> str:
    columns = [table.columns[place] for place in places]
    shape = "".join("r" if column.numeric else "l" for column in columns)
    lines = [
        r"\begin{table*}",
        r"\centering\small",
        rf"\caption{{{latex_text(table.caption)}}}",
        rf"\begin{{tabular}}{{@{{}}{shape}@{{}}}}",
        r"\toprule",
        _line(latex_text(column.heading) for column in columns),
        r"\midrule",
        *(_latex_row(row, places) for row in table.rows),
    ]
    if table.foot:
        lines += [r"\midrule", *(_latex_row(row, places) for row in table.foot)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"])


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_row(row: Row, places: Sequence[int]) -> str:
    return _line(_latex_entry(row.entries[place]) for place in places)


def _latex_entry(entry: Entry) -> str:
    if entry.number is None:
        return latex_text(f"{entry.text} ({entry.note})" if entry.note else entry.text)
    value = (
        f"${entry.text}$" if entry.text.startswith("-") and _NUMBER.fullmatch(entry.text) else latex_text(entry.text)
    )
    if entry.best:
        value = rf"\textbf{{{value}}}"
    return rf"{value} {{\scriptsize {latex_text(entry.interval)}}}" if entry.interval else value


# -- CSV -------------------------------------------------------------------------------------------

#: A cell that starts with one of these is a formula to spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_HEADINGS = (
    "run_id", "protocol", "dataset", "image_size", "defense", "attack", "knowledge", "seed", "status",
    "figure", "value", "low", "high", "n", "reason",
)  # fmt: skip


def csv_text(value: Any) -> str:
    """``value`` as a cell of text: one that looks like a formula gets an apostrophe before it.

    Example:
        >>> csv_text("=1+1"), csv_text("unet")
        ("'=1+1", 'unet')
    """
    shown = "" if value is None else str(value).replace("\x00", "")
    return f"'{shown}" if shown.lstrip(" ").startswith(_FORMULA) else shown


def report_csv(settings: Sequence[Setting]) -> str:
    """One line for each measure of each attack, floors and ceilings included; rates are shares of 1.

    A failed run has one line, with its reason.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADINGS)
    for setting in settings:
        for cell in setting.cells:
            manifest, result = cell.run.manifest, cell.run.result
            config = manifest.config
            head = [manifest.run_id, setting.protocol, config.get("dataset"), config.get("image_size")]
            head += [cell.defense, cell.attack, cell.knowledge, cell.seed, result.status]
            names = [csv_text(value) for value in head]
            for figure, measure in _figures(cell):
                low, high = measure.ci95 or ("", "")
                value = "" if measure.value is None else measure.value
                writer.writerow([*names, csv_text(figure), value, low, high, measure.n, csv_text(measure.reason)])
            if cell.run.failed:
                writer.writerow([*names, "", "", "", "", "", csv_text(result.error)])
    return buffer.getvalue()


def _figures(cell: Cell) -> Iterable[tuple[str, Measure]]:
    """(place, measure) of everything measured, with bytes and rates as measures without an interval."""
    result = cell.run.result
    parts = {"utility": result.utility}
    parts |= {name: value for name, value in cell.result or () if name != "attack"}
    yield from measures(parts)
    if result.defense is not None:
        kind = KINDS["bytes"]
        yield "bytes_per_face", Measure(value=result.defense.bytes_per_face, direction=kind.direction)
    for operation, speed in (result.throughput or {}).items():
        rate = speed.images_per_second
        reason = f"quartiles {rate.q1:g} to {rate.q3:g}"
        yield (
            f"throughput.{operation}.images_per_second",
            Measure(value=rate.median, direction=KINDS["protect"].direction, reason=reason),
        )
