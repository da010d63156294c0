"""Pictures as numbers, and structural similarity, which attacks train on and results report."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
# is made of them stays in its caches, beside those of other threads as well; an accelerator is only busy with many.
_VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
_PIXELS_CPU = 210_000
_PIXELS_SIDE_BY_SIDE = 105_000
_PIXELS_ACCELERATOR = 10_000_000
# Shares of a thread: one that is held up by a neighbour leaves the rest to others.
_SHARES = 2
# Times that planes come for which starting a thread takes less time than it saves.
_LEAST = 4
_CPU = torch.device("cpu")
# Faces whose difference stays in a processor's cache between the two times that it is read.
_FACES_CPU = 8


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) in [0, 255] to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255.0)


def channels_last(maps: Tensor) -> Tensor:
    """Maps (N, C, H, W) with their channels innermost, torch.channels_last, each value as it was."""
    learnt = maps.requires_grad or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if maps.device.type != "cpu" or learnt or not maps.is_contiguous() or not maps.numel():
        return maps.contiguous(memory_format=torch.channels_last)
    count, channels, height, width = maps.shape
    return _shuffled(maps, count, channels).view(count, height, width, channels).permute(0, 3, 1, 2)


def _shuffled(maps: Tensor, count: int, channels: int) -> Tensor:
    """The numbers of contiguous maps (N, C, H, W) in the order of (N, H, W, C): (N, H W C, 1, 1).

    Shuffled are numbers that stand in one pixel: a transpose by vectors, four to seven times as fast as a copy.
    """
    values = maps.numel() // count
    return F.channel_shuffle(maps.as_strided((count, values, 1, 1), (values, 1, values, values)), channels)


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
    similarity, contrast_structure, *_ = _averages(first, second)
    return similarity, contrast_structure


def ssim_and_error(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ssim` and :func:`squared_error`, (N,) each, which cost less together."""
    similarity, _, *error = _averages(first, second)
    return similarity, error[0] if error else squared_error(first, second)


def squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of each pair, float (N, C, H, W) at least float32, over channels and pixels: (N,)."""
    size = _FACES_CPU if first.device.type == "cpu" else max(1, len(first))
    chunks = zip(first.split(size), second.split(size), strict=True)
    norms = torch.cat([torch.linalg.vector_norm((x - y).flatten(1), dim=1) for x, y in chunks])
    return norms.square() / first[:1].numel()


def _averages(first: Tensor, second: Tensor) -> Sequence[Tensor]:
    """SSIM and its contrast-structure factor of each pair, (N,), and the squared error where that comes by the way."""
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"ssim takes two (N, C, H, W) of one shape, got {tuple(first.shape)}, {tuple(second.shape)}")
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):  # variances are differences: bfloat16 would lose them
        x, y = (faces.to(dtype).flatten(0, 1) for faces in (first, second))
        learnt = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if _by_onednn(x) and _window(x) == WINDOW and not learnt:
            parts = [_side_by_side(x.contiguous(), y.contiguous())]
        else:
            size = _at_once(x, _PIXELS_CPU if x.device.type == "cpu" else _PIXELS_ACCELERATOR)
            parts = [_ssim_terms(*some) for some in zip(x.split(size), y.split(size), strict=True)]
    return [torch.cat(planes).view(first.shape[:2]).mean(1) for planes in zip(*parts, strict=True)]


def _at_once(planes: Tensor, pixels: int) -> int:
    """How many of these planes (P, H, W) make about so many pixels."""
    return _VECTOR * max(1, pixels // (_VECTOR * max(1, planes[:1].numel())))


def _side_by_side(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """SSIM, its contrast-structure factor and the mean squared difference, (P,) each, by as many threads as torch uses.

    Threads that share an operation wait for each other at its end, for longer than what they do to few planes takes.
    So each of these has planes of its own.
    """

    @torch.no_grad()  # which each thread has to be told
    def several(x: Tensor, y: Tensor) -> list[tuple[Tensor, ...]]:
        measuring = functools.cache(_measuring)  # the last planes may be fewer
        return [measuring(*a.shape)(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]

    size = _at_once(x, _PIXELS_SIDE_BY_SIDE)
    chunks = -(-len(x) // size)
    threads = min(torch.get_num_threads(), chunks // _LEAST)
    if threads < 2 or not hasattr(_program(), "omp_set_num_threads"):
        parts = several(x, y)
    else:
        shares = (planes.split(size * -(-chunks // (_SHARES * threads))) for planes in (x, y))
        with ThreadPoolExecutor(threads, initializer=_alone) as pool:
            parts = list(itertools.chain.from_iterable(pool.map(several, *shares)))
    luminance, contrast, error = (torch.cat(planes) for planes in zip(*parts, strict=True))
    contrast_structure = 1 - 2 * contrast
    return contrast_structure - 2 * luminance, contrast_structure, error


@functools.cache
def _program() -> ctypes.CDLL:
    """What this process has loaded."""
    return ctypes.CDLL(None)


def _alone() -> None:
    """Let torch share no operation of this thread.

    Other threads, and those that start later, keep their number, which torch.set_num_threads would change.
    """
    torch.get_num_threads()  # sets the number where nothing has yet
    _program().omp_set_num_threads(1)


def _by_onednn(maps: Tensor) -> bool:
    on_processor = maps.device.type == "cpu" and maps.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return on_processor and maps.numel() > 0


@functools.cache
def _constants() -> Tensor:
    """For the sum and for the difference: 1 and -1, 2 (K1 L)^2 and 0, 2 (K2 L)^2 and 0; float32 (3, 2, 1, 1, 1, 1)."""
    pairs = [[1.0, -1.0], [2 * C1, 0.0], [2 * C2, 0.0]]
    return torch.tensor(pairs, dtype=torch.float32)[..., None, None, None, None]


def _measuring(planes: int, height: int, width: int) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A function of contiguous x and y, float32 (P, H, W) of this shape on a processor, without a gradient.

    It returns halves of what luminance times contrast-structure falls short of contrast-structure, and that of 1, and
    the mean squared difference: three (P,).

    Most of the time goes into reading and writing maps, which are too large for the second cache, and threads wait for
    each other at every call to torch, as it takes the interpreter. So there are few of both: one call serves the sum
    and the difference, results take the place of what nobody needs any longer, and what is the same for other pictures
    is made once. Planes come innermost, so that vectors run over them and no tap is out of step.
    """
    vector = planes if planes % _VECTOR else _VECTOR
    count = planes // vector
    signs, c1, c2 = _constants()
    kernel = _kernel(WINDOW, vector)
    down, along = kernel[:, :, :, None], kernel[:, :, None]
    moments = torch.empty(4, count, height * width * vector, 1, 1, dtype=torch.float32)
    first, second, total = moments[:2], moments[2:], moments[0]
    square = moments[3].view(count, -1, vector)
    images = moments.view(-1, height, width, vector).permute(0, 3, 1, 2)

    def measured(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        torch.addcmul(_shuffled(x, count, vector), _shuffled(y, count, vector), signs, out=first)
        total.sub_(1)
        torch.addcmul(c2, first, first, out=second)
        error = square.mean(1).flatten()
        maps = F.conv2d(F.conv2d(images, down, groups=vector), along, groups=vector)
        maps = maps.view(2, 2, count, vector, -1, 1)
        (means, variances), (totals, apart) = maps.unbind(), maps.unbind(1)
        variances.addcmul_(means, means, value=-1)
        means[0].add_(1)
        torch.addcmul(c1, means, means, out=means)
        luminance, contrast = apart.div_(totals.add_(apart)).unbind()
        luminance.addcmul_(luminance, contrast, value=-2)
        return (*apart.mean((3, 4)).flatten(1).unbind(), error)

    return measured


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """SSIM and its contrast-structure factor of planes (P, H, W): two (P,)."""
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
    means: Tensor = _WindowMeans.apply(maps, _window(maps), 0)
    return means


def _window(maps: Tensor) -> int:
    """Taps of the largest window that fits."""
    shorter = min(maps.shape[-2:])
    return min(WINDOW, shorter - 1 + shorter % 2)


def _blurred(maps: Tensor, window: int, margin: int) -> Tensor:
    """(M, P, H, W), with ``margin`` zeros around, to (M, P, H+2*margin-window+1, W+2*margin-window+1)."""
    planes = maps.shape[1]
    # Of a single plane CUDA's convolution would be a common one, in TF32.
    if _by_onednn(maps) or (maps.is_cuda and maps.dtype == torch.float32 and planes > 1):
        kernel = _kernel(window, planes, maps.device)
        # Depthwise. oneDNN wants the planes innermost: vectors run over planes, so that no tap is out of step with
        # them. Sums of shifted slices take four times as long there, products with a banded matrix five times.
        order = torch.contiguous_format if maps.is_cuda else torch.channels_last
        maps = maps.contiguous(memory_format=order)
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
def _kernel(window: int, planes: int, device: torch.device = _CPU) -> Tensor:
    """The taps for each plane, float32 (planes, 1, window)."""
    return torch.tensor(_taps(window)).repeat(planes, 1, 1).to(device)
