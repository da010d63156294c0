"""Arrays that the released code of published defences computes on two synthetic pictures (``tests/data/golden``).

Spectra and features are stored on a grid of ten rows by ten columns. The released code computes in float32 and is the
noisy side of a comparison: 2e-3 absolute among coefficients, 1e-4 among pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Absolute tolerances.
COEFFICIENTS, PIXELS = 2e-3, 1e-4

_FOLDER = Path(__file__).parents[1] / "data" / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """All arrays of one file."""
    with np.load(_FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def pictures() -> Tensor:
    """The two pictures, float32 (2, 3, 112, 112) in [0, 1]."""
    return golden("inputs")["synthetic_u8"].permute(0, 3, 1, 2).float() / 255


def on_grid(maps: Tensor) -> Tensor:
    """What is stored of maps (..., 112, 112): (..., 10, 10)."""
    grid = golden("dctdp")  # the same in every file
    return maps[..., grid["rows"].long()[:, None], grid["cols"].long()]
