"""``bench sweep``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.commands.console import err, show
from bench.commands.flags import AsJson, Assignments, with_flags
from bench.errors import BenchError
from bench.plugins import describe
from bench.run.config import merge, nested, parse_assignments, settings
from bench.sweep.options import AXES, SweepOptions, read_request

_SWEEP = [option for option in describe(SweepOptions) if option.type != "table"]
_RUN = [setting for setting in settings() if setting.flag and setting.name not in AXES.values()]


@with_flags([*_SWEEP, *_RUN])
def sweep(
    *,
    flags: dict[str, Any],
    defense_option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="[NAME.]KEY=VALUE", help="Option of all defences, or of one; repeatable."),
    ] = None,
    attack_option: Annotated[
        list[str] | None,
        typer.Option("-a", metavar="[NAME.]KEY=VALUE", help="Option of all attacks, or of one; repeatable."),
    ] = None,
    assignments: Assignments = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings, those of the sweep in a table [sweep].")
    ] = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells; compute nothing.")] = False,
) -> None:
    """Run every combination of defences, attacks, rungs and seeds; exit code 3 if any of them failed."""
    from bench.sweep.sweep import Sweep
    from reports.terminal import render_sweep

    request = read_request(
        {option.name: flags.pop(option.name) for option in _SWEEP if option.name in flags},
        merge(nested(parse_assignments(assignments or [], "--set")), flags),
        os.environ,
        config,
        defense_options=defense_option,
        attack_options=attack_option,
    )
    asked = Sweep(request, console=err)
    state = asked.plan() if dry_run else asked.run()
    show(state.to_json(), as_json, lambda: render_sweep(state))
    if not dry_run and state.count("failed"):
        raise typer.Exit(BenchError.exit_code)
