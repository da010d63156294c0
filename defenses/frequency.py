"""Block DCT of the up-sampled face, without the up-sampled face.

The frequency-domain defences (PartialFace and its kin; Mi et al., ICCV 2023, section 3) up-sample an RGB
face x8 (bilinear, ``align_corners=True``), convert it to JFIF YCbCr minus 128 and take the orthonormal 8x8
block DCT-II, so that every source pixel owns one block and coefficient (u, v) of all blocks forms a map of
the size of the face, channel 8u + v.

With another factor f than the published 8 a map has h = ceil(f H / 8) blocks a side: f / 8 of the numbers in each
direction, and f = 1 is the plain block DCT of JPEG. Where 8 does not divide f H, the last row and column of the
up-sampled face are repeated to whole blocks, as JPEG encoders do.

Up-sampling and DCT are both linear and separable, hence for one colour plane X (H x H)

    z_uv = A_u X A_v^T,    A_u = (row u of D8 in every block) U,    A_u: (h, H),

with U the interpolation matrix (repeated rows included) and D8 the DCT matrix. Block i looks at the few pixels around
8 i / f: **every A_u is banded**, along the line of that slope. At f = 8 block i covers the source positions
i - 7i/(8H-1) .. i - 7i/(8H-1) + 7(H-1)/(8H-1), between pixels i-1 and i+1: A_u is tridiagonal, and a channel is
six fused multiply-adds a pixel (three vertical, three horizontal taps), in plain element-wise operations that keep full
precision under autocast and TF32 and let every face of a batch have channels of its own. On a GPU all of it is one
kernel (:mod:`defenses.fused`).

The way back at the published factor (inverse DCT, then bilinear down-sampling with aligned corners) is pointwise:
output pixel i of H lies at 8i + 7i/(H-1) of the 8H, so it reads block i alone, at a phase that grows from 0 to 7 over
the picture. A pixel is hence a sum of the coefficients of its own block, weighted by fields that are smooth, and the
same for every face.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.errors import memory_is_full

BLOCK = 8
#: The published up-sampling factor: a block for each pixel.
UPSAMPLING = 8
#: DCT coefficients of one colour, channel index 8u + v with u vertical.
CHANNELS = BLOCK * BLOCK
COLOURS = 3

#: JFIF 1.02 RGB -> (Y, Cb, Cr), without offsets.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
#: (Y, Cb, Cr), without offsets, to RGB.
RGB = (
    (1.0, 0.0, 1.402),
    (1.0, -0.344136286, -0.714136286),
    (1.0, 1.772, 0.0),
)
#: Coefficient (0, 0) of a block that is -128 everywhere: what the level shift does to luma. Chroma gets +128 - 128 = 0.
LUMA_DC_OFFSET = -128.0 * BLOCK

# Elements that a pass works on at once on a CPU: scratch and output of a chunk share the last-level cache, also where
# two processes do, while each operation stays large enough for threads to be worth their synchronisation.
_CPU_CHUNK_ELEMENTS = 1_200_000
# Faces from which on an accelerator is busy with a pass over the maps of a single frequency.
_LEAST_SHARED = 16
#: Kinds of devices whose float32 faces one kernel transforms; none once it turned out that it cannot be compiled here.
_fused_on = {"cuda"}


def dct_matrix() -> Tensor:
    """Orthonormal DCT-II of length 8, float64 (8, 8): row u is the basis vector of frequency u."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / BLOCK * (k + 0.5) * k[:, None]) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


def map_size(size: int, upsampling: int = UPSAMPLING) -> int:
    """Blocks along a side of a face of ``size`` pixels that is up-sampled by the factor: ceil(upsampling size / 8).

    >>> [map_size(112, factor) for factor in (8, 4, 3, 2, 1)]
    [112, 56, 42, 28, 14]
    """
    return -(-upsampling * size // BLOCK)


def upsampling_matrix(size: int, upsampling: int = UPSAMPLING) -> Tensor:
    """Bilinear interpolation with aligned corners along one axis, float64 (``upsampling`` ``size``, ``size``)."""
    rows = torch.arange(upsampling * size)
    position = rows.to(torch.float64) * (size - 1) / (upsampling * size - 1)
    left = position.floor().long().clamp(max=size - 2)
    weight = position - left
    matrix = torch.zeros(upsampling * size, size, dtype=torch.float64)
    matrix[rows, left] = 1 - weight
    matrix[rows, left + 1] = weight
    return matrix


def axis_factors(size: int, upsampling: int = UPSAMPLING) -> Tensor:
    """The banded matrices A_0..A_7 of one axis, float64 (8, h, ``size``), h = :func:`map_size`, for pixels in [0, 255].

    Raises:
        ValueError: ``size`` is below 2, or the factor is none of 1..8.
    """
    if size < 2:
        raise ValueError(f"the frequency transform needs faces of at least 2 pixels, got {size}")
    if not 1 <= upsampling <= BLOCK:
        raise ValueError(f"the up-sampling factor must be in 1..{BLOCK}, got {upsampling}")
    rows = torch.arange(BLOCK * map_size(size, upsampling)).clamp(max=upsampling * size - 1)
    blocks = upsampling_matrix(size, upsampling)[rows].view(-1, BLOCK, size)
    return torch.einsum("up,ipj->uij", dct_matrix(), blocks)


def colour_matrix() -> Tensor:
    """RGB in [0, 1] to YCbCr in [0, 255] without offsets, float64 (3, 3)."""
    return 255.0 * torch.tensor(YCBCR, dtype=torch.float64)


def phase_factors(size: int) -> Tensor:
    """What each of 8 frequencies adds to a decoded pixel along one axis, float64 (8, ``size``).

    Raises:
        ValueError: ``size`` is below 2.
    """
    if size < 2:
        raise ValueError(f"the frequency transform needs faces of at least 2 pixels, got {size}")
    phase = torch.arange(size, dtype=torch.float64) * (BLOCK - 1) / (size - 1)
    left = phase.floor().long().clamp(max=BLOCK - 2)
    return torch.lerp(dct_matrix()[:, left], dct_matrix()[:, left + 1], phase - left)


def dc_offset(channels: Tensor) -> Tensor:
    """The black face in ``channels``, float64 (3K,), colour-major: nonzero in luma channel 0 only."""
    offset = torch.zeros(COLOURS, len(channels), dtype=torch.float64)
    offset[0, channels.cpu() == 0] = LUMA_DC_OFFSET
    return offset.flatten()


def zigzag(count: int = CHANNELS) -> list[int]:
    """The first ``count`` channels in the zig-zag order of JPEG (ITU-T T.81, figure A.6), lowest frequency first.

    >>> zigzag(6)
    [0, 1, 8, 16, 9, 2]
    """
    cells = [(u, v) for u in range(BLOCK) for v in range(BLOCK)]
    # Along odd anti-diagonals the scan runs downwards (u grows), along even ones upwards.
    cells.sort(key=lambda c: (c[0] + c[1], c[0] if (c[0] + c[1]) % 2 else c[1]))
    return [BLOCK * u + v for u, v in cells[:count]]


# -- the kernels ---------------------------------------------------------------------------------


class _Diagonal(NamedTuple):
    """Entries of A_u along its slope: rows ``period q + row``, columns ``stride q + column``, q in first..last-1."""

    row: int
    column: int
    first: int
    last: int


@dataclass(frozen=True)
class _Band:
    """Where A_0..A_7 of an axis are not zero, and what is there.

    Block ``period q + r`` looks at pixels about ``stride q``, with period / stride = f / 8 in lowest terms; so A_u is a
    few strided diagonals, and multiplying by it a few operations on strided views.

    Attributes:
        diagonals: D of them.
        taps: (8, D, ceil(h / period)), indexed by q.
        forward, backward: the order in which A x and A^T z add diagonals up. Each element of the result is written by
            the first ``written`` of them (A x, A^T z) and added to by the others.
    """

    size: int
    period: int
    stride: int
    diagonals: tuple[_Diagonal, ...]
    taps: Tensor
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    written: tuple[int, int]

    @property
    def tridiagonal(self) -> bool:
        """Whether there is a block for each pixel, which looks at the one before it, itself and the one behind it."""
        return self.period == self.stride and [diagonal.column for diagonal in self.diagonals] == [-1, 0, 1]

    def apply(self, x: Tensor, taps: Tensor, *, dim: int, out: Tensor) -> None:
        """``out = A x`` along ``dim`` (3 or 4) of (n, 3, K or 1, ., .); ``taps`` (n or 1, K, D, ceil(h / period))."""
        self._add_up(self.forward, self.written[0], x, taps, dim, out, backward=False)

    def apply_adjoint(self, z: Tensor, taps: Tensor, *, dim: int, out: Tensor) -> None:
        """``out = A^T z``, as :meth:`apply`."""
        self._add_up(self.backward, self.written[1], z, taps, dim, out, backward=True)

    def _add_up(
        self, order: Sequence[int], written: int, x: Tensor, taps: Tensor, dim: int, out: Tensor, *, backward: bool
    ) -> None:
        maps, faces = (x, out) if backward else (out, x)
        for turn, number in enumerate(order):
            row, column, first, last = self.diagonals[number]
            along_maps = _every(maps, dim, self.period * first + row, self.period, last - first)
            along_faces = _every(faces, dim, self.stride * first + column, self.stride, last - first)
            weights = taps[:, :, number, first:last].reshape(
                len(taps), 1, taps.shape[1], *((-1, 1) if dim == 3 else (1, -1))
            )
            source, target = (along_maps, along_faces) if backward else (along_faces, along_maps)
            if turn < written:
                torch.mul(source, weights, out=target)
            else:
                target.addcmul_(source, weights)


def _every(x: Tensor, dim: int, start: int, step: int, count: int) -> Tensor:
    """``count`` slices of ``x`` along ``dim`` from ``start``, ``step`` apart: a view."""
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, start + step * (count - 1) + 1, step)
    return x[tuple(index)]


@lru_cache(maxsize=16)
def _band(size: int, upsampling: int, dtype: torch.dtype, device: torch.device) -> _Band:
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        factors = axis_factors(size, upsampling)
        height, common = factors.shape[1], math.gcd(BLOCK, upsampling)
        period, stride = upsampling // common, BLOCK // common
        slots = -(-height // period)
        # The pixel at which each phase starts; what lies before the next one's start belongs to it.
        starts = [row * BLOCK // upsampling for row in range(period + 1)]
        diagonals: list[_Diagonal] = []
        taps: list[Tensor] = []
        ways: list[tuple[int, int, bool]] = []  # number, pixels from the start of the phase, belongs to the phase
        for row, column in itertools.product(range(period), range(-BLOCK, 2 * BLOCK)):
            q = torch.arange(slots)
            i, j = period * q + row, stride * q + column
            inside = ((i < height) & (j >= 0) & (j < size)).nonzero().flatten()
            if not len(inside):
                continue
            values = factors.new_zeros(BLOCK, slots)
            values[:, inside] = factors[:, i[inside], j[inside]]
            own = starts[row] <= column < starts[row + 1]
            if own or bool(values.any()):
                ways.append((len(diagonals), column - starts[row], own))
                diagonals.append(_Diagonal(row, column, int(inside[0]), int(inside[-1]) + 1))
                taps.append(values)
        # Near diagonals first; of two that are equally near A x takes the left one first, A^T z the right one.
        forward = sorted(ways, key=lambda way: (way[1] != 0, abs(way[1]), way[1]))
        backward = sorted(ways, key=lambda way: (not way[2], abs(way[1]), -way[1]))
        return _Band(
            size=size,
            period=period,
            stride=stride,
            diagonals=tuple(diagonals),
            taps=torch.stack(taps, dim=1).to(device=device, dtype=dtype),
            forward=tuple(way[0] for way in forward),
            backward=tuple(way[0] for way in backward),
            written=(sum(way[1] == 0 for way in ways), sum(way[2] for way in ways)),
        )


def _rows(channels: Tensor) -> Tensor:
    """The channels of each face (n or 1, K)."""
    return channels if channels.ndim == 2 else channels[None]


def _taps_of(rows: Tensor, band: _Band) -> tuple[Tensor, Tensor]:
    """The vertical and horizontal taps (n or 1, K, D, slots) of channels (n or 1, K)."""
    on_device = rows.to(band.taps.device)
    return band.taps[on_device // BLOCK], band.taps[on_device % BLOCK]


def _apply_colour(x: Tensor, matrix: list[list[float]], out: Tensor) -> None:
    """``out[:, c] = sum_k matrix[c][k] x[:, k]``, element-wise so that no reduced-precision GEMM is chosen."""
    for c, (first, *rest) in enumerate(matrix):
        torch.mul(x[:, 0], first, out=out[:, c])
        for k, weight in enumerate(rest, start=1):
            out[:, c].add_(x[:, k], alpha=weight)


def _chunks(count: int, maps: int, size: int, device: torch.device) -> list[slice]:
    """How to cut a batch of ``count`` faces with ``maps`` maps each."""
    step = max(1, _CPU_CHUNK_ELEMENTS // (maps * size * size)) if device.type == "cpu" else max(1, count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _runs(channels: Tensor) -> list[slice]:
    """Where in (K,) neighbours have one vertical frequency."""
    starts = [0, *((channels // BLOCK).diff().nonzero().flatten() + 1).tolist(), len(channels)]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def _fused(faces: Tensor, rows: Tensor, band: _Band, with_offset: bool) -> Tensor | None:
    """What :func:`_forward` gives, by one kernel; None where there is none for these faces or this machine."""
    if faces.device.type not in _fused_on or faces.dtype != torch.float32 or not band.tridiagonal:
        return None
    try:
        from defenses.fused import fused_block_dct

        return fused_block_dct(faces, rows, band.taps, with_offset)
    except Exception as error:  # Triton, a compiler or a driver may raise anything
        if memory_is_full(error):
            raise
        _fused_on.clear()
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logging.getLogger("bench").warning("bench: the block DCT takes some 30 times as long without a kernel: %s", why)
        return None


def _forward(faces: Tensor, channels: Tensor, band: _Band, height: int, with_offset: bool) -> Tensor:
    rows = _rows(channels)
    if (fused := _fused(faces, rows, band, with_offset)) is not None:
        return fused
    count, _, size, _ = faces.shape
    vertical, horizontal = _taps_of(rows, band)
    length = rows.shape[1]
    planes = faces.new_empty(faces.shape)
    _apply_colour(faces, colour_matrix().tolist(), planes)
    out = faces.new_empty(count, COLOURS, length, height, height)
    runs = _runs(rows[0]) if len(rows) == 1 else []
    # Neighbours of one vertical frequency, as in a whole spectrum, share the vertical pass: half the work, in eight
    # times as many operations, whose launches would take longer than the work on few faces of an accelerator.
    shared = 0 < 2 * len(runs) <= length and (faces.device.type == "cpu" or count >= _LEAST_SHARED)
    maps = COLOURS * (max(run.stop - run.start for run in runs) if shared else length)
    chunks = _chunks(count, maps, size, faces.device)
    scratch = faces.new_empty(chunks[0].stop if chunks else 0, COLOURS, 1 if shared else length, height, size)
    for chunk in chunks:
        mine = chunk if len(rows) > 1 else slice(None)
        half = scratch[: chunk.stop - chunk.start]
        if shared:
            for run in runs:
                band.apply(planes[chunk, :, None], vertical[:, run][:, :1], dim=3, out=half)
                band.apply(half, horizontal[:, run], dim=4, out=out[chunk][:, :, run])
        else:
            band.apply(planes[chunk, :, None], vertical[mine], dim=3, out=half)
            band.apply(half, horizontal[mine], dim=4, out=out[chunk])
    if with_offset:
        is_dc = rows == 0
        for column in is_dc.any(0).nonzero().flatten().tolist():
            shift = is_dc[:, column].to(device=faces.device, dtype=faces.dtype) * LUMA_DC_OFFSET
            out[:, 0, column].add_(shift[:, None, None])
    return out.flatten(1, 2)


def _adjoint(representation: Tensor, channels: Tensor, band: _Band) -> Tensor:
    """``M^T sum_k A_u^T z_k A_v``: (N, 3K, h, h) to RGB planes (N, 3, H, H)."""
    count, _, height, _ = representation.shape
    size = band.size
    rows = _rows(channels)
    vertical, horizontal = _taps_of(rows, band)
    z = representation.reshape(count, COLOURS, rows.shape[1], height, height)
    planes = z.new_empty(count, COLOURS, size, size)
    for chunk in _chunks(count, COLOURS * rows.shape[1], size, z.device):
        mine = chunk if len(rows) > 1 else slice(None)
        part = z[chunk]
        half = z.new_empty(*part.shape[:4], size)
        band.apply_adjoint(part, horizontal[mine], dim=4, out=half)
        whole = z.new_empty(*part.shape[:3], size, size)
        band.apply_adjoint(half, vertical[mine], dim=3, out=whole)
        torch.sum(whole, 2, out=planes[chunk])
    out = torch.empty_like(planes)
    _apply_colour(planes, colour_matrix().T.tolist(), out)
    return out


class _Transform(torch.autograd.Function):
    """The transform or, where ``adjoint`` is set, its adjoint: the gradient of either is the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channels: Tensor, adjoint: bool, with_offset: bool, size: int, upsampling: int
    ) -> Tensor:
        ctx.channels, ctx.adjoint, ctx.kind = channels, adjoint, (size, upsampling)
        band = _band(size, upsampling, x.dtype, x.device)
        if adjoint:
            return _adjoint(x, channels, band)
        return _forward(x, channels, band, map_size(size, upsampling), with_offset)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None, None]:
        return _Transform.apply(grads[0], ctx.channels, not ctx.adjoint, False, *ctx.kind), None, None, None, None, None


# -- the public functions ------------------------------------------------------------------------


def _checked_channels(channels: Tensor, count: int) -> Tensor:
    """``channels`` as int64 on the CPU, where the kernels plan their work."""
    if channels.dtype != torch.int64 or channels.ndim not in (1, 2) or channels.shape[-1] == 0:
        raise ValueError(f"channels must be int64 (K,) or (N, K), got {channels.dtype} {tuple(channels.shape)}")
    if channels.ndim == 2 and len(channels) != count:
        raise ValueError(f"got channels for {len(channels)} faces, but {count} faces")
    channels = channels.detach().cpu()
    if not channels.numel():
        return channels
    least, largest = map(int, channels.aminmax())
    if not 0 <= least <= largest < CHANNELS:
        raise ValueError(f"channels must lie in 0..{CHANNELS - 1}, got {least}..{largest}")
    if channels.ndim == 2 and bool((channels == channels[0]).all()):
        return channels[0]  # one list for all: one set of taps
    return channels


def _checked_images(images: Tensor, colours: int, what: str, least: int = 2) -> Tensor:
    if images.ndim != 4 or images.shape[1] != colours or images.shape[2] != images.shape[3] or images.shape[3] < least:
        raise ValueError(f"expected {what} (N, {colours}, H, H), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"expected float {what}, got {images.dtype}")
    return images if images.dtype in (torch.float32, torch.float64) else images.to(torch.float32)


def block_dct(
    faces: Tensor,
    channels: Tensor,
    *,
    with_offset: bool = True,
    upsampling: int = UPSAMPLING,
    known: bool = False,
) -> Tensor:
    """Requested block-DCT channels of the up-sampled faces, differentiable (twice and more) in ``faces``.

    Faces are float (N, 3, H, H), RGB in [0, 1]; half types are computed in float32. ``channels`` are int64 indices
    8u + v in 0..63 in output order: (K,) for the whole batch, or (N, K), a list of its own for every face (a subset and
    its permutation in one). Without ``with_offset``, the level shift of -128, the map is linear, not affine.
    ``upsampling`` is the factor, 1..8. Channels on a GPU that are ``known`` to be such indices are not waited for.

    Returns:
        (N, 3K, h, h) with h = ceil(upsampling H / 8), which is H at the published factor of 8; colour-major (K of Y, K
        of Cb, K of Cr), un-normalised: -1024..1016 in channel 0. Bilinear up-sampling is smooth: at 8 every other
        channel is at most +-576, and +-78 where u + v > 3; without it (factor 1) they reach +-1020. float32, or
        float64 for float64 faces.

    Raises:
        ValueError: wrong shape or type, a channel outside 0..63, or a factor outside 1..8.
    """
    faces = _checked_images(faces, COLOURS, "faces")
    if not (known and channels.is_cuda):
        channels = _checked_channels(channels, len(faces))
    result: Tensor = _Transform.apply(faces, channels, False, with_offset, faces.shape[-1], upsampling)
    return result


def block_dct_adjoint(
    representation: Tensor, channels: Tensor, *, upsampling: int = UPSAMPLING, size: int | None = None
) -> Tensor:
    """Adjoint of the linear part of :func:`block_dct`: <A x, z> = <x, A^T z>; (N, 3K, h, h) to RGB (N, 3, H, H).

    H is ``size`` or, by default, that of which h are whole blocks: 8 h / upsampling.

    Raises:
        ValueError: wrong shape or type, a channel outside 0..63, a factor outside 1..8, or an H whose maps have another
            size than h.
    """
    channels = _checked_channels(channels, len(representation))
    representation = _checked_images(representation, COLOURS * channels.shape[-1], "a representation", least=1)
    height = representation.shape[-1]
    size = BLOCK * height // max(1, upsampling) if size is None else size
    if map_size(size, upsampling) != height:
        raise ValueError(f"faces of {size} pixels have no maps of {height} at an up-sampling factor of {upsampling}")
    result: Tensor = _Transform.apply(representation, channels, True, False, size, upsampling)
    return result


@lru_cache(maxsize=8)
def _fields(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of each channel in each decoded pixel, (64, ``size``, ``size``)."""
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        factors = phase_factors(size)
        fields = factors[:, None, :, None] * factors[None, :, None, :]
        return fields.flatten(0, 1).to(device=device, dtype=dtype)


def _mixed(planes: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """Colours (N, 3, H, W) mixed, element-wise so that no reduced-precision GEMM is chosen; differentiable."""
    return torch.stack(
        [sum((w * planes[:, k] for k, w in enumerate(row)), start=planes.new_zeros(())) for row in matrix], 1
    )


def inverse_block_dct(spectrum: Tensor) -> Tensor:
    """Pixels of all 64 channels of each colour, as the decoder of the frequency-domain defences makes them.

    Inverse DCT, 128 added to all three colours, RGB, and bilinear down-sampling by 8 with aligned corners. It is the
    inverse of :func:`block_dct` but for what interpolating twice smooths away: .007 to .013 on pictures of 112 pixels.

    Args:
        spectrum: float (N, 192, H, H), colour-major, un-normalised, as :func:`block_dct` makes it or in any other order
            of channels; half types are computed in float32.

    Returns:
        (N, 3, H, H), RGB, in [0, 1] for spectra of faces and not clamped. float32, or float64 for float64 spectra.

    Raises:
        ValueError: wrong shape or type.
    """
    spectrum = _checked_images(spectrum, COLOURS * CHANNELS, "a spectrum")
    fields = _fields(spectrum.shape[-1], spectrum.dtype, spectrum.device)
    planes = (spectrum.unflatten(1, (COLOURS, CHANNELS)) * fields).sum(2)
    return (_mixed(planes, RGB) + 128) / 255


def inverse_block_dct_adjoint(pictures: Tensor) -> Tensor:
    """Adjoint of the linear part of :func:`inverse_block_dct`: RGB (N, 3, H, H) to (N, 192, H, H).

    Raises:
        ValueError: wrong shape or type.
    """
    pictures = _checked_images(pictures, COLOURS, "pictures")
    planes = _mixed(pictures, list(zip(*RGB, strict=True))) / 255
    return (planes[:, :, None] * _fields(pictures.shape[-1], pictures.dtype, pictures.device)).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class FrequencyOperator:
    """The transform of one channel list, int64 (K,) in output order, for faces of ``size`` pixels a side that are
    up-sampled by a factor of 1..8; a :class:`~defenses.base.SeparableSum`.
    """

    size: int
    channels: Tensor
    upsampling: int = field(default=UPSAMPLING, kw_only=True)

    def __post_init__(self) -> None:
        if self.channels.ndim != 1:
            raise ValueError(f"one operator has one channel list (K,), got {tuple(self.channels.shape)}")
        _checked_channels(self.channels, 1)

    @property
    def offset(self) -> Tensor:
        """The representation of the black face, float64 (3K, 1, 1) on the CPU."""
        return dc_offset(self.channels)[:, None, None]

    @property
    def row_factors(self) -> Tensor:
        """A_u of each channel, float64 (K, h, H): z_k = row_factors[k] X column_factors[k]^T."""
        return axis_factors(self.size, self.upsampling)[self.channels.cpu() // BLOCK]

    @property
    def column_factors(self) -> Tensor:
        """A_v of each channel, float64 (K, h, H)."""
        return axis_factors(self.size, self.upsampling)[self.channels.cpu() % BLOCK]

    @property
    def colour(self) -> Tensor:
        """RGB in [0, 1] to the colour planes X, float64 (3, 3)."""
        return colour_matrix()

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, 3K, h, h), without the offset."""
        if faces.shape[-1] != self.size:
            raise ValueError(f"this operator is for faces of {self.size} pixels, got {tuple(faces.shape)}")
        return block_dct(faces, self.channels, with_offset=False, upsampling=self.upsampling)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, 3K, h, h) to (N, 3, H, H)."""
        return block_dct_adjoint(representation, self.channels, upsampling=self.upsampling, size=self.size)


@dataclass(frozen=True, eq=False)
class SpectrumOperator:
    """``scale`` times any of the 192 channels 64 colour + 8u + v, int64 (C,) in output order, of no DC's offset.

    A :class:`~defenses.base.LinearOperator`, for lists that differ from colour to colour or name a channel twice.

    Raises:
        ValueError: a channel outside 0..191, or the DC of luma, whose map is affine.
    """

    size: int
    channels: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        channels = self.channels
        if channels.dtype != torch.int64 or channels.ndim != 1 or not len(channels):
            raise ValueError(f"channels must be int64 (C,), got {channels.dtype} {tuple(channels.shape)}")
        if int(channels.min()) < 1 or int(channels.max()) >= COLOURS * CHANNELS:
            raise ValueError(f"channels must lie in 1..{COLOURS * CHANNELS - 1}")

    @property
    def offset(self) -> Tensor:
        """Zero, float64 (1, 1, 1): without the DC of luma the map is linear."""
        return torch.zeros(1, 1, 1, dtype=torch.float64)

    def _places(self) -> tuple[Tensor, Tensor]:
        """The frequencies of all colours together, int64 (K,), and where each channel is among 3K, int64 (C,)."""
        frequencies, place = torch.unique(self.channels % CHANNELS, return_inverse=True)
        return frequencies, self.channels // CHANNELS * len(frequencies) + place

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, C, H, H), dtype and device kept."""
        frequencies, places = self._places()
        maps = block_dct(faces, frequencies, with_offset=False)
        return self.scale * maps.index_select(1, places.to(maps.device))

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, C, H, H) to (N, 3, H, H)."""
        frequencies, places = self._places()
        shape = (len(representation), COLOURS * len(frequencies), *representation.shape[2:])
        maps = representation.new_zeros(shape).index_add(1, places.to(representation.device), representation)
        return self.scale * block_dct_adjoint(maps, frequencies)


def frequencies_of(operator: object) -> Tensor | None:
    """Which frequency each map of an operator is: int64 (C,), 64 colour + 8u + v; None where its maps are no such."""
    if isinstance(operator, SpectrumOperator):
        return operator.channels
    if isinstance(operator, FrequencyOperator):
        colours = torch.arange(COLOURS, device=operator.channels.device)
        return (CHANNELS * colours[:, None] + operator.channels).flatten()
    return None
