"""``bench speed``: what runs how fast on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType

from bench.commands.console import progress_bars, show, table
from bench.commands.flags import AsJson
from bench.errors import BenchError

if TYPE_CHECKING:
    from bench.run.benchmarks import SpeedRow, SpeedTable


def speed(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    seconds: Annotated[
        float,
        typer.Option(min=0.01, max=600, help="How long calls are timed for in a row; preparations are extra."),
    ] = 2.0,
    only: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Rows by name, or by its beginning: train is every train-...")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Also write the table to this JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time what runs are made of on this machine, against the plain way of doing the same in the same process."""
    from bench.files import write_text
    from bench.run.benchmarks import measure_rows
    from bench.run.launch import keep_freed_memory

    keep_freed_memory()  # as in a run
    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    with progress_bars().task("rows") as report:
        measured = measure_rows(device, seconds=seconds, names=names, report=report)
    if out_file is not None:
        write_text(out_file, measured.model_dump_json(indent=2) + "\n")
    show(measured, as_json, lambda: render(measured))
    if any(row.status == "failed" for row in measured.rows):
        raise typer.Exit(BenchError.exit_code)


def render(measured: SpeedTable) -> RenderableType:
    """The table, a line for each row."""
    columns = ("row", "batch", "ms", "images/s", "x plain", "GB/s", "x writing", "peak MB", "device MB", "what")
    head = (
        f"{measured.device_name} ({measured.device}), {measured.precision}, {measured.threads} threads, "
        f"torch {measured.torch}"
    )
    return Group(head, table(map(_cells, measured.rows), *columns))


def _cells(row: SpeedRow) -> Iterable[str]:
    def number(value: float | None, scale: float = 1.0) -> str:
        if value is None:
            return ""
        value /= scale
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    yield row.name
    yield number(row.batch)
    yield number(row.milliseconds)
    yield number(row.images_per_second)
    yield number(row.ratio)
    yield number(row.gigabytes_per_second)
    yield number(row.times_writing)
    yield number(row.process_bytes, 1e6)
    yield number(row.device_bytes, 1e6)
    yield row.what if row.status == "ok" else f"{row.what}: {row.status}, {row.reason}"
