"""Block DCT of the x8 up-sampled face, without the up-sampled face.

The frequency-domain defences (PartialFace and its kin; Mi et al., ICCV 2023, section 3) up-sample an RGB
face x8 (bilinear, ``align_corners=True``), convert it to JFIF YCbCr minus 128 and take the orthonormal 8x8
block DCT-II, so that every source pixel owns one block and coefficient (u, v) of all blocks forms a map of
the size of the face, channel 8u + v.

Up-sampling and DCT are both linear and separable, hence for one colour plane X (H x H)

    z_uv = A_u X A_v^T,    A_u = (row u of D8 in every block) U8,    A_u: (H, H),

with U8 (8H x H) the interpolation matrix and D8 the DCT matrix. Block i covers the source positions
i - 7i/(8H-1) .. i - 7i/(8H-1) + 7(H-1)/(8H-1), which lie between pixels i-1 and i+1: **every A_u is
tridiagonal**. A channel is therefore six fused multiply-adds a pixel (three vertical, three horizontal taps), in
plain element-wise operations that keep full precision under autocast and TF32 and let every face of a batch have
channels of its own.

The way back (inverse DCT, then bilinear down-sampling with aligned corners) is pointwise: output pixel i of H lies at
8i + 7i/(H-1) of the 8H, so it reads block i alone, at a phase that grows from 0 to 7 over the picture. A pixel is
hence a sum of the coefficients of its own block, weighted by fields that are smooth, and the same for every face.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 8
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

# Output elements worked on at once on a CPU: scratch and output of a chunk share the last-level cache, while each
# operation stays large enough for threads to be worth their synchronisation.
_CPU_CHUNK_ELEMENTS = 5_500_000


def dct_matrix() -> Tensor:
    """Orthonormal DCT-II of length 8, float64 (8, 8): row u is the basis vector of frequency u."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / BLOCK * (k + 0.5) * k[:, None]) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


def upsampling_matrix(size: int) -> Tensor:
    """Bilinear x8 interpolation with aligned corners along one axis, float64 (8 ``size``, ``size``)."""
    rows = torch.arange(BLOCK * size)
    position = rows.to(torch.float64) * (size - 1) / (BLOCK * size - 1)
    left = position.floor().long().clamp(max=size - 2)
    weight = position - left
    matrix = torch.zeros(BLOCK * size, size, dtype=torch.float64)
    matrix[rows, left] = 1 - weight
    matrix[rows, left + 1] = weight
    return matrix


def axis_factors(size: int) -> Tensor:
    """The tridiagonal matrices A_0..A_7 of one axis, float64 (8, ``size``, ``size``), for pixels in [0, 255].

    Raises:
        ValueError: ``size`` is below 2.
    """
    if size < 2:
        raise ValueError(f"the frequency transform needs faces of at least 2 pixels, got {size}")
    blocks = upsampling_matrix(size).view(size, BLOCK, size)
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


@lru_cache(maxsize=16)
def _taps(size: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sub-, main and super-diagonal of A_u (or A_u^T): (8, 3, ``size``), indexed by the output position."""
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        factors = axis_factors(size)
        if transposed:
            factors = factors.mT
        taps = torch.zeros(BLOCK, 3, size, dtype=torch.float64)
        taps[:, 0, 1:] = factors.diagonal(-1, 1, 2)
        taps[:, 1] = factors.diagonal(0, 1, 2)
        taps[:, 2, :-1] = factors.diagonal(1, 1, 2)
        return taps.to(device=device, dtype=dtype)


def _taps_of(channels: Tensor, size: int, transposed: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The channels of each face (n or 1, K), and their vertical and horizontal taps (n or 1, K, 3, size)."""
    rows = channels if channels.ndim == 2 else channels[None]
    on_device, taps = rows.to(like.device), _taps(size, transposed, like.dtype, like.device)
    return rows, taps[on_device // BLOCK], taps[on_device % BLOCK]


def _apply_taps(x: Tensor, taps: Tensor, *, dim: int, out: Tensor) -> None:
    """``out = A x`` along ``dim`` (3 or 4) of (n, 3, K or 1, H, W); ``taps`` is (n or 1, K, 3, size)."""
    shape = (len(taps), 1, taps.shape[1], *((-1, 1) if dim == 3 else (1, -1)))
    lower, main, upper = (taps[:, :, k].reshape(shape) for k in range(3))
    torch.mul(x, main, out=out)
    inner = x.shape[dim] - 1
    out.narrow(dim, 1, inner).addcmul_(x.narrow(dim, 0, inner), lower.narrow(dim, 1, inner))
    out.narrow(dim, 0, inner).addcmul_(x.narrow(dim, 1, inner), upper.narrow(dim, 0, inner))


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


def _forward(faces: Tensor, channels: Tensor, with_offset: bool) -> Tensor:
    count, _, size, _ = faces.shape
    rows, vertical, horizontal = _taps_of(channels, size, False, faces)
    length = rows.shape[1]
    planes = faces.new_empty(faces.shape)
    _apply_colour(faces, colour_matrix().tolist(), planes)
    out = faces.new_empty(count, COLOURS, length, size, size)
    chunks = _chunks(count, COLOURS * length, size, faces.device)
    scratch = torch.empty_like(out[chunks[0]]) if chunks else out
    for chunk in chunks:
        mine = chunk if len(rows) > 1 else slice(None)
        half = scratch[: chunk.stop - chunk.start]
        _apply_taps(planes[chunk, :, None], vertical[mine], dim=3, out=half)
        _apply_taps(half, horizontal[mine], dim=4, out=out[chunk])
    if with_offset:
        is_dc = rows == 0
        for column in is_dc.any(0).nonzero().flatten().tolist():
            shift = is_dc[:, column].to(device=faces.device, dtype=faces.dtype) * LUMA_DC_OFFSET
            out[:, 0, column].add_(shift[:, None, None])
    return out.flatten(1, 2)


def _adjoint(representation: Tensor, channels: Tensor) -> Tensor:
    """``M^T sum_k A_u^T z_k A_v``: (N, 3K, H, W) to RGB planes (N, 3, H, W)."""
    count, _, size, _ = representation.shape
    rows, vertical, horizontal = _taps_of(channels, size, True, representation)
    z = representation.reshape(count, COLOURS, rows.shape[1], size, size)
    planes = z.new_empty(count, COLOURS, size, size)
    for chunk in _chunks(count, COLOURS * rows.shape[1], size, z.device):
        mine = chunk if len(rows) > 1 else slice(None)
        half, whole = torch.empty_like(z[chunk]), torch.empty_like(z[chunk])
        _apply_taps(z[chunk], horizontal[mine], dim=4, out=half)
        _apply_taps(half, vertical[mine], dim=3, out=whole)
        torch.sum(whole, 2, out=planes[chunk])
    out = torch.empty_like(planes)
    _apply_colour(planes, colour_matrix().T.tolist(), out)
    return out


class _Transform(torch.autograd.Function):
    """The transform or, where ``adjoint`` is set, its adjoint: the gradient of either is the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: Tensor, adjoint: bool, with_offset: bool) -> Tensor:
        ctx.channels, ctx.adjoint = channels, adjoint
        return _adjoint(x, channels) if adjoint else _forward(x, channels, with_offset)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _Transform.apply(grads[0], ctx.channels, not ctx.adjoint, False), None, None, None


# -- the public functions ------------------------------------------------------------------------


def _checked_channels(channels: Tensor, count: int) -> Tensor:
    """``channels`` as int64 on the CPU, where the kernels plan their work."""
    if channels.dtype != torch.int64 or channels.ndim not in (1, 2) or channels.shape[-1] == 0:
        raise ValueError(f"channels must be int64 (K,) or (N, K), got {channels.dtype} {tuple(channels.shape)}")
    if channels.ndim == 2 and len(channels) != count:
        raise ValueError(f"got channels for {len(channels)} faces, but {count} faces")
    channels = channels.detach().cpu()
    if channels.numel() and not 0 <= int(channels.min()) <= int(channels.max()) < CHANNELS:
        raise ValueError(f"channels must lie in 0..{CHANNELS - 1}, got {int(channels.min())}..{int(channels.max())}")
    if channels.ndim == 2 and len(channels) and bool((channels == channels[0]).all()):
        return channels[0]  # one list for all: one set of taps
    return channels


def _checked_images(images: Tensor, colours: int, what: str) -> Tensor:
    if images.ndim != 4 or images.shape[1] != colours or images.shape[2] != images.shape[3] or images.shape[3] < 2:
        raise ValueError(f"expected {what} (N, {colours}, H, H), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"expected float {what}, got {images.dtype}")
    return images if images.dtype in (torch.float32, torch.float64) else images.to(torch.float32)


def block_dct(faces: Tensor, channels: Tensor, *, with_offset: bool = True) -> Tensor:
    """Requested block-DCT channels of the x8 up-sampled faces, differentiable (twice and more) in ``faces``.

    Faces are float (N, 3, H, H), RGB in [0, 1]; half types are computed in float32. ``channels`` are int64 indices
    8u + v in 0..63 in output order: (K,) for the whole batch, or (N, K), a list of its own for every face (a subset and
    its permutation in one). Without ``with_offset``, the level shift of -128, the map is linear, not affine.

    Returns:
        (N, 3K, H, H), colour-major (K of Y, K of Cb, K of Cr), un-normalised: -1024..1016 in channel 0, at
        most +-576 beyond it and +-78 in the channels u + v > 3 (bilinear up-sampling is smooth). float32, or
        float64 for float64 faces.

    Raises:
        ValueError: wrong shape or type, or a channel outside 0..63.
    """
    faces = _checked_images(faces, COLOURS, "faces")
    channels = _checked_channels(channels, len(faces))
    result: Tensor = _Transform.apply(faces, channels, False, with_offset)
    return result


def block_dct_adjoint(representation: Tensor, channels: Tensor) -> Tensor:
    """Adjoint of the linear part of :func:`block_dct`: <A x, z> = <x, A^T z>; (N, 3K, H, H) to RGB (N, 3, H, H).

    Raises:
        ValueError: wrong shape or type, or a channel outside 0..63.
    """
    channels = _checked_channels(channels, len(representation))
    representation = _checked_images(representation, COLOURS * channels.shape[-1], "a representation")
    result: Tensor = _Transform.apply(representation, channels, True, False)
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
    """The transform of one channel list, int64 (K,) in output order, for faces of ``size`` pixels a side; a
    :class:`~defenses.base.SeparableSum`.
    """

    size: int
    channels: Tensor

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
        """A_u of each channel, float64 (K, H, H): z_k = row_factors[k] X column_factors[k]^T."""
        return axis_factors(self.size)[self.channels.cpu() // BLOCK]

    @property
    def column_factors(self) -> Tensor:
        """A_v of each channel, float64 (K, H, H)."""
        return axis_factors(self.size)[self.channels.cpu() % BLOCK]

    @property
    def colour(self) -> Tensor:
        """RGB in [0, 1] to the colour planes X, float64 (3, 3)."""
        return colour_matrix()

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, 3K, H, H), without the offset."""
        self._check(faces)
        return block_dct(faces, self.channels, with_offset=False)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, 3K, H, H) to (N, 3, H, H)."""
        self._check(representation)
        return block_dct_adjoint(representation, self.channels)

    def _check(self, images: Tensor) -> None:
        if images.shape[-1] != self.size:
            raise ValueError(f"this operator is for faces of {self.size} pixels, got {tuple(images.shape)}")
