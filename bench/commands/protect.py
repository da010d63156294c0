"""``bench protect``: what a client would send for some images.

The ``.npz`` holds what is sent, ``representation`` (N, C, h, w) float32 or, where it has several parts, each under its
name; beside it ``state`` (N, D) and ``keys`` (N, k) int64 (empty where none are drawn), ``images`` (the paths),
``defense`` and ``options`` (JSON).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.commands.console import show_line
from bench.commands.flags import AsJson, DefenseOptions, completion
from bench.errors import DataError, MissingError, UsageError
from bench.files import replacing
from bench.plugins import make_defense
from bench.run.config import parse_assignments, run_config


def protect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Face images, one face each.")],
    out_file: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    defense: Annotated[
        str | None,
        typer.Option(help="Defence (bench list defenses), or a chain: A+B.", autocompletion=completion("defense")),
    ] = None,
    defense_option: DefenseOptions = None,
    run: Annotated[
        Path | None, typer.Option("--from", help="Folder of a run: protect with its defence, as it was fitted there.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what the defence draws.")] = 0,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Faces are resized to this, in pixels.")] = 112,
    as_json: AsJson = False,
) -> None:
    """Protect faces as a client would, and write the representations."""
    import numpy as np
    import torch

    from bench.data.decode import decode_image
    from bench.images import to_float
    from bench.randomness import Streams
    from bench.run.provider import load_defense

    options = parse_assignments(defense_option or [], "-o")
    if out_file.suffix != ".npz":
        raise UsageError(f"--out {out_file}: the file must end in .npz")
    if (defense is None) == (run is None) or (run is not None and options):
        raise UsageError("name a defence (--defense, with -o), or a run to take its defence from (--from)")
    if run is not None:
        config = run_config(run)
        mechanism, image_size = load_defense(run, config), config.image_size
    else:
        mechanism = make_defense(str(defense), dict(options), "cpu", image_size)
        if mechanism.trainable or mechanism.level == "template":
            raise UsageError(f"{defense} learns from faces: run it with bench run, then bench protect --from RUN")
    if missing := [image for image in images if not image.is_file()]:
        raise MissingError(f"image {missing[0]} does not exist")
    decoded = []
    for image in images:
        try:
            decoded.append(decode_image(image.read_bytes(), image_size))
        except DataError as error:
            raise DataError(f"{image}: {error}") from None
    faces = to_float(torch.stack(decoded))
    protected = mechanism.protect(faces, Streams(seed).generator("victims"))
    parts: dict[str, Any] = mechanism.unpack(protected.representation.float())
    nothing = torch.empty(len(faces), 0, dtype=torch.int64)
    resolved = mechanism.options.model_dump(mode="json")
    with replacing(out_file) as temporary:
        np.savez(
            temporary,
            state=(nothing if protected.state is None else protected.state).numpy(),
            keys=(nothing if protected.keys is None else protected.keys).numpy(),
            images=np.array([str(image) for image in images]),
            defense=np.array(mechanism.name),
            options=np.array(json.dumps(resolved)),
            **parts,
        )
    summary = {
        "defense": mechanism.name,
        "options": resolved,
        "shape": list(protected.representation.shape),
        "parts": {name: list(part.shape) for name, part in parts.items()},
        "bytes_per_face": mechanism.bytes_per_face(),
        "out": str(out_file),
    }
    shape = "x".join(map(str, protected.representation.shape))
    show_line(summary, as_json, f"{out_file}: {mechanism.name} {shape} float32")
