"""Pictures that stand in for faces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(count, 3, size, size) in [0, 1]: every pixel drawn by itself."""
    return torch.rand(count, 3, size, size, generator=generator(seed), dtype=dtype)


def smooth(count: int, size: int, seed: int = 0) -> Tensor:
    """uint8 (count, 3, size, size): smooth pictures with a little noise."""
    drawn = generator(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=drawn)
    images = functional.interpolate(coarse, (size, size), mode="bicubic")
    images = 0.5 + 0.12 * images + 0.02 * torch.randn(images.shape, generator=drawn)
    return images.clamp(0, 1).mul(255).to(torch.uint8)


def blends(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """uint8 (count, 3, size, size): blends of four random colours, which a small network can learn."""
    corners = torch.rand(count, 3, 2, 2, generator=generator(seed))
    return functional.interpolate(corners, (size, size), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
