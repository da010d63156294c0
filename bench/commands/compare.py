"""``bench compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show
from bench.commands.flags import AsJson


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Show what differs between two runs: settings, machine, and every figure with its interval."""
    from bench.gate.compare import compare as compare_runs
    from bench.run.archive import load_run
    from reports.terminal import render_difference

    difference = compare_runs(load_run(first), load_run(second))
    show(difference, as_json, lambda: render_difference(difference))
