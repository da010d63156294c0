"""``bench report`` and ``bench leaderboard``: documents from run directories."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.files import write_text
from bench.run.archive import load_runs
from reports.benchmarks import benchmark_table
from reports.cells import Setting, lowest_accuracy, settings, worst_case
from reports.formats import (
    csv_text,
    markdown_notes,
    markdown_text,
    report_csv,
    report_latex,
    report_markdown,
    table_markdown,
)
from reports.html import page, report_page
from reports.provenance import provenance, warnings
from reports.summary import COLUMNS, LEAKS, failures, subject, worst_rows
from reports.table import Table


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    images: bool = True,
    embed_faces: bool = False,
    benchmarks: Sequence[Path] = (),
) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.tex`` and ``measures.csv``.

    Args:
        runs: run directories, or folders that hold some.
        out: folder to write to; made if it is not there.
        images: whether the page shows faces.
        embed_faces: whether real ones, too; synthetic ones need no leave.
        benchmarks: files that pytest-benchmark wrote.

    Returns:
        The files.

    Raises:
        MissingError: a folder is no run directory, or a file of one cannot be read.
    """
    grouped, speed = settings(load_runs(runs)), benchmark_table(benchmarks)
    return write_files(
        out,
        {
            "report.html": report_page(grouped, images=images, embed_faces=embed_faces, speed=speed),
            "report.md": report_markdown(grouped, speed),
            "report.tex": report_latex(grouped, speed),
            "measures.csv": report_csv(grouped),
        },
    )


def write_files(out: Path, documents: Mapping[str, str]) -> list[Path]:
    """Write each document into ``out``; nothing is written unless all of them could be made."""
    for name, document in documents.items():
        write_text(out / name, document)
    return [out / name for name in documents]


# -- leaderboard -----------------------------------------------------------------------------------

_TITLE = "Leaderboard of defences"
_LEAD = (
    "One row for each defence, at its worst case over all attacks; below each figure the attack that leaks most. "
    "Only runs of one protocol version, dataset, image size and judge stand in one table."
)


def write_leaderboard(directory: Path, out: Path) -> list[Path]:
    """Write ``leaderboard.html``, ``leaderboard.md`` and ``leaderboard.csv``.

    Args:
        directory: a run directory or a folder that holds some.
        out: folder to write to; made if it is not there.

    Returns:
        The files.

    Raises:
        MissingError: it holds no run, or a file of one cannot be read.
    """
    grouped = settings(load_runs([directory]))
    boards = [board(setting, number) for number, setting in enumerate(grouped, start=1)]
    document = page(
        "leaderboard.html.j2",
        title=_TITLE,
        lead=_LEAD,
        boards=list(zip(grouped, boards, strict=True)),
        warnings=warnings(grouped),
        failures=failures(grouped),
        runs=sum(len(setting.runs) for setting in grouped),
        provenance=provenance(grouped),
    )
    return write_files(
        out,
        {
            "leaderboard.html": document,
            "leaderboard.md": _markdown(grouped, boards),
            "leaderboard.csv": _csv(grouped),
        },
    )


def board(setting: Setting, number: int) -> Table:
    """One row for each defence of a setting; one of which nothing was measured says so."""
    rows = worst_rows(setting)
    # The attack and its knowledge are said below each figure; how fast it is belongs to no defence.
    places = [place for place, column in enumerate(COLUMNS[:-1]) if column.heading != "knowledge"]
    cut = tuple(
        replace(row, entries=tuple(row.entries[place] for place in places), keys={"defence": defense})
        for defense, row in rows.items()
    )
    columns = tuple(COLUMNS[place] for place in places)
    table = Table(f"board-{number}", f"Defences at their worst case: {subject(setting)}.", columns, cut, headers=1)
    return table.without_empty_columns()


def _markdown(grouped: Sequence[Setting], boards: Sequence[Table]) -> str:
    parts = [f"# {_TITLE}", markdown_text(_LEAD)]
    for setting, table in zip(grouped, boards, strict=True):
        parts += [f"## {markdown_text(subject(setting))}", table_markdown(table)]
    return "\n\n".join([*parts, "\n".join(markdown_notes(grouped))]).rstrip() + "\n"


def _csv(grouped: Sequence[Setting]) -> str:
    """One line for each defence and figure; rates are shares of 1."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("setting", "protocol", "synthetic", "defense", "figure", "value", "low", "high", "n", "strongest"))
    for setting in grouped:
        for defense, cells in setting.defenses.items():
            head = [csv_text(setting.title), csv_text(setting.protocol), setting.synthetic, csv_text(defense)]
            utility = lowest_accuracy(cells)
            figures = [] if utility is None else [("accuracy", utility, "")]
            figures += [
                (name, worst.measure, worst.strongest.label) for name in LEAKS if (worst := worst_case(cells, name))
            ]
            for name, measure, strongest in figures:
                low, high = measure.ci95 or ("", "")
                writer.writerow([*head, name, measure.value, low, high, measure.n, csv_text(strongest)])
            if not figures:
                writer.writerow([*head, "failed", "", "", "", "", ""])
    return buffer.getvalue()
