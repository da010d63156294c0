"""``bench export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import show_line
from bench.commands.flags import AsJson
from bench.errors import UsageError


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    what: Annotated[str, typer.Option(help="recogniser | attack: which of the run's networks.")],
    out_file: Annotated[Path, typer.Option("--out", help="The .onnx file to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a network and a card that are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's recogniser, or its attack's network, as ONNX, and its model card beside it.

    Onnxruntime has to agree with torch on it.
    """
    from bench.files import write_text
    from bench.run.archive import load_run
    from bench.run.export import export as export_network
    from reports.card import model_card

    card = out_file.with_suffix(".md")  # may be anybody's notes
    if there := [file for file in (out_file, card) if file.exists() and not overwrite]:
        raise UsageError(f"{there[0]} exists: choose another file, or replace it with --overwrite")
    written = export_network(run, what, out_file)
    write_text(card, model_card(load_run(run), written))
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in written.inputs.items())
    use = "; can be an --evaluator" if written.evaluator else ""
    told = f"{written.file}: {shapes} -> {written.output}, at most {written.difference:.1g} from torch{use}"
    show_line(written, as_json, told)
