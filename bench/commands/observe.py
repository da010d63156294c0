"""``bench observe``: what an attacker sees of a run's victims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_line
from bench.commands.flags import AsJson


def observe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out_file: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    templates: Annotated[
        bool, typer.Option("--templates", help="With stolen templates, also where no attack of the run steals them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what an attacker sees of a run's victims, for an attack of one's own that is run elsewhere."""
    from bench.run.observe import observe as write_observed

    written = write_observed(run, out_file, templates=templates)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in written.arrays.items() if shape)
    show_line(written, as_json, f"{out_file}: {shapes} ({written.knowledge}); observed {written.observed}")
