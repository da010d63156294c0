"""A bank of tileable random fields, made once, that skin, hair, backgrounds and sensors read from."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 512
MOTTLE, SPECKLE, STRAND, CLOUD = range(4)


def _filtered(generator: torch.Generator, gain: Tensor) -> Tensor:
    """White noise (SIZE, SIZE) shaped by ``gain`` over frequency, zero mean and unit deviation."""
    white = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    field: Tensor = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return (field - field.mean()) / field.std()


@functools.lru_cache(maxsize=4)
def bank(device: torch.device) -> Tensor:
    """float32 (1, 4, SIZE, SIZE): skin mottle, freckle-sized speckle, hair strands, soft clouds."""
    generator = torch.Generator().manual_seed(0x5EED)
    frequency = torch.fft.fftfreq(SIZE, dtype=torch.float64) * SIZE
    fy, fx = frequency[:, None], frequency[None, :]
    radius = torch.hypot(fx, fy).clamp(min=1)
    mottle = radius.pow(-1.0) * (radius > 6) * torch.exp(-((radius / 110) ** 2))
    speckle = torch.exp(-((radius / 105 - 1) ** 2) / 0.18)
    strand = torch.exp(-((fx.abs() / 55 - 1) ** 2) / 0.5) * torch.exp(-((fy / 5) ** 2))
    cloud = radius.pow(-1.6) * torch.exp(-((radius / 60) ** 2))
    fields = [_filtered(generator, gain) for gain in (mottle, speckle, strand, cloud)]
    return torch.stack(fields).to(torch.float32)[None].to(device)


@functools.lru_cache(maxsize=4)
def grain(device: torch.device) -> Tensor:
    """float32 (3, SIZE, SIZE): white Gaussian sensor noise of unit deviation."""
    generator = torch.Generator().manual_seed(0x6EA1)
    return torch.randn(3, SIZE, SIZE, generator=generator).to(device)


def sample(fields: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Read (1, C, S, S) fields at u, v (N, H, W); the fields span [-1, 1] and repeat by reflection.

    Returns (N, C, H, W).
    """
    n, height, width = u.shape
    grid = torch.stack((u, v), dim=-1).reshape(1, n * height, width, 2)
    read = F.grid_sample(fields, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return read.view(fields.shape[1], n, height, width).transpose(0, 1)


def crop_grain(left: Tensor, top: Tensor, size: int, device: torch.device) -> Tensor:
    """Windows (N, 3, size, size) of :func:`grain`, wrapped; left, top float (N,) in [0, 1)."""
    steps = torch.arange(size, device=device)
    rows = ((top * SIZE).long()[:, None] + steps) % SIZE
    columns = ((left * SIZE).long()[:, None] + steps) % SIZE
    return grain(device)[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


TEXELS_PER_UNIT = 1 / 4.4
"""Face units to bank coordinates, so that a texel is about a pixel of a 112-pixel face."""

assert math.isclose(2 * 56 / SIZE, TEXELS_PER_UNIT, rel_tol=0.05)
