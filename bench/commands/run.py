"""``bench run``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from bench.commands.console import err, progress_bars, show
from bench.commands.flags import AsJson, Assignments, AttackOptions, DefenseOptions, with_flags
from bench.errors import MissingError, UsageError
from bench.run.config import merge, nested, parse_assignments, resolve, settings, write_config
from bench.run.launch import FreeCores, Launch, keep_freed_memory, uncollected


@with_flags(setting for setting in settings() if setting.flag)
def run(
    *,
    flags: dict[str, Any],
    defense_option: DefenseOptions = None,
    attack_option: AttackOptions = None,
    assignments: Assignments = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and an estimate by earlier runs; compute nothing.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: time what is not cached, for a minute at most.")
    ] = False,
    write_file: Annotated[
        Path | None, typer.Option("--write-config", help="Write all settings, resolved, to a TOML file for --config.")
    ] = None,
) -> None:
    """Train behind a defence, attack it, and print how well it recognises and what leaks."""
    if measure and not dry_run:
        raise UsageError("--measure times a plan: add --dry-run")
    options = {
        "defense_options": parse_assignments(defense_option or [], "-o"),
        "attack_options": nested(parse_assignments(attack_option or [], "-a"), "-a"),
    }
    given = merge(nested(parse_assignments(assignments or [], "--set")), flags, options)
    resolved = resolve(given, os.environ, config)

    free = FreeCores()  # watched while torch is imported

    leads = Launch.here().leads
    with uncollected(kept=True), progress_bars().task("load torch") if leads else contextlib.nullcontext():
        from bench.run.pipeline import Pipeline

        pipeline = Pipeline(resolved, console=err)
    if not leads:
        if not dry_run:
            pipeline.help()
        return

    if write_file is not None:
        write_config(resolved, write_file)
        err.print(f"settings written to {write_file}", markup=False, highlight=False, soft_wrap=True)
    from bench.run.beside import is_worth_it

    if dry_run:
        from reports.plan import render_plan

        plan = pipeline.plan(measure=measure, beside=is_worth_it(resolved, pipeline.machine.device))
        show(plan, as_json, lambda: render_plan(plan))
    else:
        from bench.run.archive import read_manifest
        from bench.run.machines import use_free_cores
        from bench.run.store import run_id

        remembered = None
        with contextlib.suppress(MissingError):  # most runs are new
            remembered = read_manifest(resolved.out / run_id(resolved)).threads
        if note := use_free_cores(free, remembered):
            err.print(note, markup=False, highlight=False, soft_wrap=True)
        keep_freed_memory()
        result = pipeline.run(beside=is_worth_it(resolved, pipeline.machine.device))

        def rendered() -> RenderableType:
            from reports.terminal import render_result  # loads what judges results

            return render_result(result, pipeline.directory)

        show(result.to_json(), as_json, rendered)
