"""``bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_files
from bench.commands.flags import AsJson, EmbedFaces, EveryAttempt, Images, Runs
from bench.errors import UsageError


def report(
    runs: Runs,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    images: Images = True,
    embed_faces: EmbedFaces = False,
    every: EveryAttempt = False,
    benchmarks: Annotated[
        list[Path] | None, typer.Option("--benchmark", help="A file that pytest --benchmark-json wrote; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what runs found as one HTML page without network, Markdown, LaTeX and CSV."""
    from reports.report import write_report

    if embed_faces and not images:
        raise UsageError("--embed-faces and --no-images contradict each other: give one of them")
    written = write_report(
        runs, out_dir, images=images, embed_faces=embed_faces, every=every, benchmarks=benchmarks or []
    )
    show_files(written.files, as_json, verdicts=written.verdicts)
