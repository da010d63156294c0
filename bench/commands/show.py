"""``bench show``: a finished run once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands import console
from bench.commands.flags import AsJson


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: AsJson = False,
) -> None:
    """Print what a run found, as `bench run` did."""
    from bench.run.archive import load_run
    from reports.terminal import render_result

    result = load_run(run).result
    console.show(result.to_json(), as_json, lambda: render_result(result, run))
