"""``bench data``: look at, check and pack face data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from bench.commands.console import Command, err, progress_bars, show, show_line, table
from bench.commands.flags import AsJson
from bench.errors import BenchError

data = typer.Typer(name="data", help="Look at, check and pack face data.", no_args_is_help=True)

Dataset = Annotated[
    Path, typer.Argument(help="A folder of identities, an InsightFace folder, a .rec, a .bin or .tar shards.")
]


@data.command(cls=Command)
def info(path: Dataset, as_json: AsJson = False) -> None:
    """Describe a dataset from its headers."""
    from bench.data.tools.info import info as describe

    with progress_bars().task("read headers") as report:
        dataset = describe(path, report=report)
    rows = [
        (
            part.name,
            f"{part.identities:,}",
            f"{part.images:,}",
            "{min:g} to {max:g}, median {median:g}".format_map(part.images_per_identity),
            ", ".join(f"{size}: {count:,}" for size, count in list(part.sizes.items())[:4]),
            f"{part.pairs.pairs} in {part.pairs.folds} folds ({part.pairs.file})" if part.pairs else "-",
        )
        for part in dataset.parts
    ]
    columns = ("part", "identities", "images", "per identity", "sizes", "pairs")
    lines = [f"{part.name}: {note}" for part in dataset.parts for note in part.notes]
    lines += [
        f"{part.name}: left out {count:,}: {reason}"
        for part in dataset.parts
        for reason, count in part.left_out.items()
    ]

    def render() -> Group:
        described = table(rows, *columns, title=f"{dataset.path} ({dataset.kind})")
        return Group(described, *(Text(line) for line in lines))

    show(dataset, as_json, render)


@data.command(cls=Command)
def verify(path: Dataset, as_json: AsJson = False) -> None:
    """Decode every image and list what is damaged or suspicious; exit code 3 if anything is damaged."""
    from bench.data.tools.verify import verify as check

    with progress_bars().task("decode images") as report:
        checked = check(path, report=report)
    colours = {"damaged": "red"}
    lines = [
        f"[{colours.get(seen.severity, 'yellow')}]{seen.severity}[/] {escape(seen.where)}: {escape(seen.reason)}"
        for seen in checked.findings
    ]
    counts = f"{checked.images:,} images checked, {len(checked.findings):,} findings"
    show(checked, as_json, lambda: "\n".join([*lines, counts]))
    if not checked.ok:
        raise typer.Exit(BenchError.exit_code)


@data.command(cls=Command)
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of identities: folder/identity/image.*")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for train.rec, train.idx, property (and a .bin).")],
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the stored faces in pixels.")] = 112,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a folder of identities into InsightFace files."""
    from bench.data.tools.pack import pack as pack_folder

    with progress_bars().task("pack images") as report:
        packed = pack_folder(folder, out_dir, image_size=image_size, overwrite=overwrite, report=report)
    if not as_json:
        for where, reason in packed.skipped:
            err.print(f"left out {escape(where)}: {escape(reason)}", style="yellow", soft_wrap=True)
    counts = f"{packed.images:,} images of {packed.identities:,} identities, {packed.pairs:,} pairs"
    show_line(packed, as_json, f"{packed.out}: {counts} ({', '.join(packed.files)})")
