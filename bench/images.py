"""Differentiable structural similarity, for attacks that train on it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_WINDOW = 11
_SIGMA = 1.5


@lru_cache(maxsize=32)
def _gaussian_band(size: int, window: int, device: torch.device) -> Tensor:
    """(size - window + 1, size): row i holds the Gaussian window over pixels i..i + window - 1.

    The filter is separable and the faces are small, so two products with this matrix are faster on a
    CPU than a depth-wise convolution, and the same on a GPU.
    """
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    band = torch.zeros(size - window + 1, size, dtype=torch.float64)
    for row in range(len(band)):
        band[row, row : row + window] = weights
    return band.to(device, torch.float32)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair, averaged over channels and pixels.

    Gaussian 11x11 window of sigma 1.5, population covariance, data range 1, valid positions only. Faces
    smaller than the window use the largest odd window that fits.

    Args:
        first: float (N, C, H, W), values about [0, 1].
        second: of the same shape.

    Returns:
        float32 (N,), at most 1.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"ssim takes two (N, C, H, W) of one shape, got {tuple(first.shape)}, {tuple(second.shape)}")
    height, width = first.shape[-2:]
    shorter = min(height, width)
    window = min(_WINDOW, shorter - 1 + shorter % 2)
    rows = _gaussian_band(height, window, first.device)
    columns = _gaussian_band(width, window, first.device).T
    x, y = first.float(), second.float()
    with torch.autocast(first.device.type, enabled=False):  # variances are differences: bf16 would lose them
        mean_x, mean_y, xx, yy, xy = (rows @ torch.stack((x, y, x * x, y * y, x * y)) @ columns).unbind()
    c1, c2 = 0.01**2, 0.03**2
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)
