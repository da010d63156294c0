"""Pictures as numbers, and structural similarity, which attacks train on and results report."""

from __future__ import annotations

import functools
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

# Planes (of one colour) come at once in multiples of the values in a processor's vector, up to so many pixels that what
# is made of them stays in its caches; an accelerator is only busy with many.
_VECTOR = 16
_PIXELS_CPU = 200_000
_PIXELS_ACCELERATOR = 10_000_000


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
    pixels = _PIXELS_CPU if first.device.type == "cpu" else _PIXELS_ACCELERATOR
    size = _VECTOR * max(1, pixels // (_VECTOR * max(1, math.prod(first.shape[-2:]))))
    with torch.autocast(first.device.type, enabled=False):  # variances are differences: bfloat16 would lose them
        chunks = zip(*(faces.to(dtype).flatten(0, 1).split(size) for faces in (first, second)), strict=True)
        similarity, contrast_structure = zip(*(_ssim_terms(x, y) for x, y in chunks), strict=True)
    return _of_faces(similarity, first.shape), _of_faces(contrast_structure, first.shape)


def _of_faces(planes: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    return torch.cat(planes).view(shape[:2]).mean(1)


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of planes (P, H, W): two (P,)."""
    # Variances do not change with the origin; taken about mid-grey they lose fewer bits.
    terms: tuple[Tensor, Tensor] = _Terms.apply(*_moments((x + y).sub_(1)), *_moments(x - y))
    return terms


def _moments(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (P, H, W) in each window, (1, P, H-10, W-10)."""
    planes = planes[None]
    if planes.device.type == "cpu":
        planes = planes.contiguous(memory_format=torch.channels_last)  # as _blurred wants them
    mean = _window_means(planes)
    return mean, _window_means(planes.square()).sub_(mean.square())


class _Terms(torch.autograd.Function):
    """Both terms, (P,), from mean and variance, (1, P, h, w), of the sum s - 1 and of the difference d of two pictures.

    (E[s]^2 - E[d]^2) / 2 is twice the product of the means, (E[s]^2 + E[d]^2) / 2 the sum of their squares, and so on
    for variances: four maps to average instead of five. Operation by operation the gradient costs twice as much.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, apart: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, variance, apart, difference)
        total = (variance + difference).add_(2 * C2)
        contrast_structure = total.sub(difference, alpha=2).div_(total)
        darker = apart.square()
        total = (mean + 1).square_().add_(darker).add_(2 * C1)
        luminance = total.sub(darker, alpha=2).div_(total)
        return luminance.mul_(contrast_structure).mean((0, 2, 3)), contrast_structure.mean((0, 2, 3))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        mean, variance, apart, difference = ctx.saved_tensors
        of_similarity, of_contrast = (gradient[:, None, None] / mean[0, 0].numel() for gradient in gradients)
        brightness, total = mean + 1, variance + difference + 2 * C2
        contrast_structure = 1 - 2 * difference / total
        square = brightness.square() + apart.square() + 2 * C1
        luminance = 1 - 2 * apart.square() / square
        along = (of_similarity * luminance + of_contrast) / total
        across = 2 * of_similarity * contrast_structure / square
        return (
            across * (1 - luminance) * brightness,
            along * (1 - contrast_structure),
            -across * (1 + luminance) * apart,
            -along * (1 + contrast_structure),
        )


class _WindowMeans(torch.autograd.Function):
    """:func:`_blurred`, whose gradient is the same of the gradient with the other margin, as the window is symmetric.

    Recorded tap by tap it would be a padded copy of the picture for each tap, three times the work.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, window: int, margin: int) -> Tensor:
        ctx.window, ctx.margin = window, margin
        return _blurred(maps, window, margin)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return _WindowMeans.apply(gradients[0], ctx.window, ctx.window - 1 - ctx.margin), None, None


def _window_means(maps: Tensor) -> Tensor:
    """Gaussian-weighted means over all whole windows: (M, P, H, W) to (M, P, H-10, W-10)."""
    shorter = min(maps.shape[-2:])
    means: Tensor = _WindowMeans.apply(maps, min(WINDOW, shorter - 1 + shorter % 2), 0)
    return means


def _blurred(maps: Tensor, window: int, margin: int) -> Tensor:
    """(M, P, H, W), with ``margin`` zeros around, to (M, P, H+2*margin-window+1, W+2*margin-window+1)."""
    on_processor = maps.device.type == "cpu" and maps.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if on_processor and maps.numel():
        # oneDNN's depthwise convolution, with the planes innermost: vectors run over planes, so that no tap is out of
        # step with them. Sums of shifted slices take four times as long, products with a banded matrix five times.
        planes = maps.shape[1]
        maps, kernel = maps.contiguous(memory_format=torch.channels_last), _kernel(window, planes)
        maps = F.conv2d(maps, kernel[:, :, :, None], padding=(margin, 0), groups=planes)
        return F.conv2d(maps, kernel[:, :, None], padding=(0, margin), groups=planes)
    maps = F.pad(maps, (margin, margin, margin, margin)) if margin else maps
    taps = _taps(window)
    for axis in (-1, -2):
        width = maps.shape[axis] - window + 1
        total = maps.narrow(axis, 0, width) * taps[0]
        for shift, tap in enumerate(taps[1:], start=1):
            total.add_(maps.narrow(axis, shift, width), alpha=tap)
        maps = total
    return maps


@functools.cache
def _taps(window: int) -> list[float]:
    """Of a Gaussian window, summing to one."""
    weights = [math.exp(-((offset - window // 2) ** 2) / (2 * SIGMA**2)) for offset in range(window)]
    return [weight / sum(weights) for weight in weights]


@functools.cache
def _kernel(window: int, planes: int) -> Tensor:
    """The taps for each plane, float32 (planes, 1, window)."""
    return torch.tensor(_taps(window)).repeat(planes, 1, 1)
