"""A report as Markdown, LaTeX and CSV, in which nothing of a run can act as markup, command or formula."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.measures import KINDS, MISSING
from bench.results import Measure, measures
from reports.cells import Cell, Setting, recognition, worst_case, worst_floor
from reports.provenance import provenance, warnings
from reports.summary import (
    LEAKS,
    across_table,
    expression_table,
    failures,
    identification_table,
    protocol_table,
    ranking,
    recovery_table,
    subject,
    summary,
    template_table,
    worst_rows,
)
from reports.table import Column, Entry, Row, Table
from reports.verdict import verdicts

# -- Markdown ---------------------------------------------------------------------------------------

#: What Markdown reads as markup anywhere in a line; a backslash before it keeps it literal.
_MARKUP = re.compile(r"([\\`*_{}\[\]#~$!])")
#: What HTML, or a table before Markdown is read, would take; and addresses that some dialects make links of.
_REFERENCES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "://": "&#58;//", "www.": "www&#46;"}
_REFERRED = re.compile("|".join(map(re.escape, _REFERENCES)), re.IGNORECASE)


def markdown_text(text: str) -> str:
    """``text`` on one line, every character of it literal.

    Example:
        >>> markdown_text("a|b <i> x_1")
        'a&#124;b &lt;i&gt; x\\\\_1'
    """
    literal = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    return _REFERRED.sub(lambda match: _REFERENCES[match[0].lower()], literal)


def report_markdown(settings: Sequence[Setting], speed: Table | None = None, left_out: str = "") -> str:
    """The report without its figures."""
    parts = ["# What leaks, and what it costs"]
    for number, setting in enumerate(settings, start=1):
        makers = (
            summary,
            protocol_table,
            identification_table,
            expression_table,
            template_table,
            across_table,
            recovery_table,
        )
        tables = [table(setting, number) for table in makers]
        parts += [*_verdict(setting, number), *(_pipe_table(table) for table in tables if table is not None)]
    if notes := _notes(settings, left_out):
        parts += ["## Before you quote a figure", notes]
    if speed is not None:
        parts += ["## Speed", _pipe_table(speed)]
    parts += ["## Provenance", _pipe_table(provenance(settings))]
    return "\n\n".join(parts) + "\n"


def leaderboard_markdown(
    title: str, lead: str, settings: Sequence[Setting], left_out: str, boards: Sequence[Table]
) -> str:
    """The leaderboard, and below it what to know before quoting a figure."""
    parts = [f"# {title}", markdown_text(lead)]
    for number, (setting, table) in enumerate(zip(settings, boards, strict=True), start=1):
        parts += [*_verdict(setting, number), _pipe_table(table)]
    return "\n\n".join([*parts, _notes(settings, left_out)]).rstrip() + "\n"


def _verdict(setting: Setting, number: int) -> list[str]:
    """The heading of a setting, and of each rung the verdict and the ranking behind it."""
    parts = [f"## {markdown_text(subject(setting))}"]
    for verdict in verdicts(setting):
        parts += [f"**{markdown_text(verdict.sentence)}**", _pipe_table(ranking(setting, verdict, number))]
    return parts


def _notes(settings: Sequence[Setting], left_out: str) -> str:
    """What to know before quoting a figure, a line each."""
    lines = [markdown_text(left_out)] if left_out else []
    lines += [f"**failed:** {markdown_text(f'{label}: {reason}')}" for label, reason in failures(settings)]
    for warning, labels in warnings(settings).items():
        lines.append(f"{markdown_text(warning)} ({markdown_text('; '.join(labels))})")
    return "\n".join(f"- {line}" for line in lines)


def _pipe_table(table: Table) -> str:
    """A table under its caption; notes and intervals stand beside the values."""
    rows = [[markdown_text(column.heading) for column in table.columns]]
    rows += [[_markdown_entry(row[column]) for column in table.columns] for row in (*table.rows, *table.foot)]
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    return "\n".join([f"*{markdown_text(table.caption)}*", "", head, rule, *body])


def _markdown_entry(entry: Entry) -> str:
    value = markdown_text(entry.text)
    value = f"**{value}**" if entry.best else value
    note = f"({markdown_text(entry.note)})" if entry.note else ""
    return " ".join(filter(None, (value, entry.interval, note)))  # the interval is digits between brackets


# -- LaTeX -----------------------------------------------------------------------------------------

# fmt: off
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    "[": "{[}", "]": "{]}", "-": "{-}", MISSING: "--", "…": r"\ldots{}", "×": r"$\times$", "ε": r"$\epsilon$",
}
# fmt: on
_SPECIAL = re.compile("|".join(map(re.escape, _ESCAPES)))
#: Letters from here on are not in the T1 encoding, so that TeX stops at them.
_LATIN = 0x180
#: Numbers keep their minus sign.
_NEGATIVE = re.compile(r"-[\d,]+(\.\d+)?")
_PREAMBLE = "% Needs \\usepackage{array,booktabs,graphicx} and \\usepackage[T1]{fontenc} with \\usepackage{textcomp}."
#: A column of text is wrapped at this width.
_TEXT = r">{\raggedright\arraybackslash}p{9em}"
#: Shrinks what is wider than the page, and nothing else.
_FITTED = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{"
#: Columns of a page's width, after those that name the row.
_WIDTH = 8


def latex_text(text: str) -> str:
    r"""``text`` as LaTeX shows it, on one line.

    Example:
        >>> latex_text("50% of $x_1$")
        '50\\% of \\$x\\_1\\$'
    """
    shown = _SPECIAL.sub(lambda match: _ESCAPES[match[0]], " ".join(text.split()))
    return "".join(char if char.isprintable() and ord(char) < _LATIN else "?" for char in shown)


def report_latex(settings: Sequence[Setting], speed: Table | None = None) -> str:
    """The verdicts, summaries, protocols and template defences of all settings, each as tables that fit a page."""
    parts = [_PREAMBLE]
    for number, setting in enumerate(settings, start=1):
        parts += [f"% {latex_text(subject(setting))}"]
        tables: list[Table | None] = []
        for verdict in verdicts(setting):
            parts += [latex_text(verdict.sentence)]
            tables += [ranking(setting, verdict, number)]
        tables += [
            table(setting, number)
            for table in (summary, protocol_table, identification_table, expression_table, template_table, across_table)
        ]
        parts += [part for table in tables if table is not None for part in _latex_tables(table)]
    parts += [] if speed is None else _latex_tables(speed)
    return "\n\n".join(parts) + "\n"


def table_latex(tables: Iterable[Table]) -> str:
    """Tables alone, to be put into a paper."""
    return "\n\n".join([_PREAMBLE, *(part for table in tables for part in _latex_tables(table))]) + "\n"


def table_csv(tables: Iterable[Table]) -> str:
    """Tables one below the other, a line for each row: of each column what is shown, and the ends of its interval."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for table in tables:
        writer.writerow([name for column in table.columns for name in _csv_headings(column)])
        for row in (*table.rows, *table.foot):
            writer.writerow([cell for column in table.columns for cell in _csv_entry(row[column], column)])
    return buffer.getvalue()


def _csv_headings(column: Column) -> list[str]:
    return [column.heading, f"{column.heading} low", f"{column.heading} high"] if column.numeric else [column.heading]


def _csv_entry(entry: Entry, column: Column) -> list[str | float]:
    if not column.numeric:
        return [csv_text(f"{entry.text} ({entry.note})" if entry.note else entry.text)]
    low, _, high = entry.interval.strip("[]").partition(", ")
    return ["" if entry.number is None else float(f"{entry.number:.10g}"), low, high]


def _latex_tables(table: Table) -> Iterator[str]:
    """A wide table in several, each with the columns that name the row."""
    names, others = table.columns[: table.headers], table.columns[table.headers :]
    for start in range(0, len(others), _WIDTH):
        columns = names + others[start : start + _WIDTH]
        shape = "".join("r" if column.numeric else _TEXT for column in columns)
        lines = [r"\begin{table*}", r"\centering\small", rf"\caption{{{latex_text(table.caption)}}}"]
        lines += [rf"{_FITTED}\begin{{tabular}}{{@{{}}{shape}@{{}}}}", r"\toprule"]
        lines += [_latex_line(latex_text(column.heading) for column in columns)]
        for rows in filter(None, (table.rows, table.foot)):
            lines += [r"\midrule", *(_latex_row(row, columns) for row in rows)]
        yield "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"])


def _latex_row(row: Row, columns: Iterable[Column]) -> str:
    return _latex_line(_latex_entry(row[column]) for column in columns)


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_entry(entry: Entry) -> str:
    if entry.number is None:
        return latex_text(f"{entry.text} ({entry.note})" if entry.note else entry.text)
    value = f"${entry.text}$" if _NEGATIVE.fullmatch(entry.text) else latex_text(entry.text)
    value = rf"\textbf{{{value}}}" if entry.best else value
    if not entry.interval:
        return value
    below = rf"\scriptsize {latex_text(entry.interval)}"
    return rf"\begin{{tabular}}[t]{{@{{}}r@{{}}}}{value} \\ {below}\end{{tabular}}"


# -- CSV -------------------------------------------------------------------------------------------

#: A cell that starts with one of these is a formula to spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_text(value: Any) -> str:
    """``value`` as a cell of text: one that looks like a formula gets an apostrophe before it.

    Example:
        >>> csv_text("=1+1"), csv_text("unet")
        ("'=1+1", 'unet')
    """
    shown = "" if value is None else str(value).replace("\x00", "")
    return f"'{shown}" if shown.lstrip(" ").startswith(_FORMULA) else shown


def _csv(headings: str, rows: Iterable[Sequence[Any]]) -> str:
    """Numbers as they are, everything else as text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings.split())
    writer.writerows([cell if isinstance(cell, int | float) else csv_text(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def report_csv(settings: Sequence[Setting]) -> str:
    """One line for each measure of each attack, floors and ceilings included; rates are shares of 1.

    A failed run has one line, with its reason.
    """
    headings = (
        "run_id protocol dataset image_size defense attack knowledge seed status figure value low high n reason verdict"
    )
    return _csv(headings, (line for setting in settings for cell in setting.cells for line in _lines(cell)))


def _lines(cell: Cell) -> Iterator[Sequence[Any]]:
    manifest, result = cell.run.manifest, cell.run.result
    head = [manifest.run_id, manifest.protocol, manifest.config.get("dataset"), manifest.config.get("image_size")]
    status = "error" if cell.name in result.failed else result.status
    head += [cell.defense, cell.attack, cell.knowledge, cell.seed, status]
    for figure, measure in _figures(cell):
        yield [*head, figure, measure.value, *(measure.ci95 or ("", "")), measure.n, measure.reason, cell.verdict]
    if cell.result is None:
        yield [*head, "", "", "", "", "", result.failed.get(cell.name, result.error), cell.verdict]


def _figures(cell: Cell) -> Iterator[tuple[str, Measure]]:
    """(place, measure) of everything measured, with bytes and rates as measures without an interval."""
    result = cell.run.result
    parts: dict[str, object] = {"utility": result.utility, "template": result.template}
    parts |= {name: value for name, value in cell.result or () if name != "attack"}
    yield from measures(parts)
    if result.defense is not None:
        yield "bytes_per_face", Measure(value=result.defense.bytes_per_face, direction=KINDS["bytes"].direction)
    for operation, timed in (result.throughput or {}).items():
        rate, direction = timed.images_per_second, KINDS["protect"].direction
        measure = Measure(value=rate.median, direction=direction, reason=f"quartiles {rate.q1:g} to {rate.q3:g}")
        yield f"throughput.{operation}.images_per_second", measure


def leaderboard_csv(settings: Sequence[Setting]) -> str:
    """One line for each defence, rung and figure; rates are shares of 1."""
    headings = "setting protocol synthetic defense knowledge figure value low high n seeds strongest floor note"
    headings += " ranked_by verdict"
    return _csv(headings, (line for setting in settings for line in _worst_lines(setting)))


def _worst_lines(setting: Setting) -> Iterator[Sequence[Any]]:
    rows = worst_rows(setting)
    told = {(one.defense, v.knowledge): (v.name, one.told) for v in verdicts(setting) for one in v.standings}
    for place, cells in setting.rungs.items():
        head = [setting.title, setting.protocol, setting.synthetic, *place]
        note = rows[place].entries["attack"].note if place in rows else ""
        recognised = recognition(cells)
        figures: list[tuple[str, Measure, str, Measure | None]] = []
        figures += [] if recognised is None else [("accuracy", recognised.protected, "", None)]
        for name in LEAKS:
            if (case := worst_case(cells, name)) is not None:
                figures.append((name, case.measure, case.strongest.label, worst_floor(cells, name)))
        seeds = len({cell.seed for cell in cells if cell.result is not None})
        for name, measure, strongest, floor in figures:
            got = [measure.value, *(measure.ci95 or ("", "")), measure.n, seeds]
            yield [*head, name, *got, strongest, floor.value if floor else "", note, *told[place]]
        if not figures:
            yield [*head, "failed", "", "", "", "", "", "", "", "", *told[place]]
