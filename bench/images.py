"""Pictures as numbers, and structural similarity, which attacks train on and results report."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Gaussian window of Wang et al. 2004 (IEEE TIP 13(4), section III-B): 11 taps, standard deviation 1.5 pixels.
WINDOW = 11
SIGMA = 1.5

#: (K1 L)^2 and (K2 L)^2 of Wang et al. 2004, eq. 13, for the data range L = 1.
C1 = 0.01**2
C2 = 0.03**2

# The window is a sum of shifted slices, which reads memory many times: a chunk of faces should fit the cache of a
# processor core, while an accelerator is only busy with many faces at once.
_CHUNK_CPU = 4
_CHUNK_ACCELERATOR = 256


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair, per channel and averaged; differentiable.

    Equal to ``skimage.metrics.structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1, channel_axis=0)``: windows that reach over the border do not count.
    Images smaller than the window are compared with the largest odd one that fits.

    Args:
        first: float (N, C, H, W), values about [0, 1]; half precision is computed in float32.
        second: of the same shape.

    Returns:
        (N,) in [-1, 1]; 1 for identical images.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> faces = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> ssim(faces, faces)
        tensor([1., 1.])
    """
    return ssim_terms(first, second)[0]


def ssim_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ssim` and its contrast-structure factor, each averaged over windows and channels: two (N,)."""
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"ssim takes two (N, C, H, W) of one shape, got {tuple(first.shape)}, {tuple(second.shape)}")
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    size = _CHUNK_CPU if first.device.type == "cpu" else _CHUNK_ACCELERATOR
    with torch.autocast(first.device.type, enabled=False):  # variances are differences: bfloat16 would lose them
        chunks = zip(first.to(dtype).split(size), second.to(dtype).split(size), strict=True)
        similarity, contrast_structure = zip(*(_ssim_terms(x, y) for x, y in chunks), strict=True)
    return torch.cat(similarity), torch.cat(contrast_structure)


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # Variances do not change with the origin; taken about mid-grey they lose fewer bits.
    x, y = x - 0.5, y - 0.5
    mean_x, mean_y, squares, product = _window_means(torch.stack((x, y, x * x + y * y, x * y))).unbind()
    variances = squares - mean_x.square() - mean_y.square()
    covariance = product - mean_x * mean_y
    contrast_structure = (2 * covariance + C2) / (variances + C2)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return (luminance * contrast_structure).flatten(1).mean(1), contrast_structure.flatten(1).mean(1)


class _WindowMeans(torch.autograd.Function):
    """:func:`_blurred`, whose gradient is the same of the padded gradient, as the window is symmetric.

    Recorded tap by tap it would be a padded copy of the picture for each tap, three times the work.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, window: int) -> Tensor:
        ctx.window = window
        return _blurred(maps, window)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        margin = ctx.window - 1
        return _WindowMeans.apply(F.pad(gradients[0], (margin, margin, margin, margin)), ctx.window), None


def _window_means(maps: Tensor) -> Tensor:
    """Gaussian-weighted means over all whole windows: (..., H, W) to (..., H-10, W-10)."""
    shorter = min(maps.shape[-2:])
    means: Tensor = _WindowMeans.apply(maps, min(WINDOW, shorter - 1 + shorter % 2))
    return means


def _blurred(maps: Tensor, window: int) -> Tensor:
    """(..., H, W) to (..., H-window+1, W-window+1).

    A depthwise convolution of one channel is 20 to 40 times slower on a processor than these shifted sums; products
    with a banded matrix take twice as long.
    """
    taps = [math.exp(-((offset - window // 2) ** 2) / (2 * SIGMA**2)) for offset in range(window)]
    first, *rest = (tap / sum(taps) for tap in taps)
    for axis in (-1, -2):
        width = maps.shape[axis] - window + 1
        total = maps.narrow(axis, 0, width) * first
        for shift, tap in enumerate(rest, start=1):
            total.add_(maps.narrow(axis, shift, width), alpha=tap)
        maps = total
    return maps
