"""``bench leaderboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_files
from bench.commands.flags import AsJson


def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of run directories.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write to; DIR if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show each defence at its worst case over all attacks; only comparable runs stand in one table."""
    from reports.report import write_leaderboard

    show_files(write_leaderboard(directory, out_dir or directory), as_json)
