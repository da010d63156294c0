"""``bench report``: HTML, Markdown, CSV and LaTeX from run directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.files import write_text
from bench.run.archive import load_runs
from reports.benchmarks import benchmark_table
from reports.cells import settings
from reports.html import report_page
from reports.latex import report_latex
from reports.markdown import report_markdown
from reports.tables_csv import report_csv


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
