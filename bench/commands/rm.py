"""``bench rm``: delete runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_files
from bench.commands.flags import AsJson
from bench.errors import MissingError, UsageError


def rm(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete run directories, and nothing else; finished stages stay in the cache."""
    for run in runs:
        if not (run / "manifest.json").is_file():
            raise MissingError(f"{run} is not a run directory: it has no manifest.json")
    try:
        agreed = yes or typer.confirm(f"delete {', '.join(map(str, runs))}?", err=True)
    except typer.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        raise UsageError("nothing was deleted, as nobody answered: --yes deletes without asking") from None
    if not agreed:
        raise typer.Exit
    for run in runs:
        shutil.rmtree(run)
    show_files(runs, as_json)
