"""The block DCT at the published factor as one kernel for a GPU, which reads each face and writes each map once.

Plain operations (:mod:`defenses.frequency`) pass over memory once for each multiply-add, and take 30 to 40 times as
long as writing the result. Here a program makes all maps of a tile of pixels out of their 3 x 3 neighbours, whose
colours it converts once and keeps in registers, and of taps, which caches hold. In Triton (Tillet et al., MAPL 2019),
which torch's builds for CUDA bring along, and which needs a C compiler on the machine.
"""
# No annotations from __future__ here: Triton's interpreter does not know the name of tl.constexpr from its letters.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from defenses.frequency import COLOURS, LUMA_DC_OFFSET, colour_matrix

# Of the tiles (pixels) and warps that were tried on an H200 the best at 56 to 112 pixels and 27 to 192 maps.
_TILE, _WARPS = 256, 4


@triton.jit
def _three(at, step, inside):
    """What stands at ``at``, one and two steps further on; 0 outside."""
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + step, mask=inside, other=0.0)
    return first, second, tl.load(at + 2 * step, mask=inside, other=0.0)


@triton.jit
def _mixed(at, plane, matrix, inside):
    """Y, Cb and Cr of the RGB pixels at ``at`` in planes of so many pixels; 0 outside."""
    r, g, b = _three(at, plane, inside)
    y = tl.load(matrix) * r + tl.load(matrix + 1) * g + tl.load(matrix + 2) * b
    u = tl.load(matrix + 3) * r + tl.load(matrix + 4) * g + tl.load(matrix + 5) * b
    v = tl.load(matrix + 6) * r + tl.load(matrix + 7) * g + tl.load(matrix + 8) * b
    return y, u, v


@triton.jit
def _weighted(x00, x01, x02, x10, x11, x12, x20, x21, x22, a0, a1, a2, b0, b1, b2):
    """``a x b``, with the vertical taps a and the horizontal ones b."""
    x0, x1, x2 = a0 * x00 + a1 * x10 + a2 * x20, a0 * x01 + a1 * x11 + a2 * x21, a0 * x02 + a1 * x12 + a2 * x22
    return x0 * b0 + x1 * b1 + x2 * b2


@triton.jit(do_not_specialize=["K", "own"])
def _kernel(faces, matrix, taps, channels, out, K, own, H: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr):
    """All maps of a tile of a face.

    ``faces`` (N, 3, H, H), ``matrix`` (3, 3), ``taps`` (8, 3, H), ``out`` (N, 3, K, H, H); ``channels`` whole numbers
    (K,), of which ``own`` is 0, or (N, K), of which it is K. ``OFFSET`` is added to channel 0 of luma.
    """
    tiles: tl.constexpr = (H * H + TILE - 1) // TILE
    plane = tl.cast(H * H, tl.int64)  # a batch has more pixels than 32 bits count
    face = tl.program_id(0) // tiles
    pixel = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    row, column = pixel // H, pixel % H
    at, target = faces + 3 * plane * face + pixel, out + 3 * K * plane * face + pixel

    inside = pixel < H * H
    up, down, left, right = inside & (row > 0), inside & (row < H - 1), column > 0, column < H - 1
    y00, u00, v00 = _mixed(at - H - 1, plane, matrix, up & left)
    y01, u01, v01 = _mixed(at - H, plane, matrix, up)
    y02, u02, v02 = _mixed(at - H + 1, plane, matrix, up & right)
    y10, u10, v10 = _mixed(at - 1, plane, matrix, inside & left)
    y11, u11, v11 = _mixed(at, plane, matrix, inside)
    y12, u12, v12 = _mixed(at + 1, plane, matrix, inside & right)
    y20, u20, v20 = _mixed(at + H - 1, plane, matrix, down & left)
    y21, u21, v21 = _mixed(at + H, plane, matrix, down)
    y22, u22, v22 = _mixed(at + H + 1, plane, matrix, down & right)

    for k in range(K):
        channel = tl.load(channels + own * face + k).to(tl.int32)
        a0, a1, a2 = _three(taps + channel // 8 * (3 * H) + row, H, inside)
        b0, b1, b2 = _three(taps + channel % 8 * (3 * H) + column, H, inside)
        y = _weighted(y00, y01, y02, y10, y11, y12, y20, y21, y22, a0, a1, a2, b0, b1, b2)
        u = _weighted(u00, u01, u02, u10, u11, u12, u20, u21, u22, a0, a1, a2, b0, b1, b2)
        v = _weighted(v00, v01, v02, v10, v11, v12, v20, v21, v22, a0, a1, a2, b0, b1, b2)
        tl.store(target + k * plane, y + tl.where(channel == 0, OFFSET, 0.0), mask=inside)
        tl.store(target + (K + k) * plane, u, mask=inside)
        tl.store(target + (2 * K + k) * plane, v, mask=inside)


@lru_cache(maxsize=16)
def _matrix(device: torch.device) -> Tensor:
    return colour_matrix().to(device=device, dtype=torch.float32)


def _on(device: torch.device, channels: Tensor) -> Tensor:
    """They are bytes where they have to be brought there."""
    return channels if channels.device == device else channels.to(torch.uint8).to(device, non_blocking=True)


def fused_block_dct(faces: Tensor, channels: Tensor, taps: Tensor, with_offset: bool) -> Tensor:
    """(N, 3K, H, H) of ``faces`` (N, 3, H, H), float32 on a CUDA device.

    Args:
        faces: RGB in [0, 1].
        channels: int64 (1, K) for all faces or (N, K), 0..63.
        taps: float32 (8, 3, H), on the device of the faces: the diagonals -1, 0 and 1 of A_0..A_7, by row.
        with_offset: whether to add the level shift.

    Raises:
        Exception: what Triton, the compiler or the driver say.
    """
    count, _, size, _ = faces.shape
    length = channels.shape[1]
    out = faces.new_empty(count, COLOURS * length, size, size)
    if count:
        with torch.cuda.device_of(faces):
            _kernel[(count * triton.cdiv(size * size, _TILE),)](
                faces.contiguous(),
                _matrix(faces.device),
                taps,
                _on(faces.device, channels).contiguous(),
                out,
                length,
                length if len(channels) > 1 else 0,
                H=size,
                OFFSET=LUMA_DC_OFFSET if with_offset else 0.0,
                TILE=_TILE,
                num_warps=_WARPS,
                enable_fp_fusion=True,  # multiplies and adds at once, also where later versions do not by default
            )
    return out
