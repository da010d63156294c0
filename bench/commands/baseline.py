"""``bench baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show
from bench.commands.flags import AsJson, Runs
from bench.errors import UsageError


def baseline(
    runs: Runs,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="The baseline file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a baseline that is there; its tolerances are kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write down what runs measured, for `bench gate`; runs of one cell and several seeds say how much seeds differ."""
    from bench.gate.baseline import make_baseline, read_baseline, write_baseline
    from bench.run.archive import load_runs
    from reports.terminal import render_baseline

    if out_file.exists() and not overwrite:
        raise UsageError(f"{out_file} exists: choose another file, or replace it with --overwrite")
    made = make_baseline(load_runs(runs), read_baseline(out_file) if out_file.exists() else None)
    write_baseline(made, out_file)
    show(made.to_json(), as_json, lambda: render_baseline(made, str(out_file)))
