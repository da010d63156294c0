"""``bench gate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show
from bench.commands.flags import AsJson, Runs


def gate(
    runs: Runs,
    baseline_file: Annotated[Path, typer.Option("--baseline", help="The file that `bench baseline` wrote.")],
    ignore_options: Annotated[
        bool,
        typer.Option(
            "--ignore-options", help="Hold a run against the cell of the same names, whatever the options (-o, -a)."
        ),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether runs leak more than their baseline: exit code 0 no, 1 yes (or a broken attack), 4 undecided."""
    from bench.files import write_text
    from bench.gate.baseline import read_baseline
    from bench.gate.formats import junit as junit_xml
    from bench.gate.formats import summary, workflow_commands
    from bench.gate.gate import gate as compare_to_baseline
    from bench.run.archive import load_runs
    from reports.terminal import render_gate

    report = compare_to_baseline(
        read_baseline(baseline_file), load_runs(runs), name=str(baseline_file), ignore_options=ignore_options
    )
    if junit is not None:
        write_text(junit, junit_xml(report))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(report):
            sys.stderr.write(line + "\n")
    if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary_file).open("a", encoding="utf-8") as file:  # other steps append to it, too
            file.write(summary(report))
    show(report, as_json, lambda: render_gate(report))
    raise typer.Exit(report.exit_code)
