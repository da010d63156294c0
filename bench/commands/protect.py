"""``bench protect``: what a client would send for some images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.data.decode import decode_image
from bench.errors import DataError, MissingError, UsageError
from bench.files import replacing
from bench.images import to_float
from bench.plugins import make_defense
from bench.randomness import Streams


def protect_files(
    images: Sequence[Path],
    out: Path,
    *,
    defense: str,
    options: Mapping[str, str],
    seed: int,
    image_size: int,
) -> dict[str, Any]:
    """Protect image files and write the representations to ``out`` in one step.

    The ``.npz`` holds ``representation`` (N, C, h, w) float32, ``state`` (N, D) int64 (empty where nothing is
    drawn), ``images`` (the paths), ``defense`` and ``options`` (JSON).

    Returns:
        A summary: name, options, shape, bytes per face, file.

    Raises:
        UsageError: unknown defence or option, or ``out`` is no ``.npz``.
        MissingError: an image is not there.
        DataError: an image cannot be decoded.
    """
    if out.suffix != ".npz":
        raise UsageError(f"--out {out}: the file must end in .npz")
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
    with replacing(out) as temporary:
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
        "out": str(out),
    }
