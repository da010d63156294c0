"""``bench recogniser``: look at a recogniser that exists already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from bench.commands.console import Command, progress_bars, show, table
from bench.commands.flags import AsJson, DefenseOptions, completion, spellings, with_flags
from bench.errors import UsageError
from bench.measures import interval, shown
from bench.nets.options import InputForm
from bench.plugins import describe, explain
from bench.run.config import listed, parse_assignments

recogniser = typer.Typer(name="recogniser", help="Look at a recogniser that exists already.", no_args_is_help=True)


@recogniser.callback()
def _group() -> None:
    pass


@recogniser.command(cls=Command)
@with_flags(describe(InputForm))
def info(
    *,
    flags: dict[str, Any],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A recogniser's file, or the name of a plug-in.")],
    data_root: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A folder of verification packs, or one (BENCH_DATA_ROOT).")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(metavar="PACK[,PACK]", help="Packs to measure, or none; by default all at hand.")
    ] = None,
    defense: Annotated[
        str,
        typer.Option(
            *spellings("--defense"), help="Whose representations it takes.", autocompletion=completion("defense")
        ),
    ] = "none",
    defense_option: DefenseOptions = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say what a recogniser is, what it is fed, and how well it tells apart people of the packs at hand."""
    from bench.run.machines import choose_machine
    from bench.run.recogniser import report_on

    try:
        given = InputForm.model_validate(flags)
    except ValidationError as error:
        raise UsageError(explain(error, "input of the recogniser")) from None
    if data_root is None and (named := os.environ.get("BENCH_DATA_ROOT")):
        data_root = Path(named)
    report = report_on(
        source,
        given,
        defense=defense,
        defense_options=parse_assignments(defense_option or [], "-o"),
        data_root=data_root,
        packs=[Path(name) for name in listed(verify)] if verify else (),
        device=choose_machine(device, "32-true").device,
        task=progress_bars().task,
    )

    def render() -> Group:
        facts = report.recogniser.model_dump(mode="json", exclude={"name", "sha256"})
        facts["digest"] = report.recogniser.sha256
        rows = [(name.replace("_", " "), _text(value)) for name, value in facts.items() if value not in (None, "", [])]
        parts: list[Any] = [table(rows, report.recogniser.name, "")]
        if report.packs:
            measured = [
                (
                    name,
                    pack.pairs,
                    shown("accuracy", pack.accuracy),
                    interval("accuracy", pack.accuracy),
                    shown("auc", pack.auc),
                    shown("eer", pack.eer),
                    *(shown("tar_at_far", measure) for measure in pack.tar_at_far.values()),
                )
                for name, pack in report.packs.items()
            ]
            rates = [f"TAR at FAR {rate}" for rate in next(iter(report.packs.values())).tar_at_far]
            titles = ("pack", "pairs", "accuracy", "95 %", "AUC", "EER", *rates)
            parts += ["", table(measured, *titles, title=f"pairs told apart behind {report.defense}, in %")]
        return Group(*parts, *(Text(note, style="yellow") for note in report.notes))

    show(report, as_json, render)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return (" x " if all(isinstance(part, int) for part in value) else ", ").join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
