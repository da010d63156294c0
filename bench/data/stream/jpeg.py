"""Encoded images to one uint8 batch: plain JPEGs of the right size straight into libjpeg-turbo, others the long way.

A face pack holds JPEGs that already have the size wanted, upright and in YCbCr. For these, what Pillow does around
the decoder (sniffing formats, parsing headers, EXIF, conversion, copies) takes half of the time. Whether an
image is of this kind is read off its header, so that everything else, and everything suspicious, goes the way that
:mod:`bench.data.decode` lays down, with its limits and its messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, ImageError, Limits, decode_image

#: Baseline, extended and progressive Huffman frames.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
#: Segments that change how the pixels are to be read: Exif (orientation), Adobe (colour transform).
_SPECIAL = frozenset({0xE1, 0xEE})
_RGB = 3  # torchvision.io.ImageReadMode.RGB


def _native_decoder() -> Callable[[Tensor, int, bool], Tensor] | None:
    """libjpeg-turbo as torchvision binds it, or None where it does not (any longer: deprecated since 0.29)."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        import torchvision.io  # noqa: F401 - registers the operator

        # The operator itself: the function around it costs a tenth of the decoding and warns at each call.
        decoder: Callable[[Tensor, int, bool], Tensor] = torch.ops.image.decode_jpeg.default
        return decoder
    return None


_decode_native = _native_decoder()


def is_plain_jpeg(data: memoryview | bytes, size: int) -> bool:
    """Whether this is an 8-bit JPEG of ``size`` x ``size`` pixels in three colours, with nothing special about it.

    Only the header is walked: markers of two bytes, each followed by a segment that begins with its length.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return height == width == size and data[at + 4] == 8 and data[at + 9] == 3
        if marker in _SPECIAL:
            return False
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def decode_batch(
    encoded: list[Tensor], size: int, limits: Limits = DEFAULT_LIMITS, *, crop: float = 1.0, exact: bool = False
) -> tuple[Tensor, dict[int, str]]:
    """Decode images on the calling thread; the interpreter lock is free during most of it.

    Args:
        encoded: N tensors uint8 (bytes,), on the CPU.
        size: S, in pixels; images of another size are cropped and resized as :func:`bench.data.decode.decode_image`
            does.
        limits: what one image may cost.
        crop: side of the central square that is kept, as a share of the shorter side.
        exact: whether every image goes the long way. Two builds of libjpeg may round differently: pixels that are
            compared with those of a set in memory must come from the same one.

    Returns:
        uint8 (N, 3, S, S), and why images could not be decoded, by their number; those are left black.
    """
    images = torch.empty(len(encoded), 3, size, size, dtype=torch.uint8)
    target, failed = images.numpy(), {}
    native = None if exact or crop != 1 else _decode_native
    for i, data in enumerate(encoded):
        view = data.numpy().data
        if native is not None and len(view) <= limits.max_bytes and is_plain_jpeg(view, size):
            # What this cannot decode goes the long way, which says why, or makes do with it as everywhere else.
            with contextlib.suppress(RuntimeError):
                target[i] = native(data, _RGB, False).numpy()
                continue
        try:
            images[i] = decode_image(bytes(view), size, crop=crop, limits=limits)
        except ImageError as error:
            images[i], failed[i] = 0, str(error)
    return images, failed
