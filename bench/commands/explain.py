"""``bench explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show
from bench.commands.flags import AsJson


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    faces: Annotated[int, typer.Option(min=1, help="Victim images to look at, at most.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time for the frequencies of one attack.")] = 300.0,
    expression: Annotated[
        int, typer.Option(metavar="N", min=0, help="Rendered people whose expressions are told apart; 0 for none.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Find which frequencies the recogniser and the attacks of a run rely on, and keep that in its folder."""
    from bench.run.explain import explain as explain_run
    from reports.terminal import render_explanation

    explanation, file = explain_run(run, faces=faces, seconds=seconds, people=expression)
    show(explanation, as_json, lambda: render_explanation(explanation, file))
