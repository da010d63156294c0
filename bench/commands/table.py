"""``bench table``: a table of a paper, filled from runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.commands import console
from bench.commands.flags import AsJson
from bench.errors import UsageError
from bench.files import write_text


class Format(StrEnum):
    """How a table is written."""

    TEXT = "text"
    CSV = "csv"
    LATEX = "latex"
    HTML = "html"


def table(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A table of --list.")] = None,
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories, or folders of them.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the tables.")] = False,
    form: Annotated[Format, typer.Option("--format", help="How the table is written.")] = Format.TEXT,
    out: Annotated[Path | None, typer.Option("--out", help="File to write to; the terminal if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fill a table of a paper from runs: what it printed beside what was measured, with the difference."""
    from reports.published import paper_tables

    known = paper_tables()
    if listed:
        rows = [
            {"table": paper.id, "of": paper.title, "rows": len(paper.rows), "paper": paper.source.citation}
            for paper in known.values()
        ]
        console.show(rows, as_json, lambda: console.table((row.values() for row in rows), *rows[0]))
        return
    if name is None:
        raise UsageError("which table? bench table NAME RUN...; bench table --list names them")
    from bench.registry import pick
    from bench.run.archive import load_runs
    from reports.cells import attempts, settings
    from reports.formats import table_csv, table_latex
    from reports.papers import filled
    from reports.report import render_page
    from reports.terminal import render_table

    paper = pick("table", name, known)
    tables = filled(paper, settings(attempts(load_runs(runs)).kept) if runs else [])
    written = {
        Format.CSV: lambda: table_csv(tables),
        Format.LATEX: lambda: table_latex(tables),
        Format.HTML: lambda: render_page("table.html.j2", title=paper.id, lead=paper.source.citation, tables=tables),
    }
    if out is not None:
        if form is Format.TEXT:
            raise UsageError("--out needs --format csv, latex or html")
        write_text(out, written[form]())
        console.show_files([out], as_json)
        return
    document = [{"caption": one.caption, "rows": one.as_records()} for one in tables]
    if form is Format.TEXT or as_json:
        console.show(document, as_json, lambda: render_table(tables))
    else:
        console.out.file.write(written[form]())
