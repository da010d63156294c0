"""``bench protect``: what a client would send for some images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bench.commands.console import out, print_json
from bench.commands.flags import AsJson, DefenseOptions
from bench.errors import DataError, MissingError, UsageError
from bench.files import replacing
from bench.plugins import make_defense
from bench.run.config import parse_assignments


def protect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Face images, one face each.")],
    defense: Annotated[str, typer.Option(help="Defence (bench list defenses).")],
    out_file: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    defense_option: DefenseOptions = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what the defence draws.")] = 0,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Faces are resized to this, in pixels.")] = 112,
    as_json: AsJson = False,
) -> None:
    """Protect faces as a client would, and write the representations."""
    summary = protect_files(
        images,
        out_file,
        defense=defense,
        options=parse_assignments(defense_option or [], "-o"),
        seed=seed,
        image_size=image_size,
    )
    if as_json:
        print_json(summary)
    else:
        shape = "x".join(str(n) for n in summary["shape"])
        out.print(f"{escape(str(out_file))}: {summary['defense']} {shape} float32", highlight=False)


def protect_files(
    images: Sequence[Path],
    file: Path,
    *,
    defense: str,
    options: Mapping[str, str],
    seed: int,
    image_size: int,
) -> dict[str, Any]:
    """Protect image files and write the representations to ``file`` in one step.

    The ``.npz`` holds ``representation`` (N, C, h, w) float32, ``state`` (N, D) int64 (empty where nothing is
    drawn), ``images`` (the paths), ``defense`` and ``options`` (JSON).

    Returns:
        A summary: name, options, shape, bytes per face, file.

    Raises:
        UsageError: unknown defence or option, or ``file`` is no ``.npz``.
        MissingError: an image is not there.
        DataError: an image cannot be decoded.
    """
    import numpy as np
    import torch

    from bench.data.decode import decode_image
    from bench.images import to_float
    from bench.randomness import Streams

    if file.suffix != ".npz":
        raise UsageError(f"--out {file}: the file must end in .npz")
    mechanism = make_defense(defense, dict(options), "cpu", image_size)
    if mechanism.trainable:
        raise UsageError(f"{defense} has to be fitted on faces first: run it with bench run")
    for image in images:
        if not image.is_file():
            raise MissingError(f"image {image} does not exist")
    decoded = []
    for image in images:
        try:
            decoded.append(decode_image(image.read_bytes(), image_size))
        except DataError as error:
            raise DataError(f"{image}: {error}") from None
    faces = to_float(torch.stack(decoded))
    protected = mechanism.protect(faces, Streams(seed).generator("victims"))
    state = protected.state if protected.state is not None else torch.empty(len(faces), 0, dtype=torch.int64)
    resolved = mechanism.options.model_dump(mode="json")
    with replacing(file) as temporary:
        np.savez(
            temporary,
            representation=protected.representation.float().numpy(),
            state=state.numpy(),
            images=np.array([str(image) for image in images]),
            defense=np.array(mechanism.name),
            options=np.array(json.dumps(resolved)),
        )
    return {
        "defense": mechanism.name,
        "options": resolved,
        "shape": list(protected.representation.shape),
        "bytes_per_face": mechanism.bytes_per_face(),
        "out": str(file),
    }
