"""``bench score``: what an attack of one's own recovered from ``bench observe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show
from bench.commands.flags import AsJson


def score(
    recovered: Annotated[
        Path, typer.Option(metavar="PATH", help="Recovered faces: an .npz file, or a folder of numbered pictures.")
    ],
    run: Annotated[Path, typer.Option(metavar="RUN", help="The run directory whose victims they are.")],
    name: Annotated[str | None, typer.Option(help="What to call the submission; that of PATH if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score faces that an attack of one's own recovered, and keep that as a run beside the run."""
    from bench.run.submission import score as score_submission
    from reports.terminal import render_result

    result, directory = score_submission(recovered, run, name)
    show(result.to_json(), as_json, lambda: render_result(result, directory))
