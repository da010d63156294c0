"""Encoded images to uint8 RGB faces: one at a time, or a whole set on a thread pool.

What is accepted: JPEG, PNG, BMP, WebP, TIFF, GIF and the portable maps of Netpbm, nothing else that Pillow could open.
What becomes of the modes: grey is repeated over RGB; palette is expanded; CMYK is converted without a colour profile;
16-bit grey is divided by 257, so that 65535 becomes 255 (16-bit colour PNGs keep their high byte); whatever is
transparent is composited on black. EXIF orientation is applied. Of an animation the first frame counts. Floating-point
pixels have no range of their own and are refused.

Images that are not square lose the ends of the longer side (central crop). Resizing is bilinear with
antialiasing: when shrinking, the triangle filter is as wide as the shrinking factor.

Pixel counts are checked on the header, before anything is decoded, so that a decompression bomb costs
nothing. Pillow releases the interpreter lock while it decodes and resizes, which is why threads suffice.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bench.errors import DataError, MissingError
from bench.errors import shown as shown
from bench.files import decode_text
from bench.progress import Report, no_report

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

#: File names that the layouts take for images, lower case.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"),
        *(".tif", ".tiff", ".gif", ".pgm", ".ppm", ".pbm", ".pnm"),
    }
)

#: How files begin that are found where others should be, what these are, and what to do.
_STRANGERS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself",
    b"<": "text such as a web page, saved in its place: download it again",
    b"PK\x03\x04": "a ZIP archive: unpack it first",
    b"\x1f\x8b": "compressed (gzip): unpack it first (gzip -dc)",
    b"BZh": "compressed (bzip2): unpack it first (bzip2 -dc)",
    b"\xfd7zXZ\0": "compressed (xz): unpack it first (xz -dc)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it first (zstd -dc)",
    b"\0\0\0\x0cjP  ": "JPEG 2000: convert it",
}

#: Below this an image holds no face worth the name.
MIN_SIDE = 8

#: Digits of the largest number that fits into 64 bits, whatever they are; Python refuses some thousands.
_MOST_DIGITS = 18

#: Images that a thread reads and decodes at once, on the way through a whole set.
AT_ONCE = 64

#: Batches that each reading thread or process may be ahead.
AHEAD = 4


class ImageError(DataError):
    """An image that is not decoded: damaged, of an unknown format, or beyond the limits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one encoded image may cost: its size, and the width times height that its header claims."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000


DEFAULT_LIMITS = Limits()

#: An encoded image, uint8 (bytes,), or why its bytes cannot be had.
Encoded = NDArray[np.uint8] | ImageError


def in_array(data: bytes) -> NDArray[np.uint8]:
    """An encoded image, uint8 (bytes,), that may be written to: torch warns of one that may not."""
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def whole_number(text: str) -> int | None:
    """What digits say, if these are some and no more than a file can need; else None."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def stranger(data: bytes) -> str | None:
    """What a file is, by its first bytes, if it is a common thing to be found in place of a face, a list or a pack."""
    if data[4:8] == b"ftyp":
        return "HEIC, AVIF or a film: convert it"
    return next((what for begin, what in _STRANGERS.items() if data.startswith(begin)), None)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in the suite's own errors what the system says of a file that is read.

    Raises:
        MissingError: there is no such file.
        DataError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{shown(error.filename or path)} does not exist") from error
    except OSError as error:
        raise DataError(f"{shown(error.filename or path)} cannot be read: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """A text file, in UTF-8 or, with a byte-order mark, UTF-16; the mark is left out.

    Raises:
        MissingError: there is no such file.
        DataError: it cannot be read, or is no text.
    """
    with readable(path):
        data = path.read_bytes()
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        what = stranger(data) or "save it as UTF-8"
        raise DataError(f"{shown(path)} is not UTF-8 text (byte {error.start}): {what}") from error


def read_image_file(path: Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it cannot be read, is no regular file, or is larger than the limit.
    """
    try:
        if not path.is_file():
            raise ImageError("not a regular file")
        if (size := path.stat().st_size) > limits.max_bytes:
            raise ImageError(f"{size} bytes, the limit is {limits.max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def open_image(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Parse the header only: format, size and mode are known, no pixel is decoded.

    Raises:
        ImageError: empty, beyond the limits, too small, or not one of :data:`FORMATS`.
    """
    if not data:
        raise ImageError("empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        what = "not a JPEG, PNG, BMP, WebP, TIFF, GIF or PNM image, or its header is damaged"
        raise ImageError(stranger(data) or what) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more pixels than the limit of {limits.max_pixels}") from error
    except Exception as error:  # header parsers raise whatever their arithmetic does: ValueError, struct.error, ...
        raise ImageError(f"damaged header: {shown(error)}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(f"{width}x{height} pixels, the limit is {limits.max_pixels}")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width}x{height} pixels, too small for a face")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels, of which nothing says how bright 1 is")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image).astype(np.int64)
        if values.max() > 65535:
            raise ImageError("grey of 32 bits, of which nothing says how bright 1 is")
        return Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, (0, 0, 0, 255)), colours).convert("RGB")
    return image.convert("RGB")


def _pixels(data: bytes, image_size: int | None, crop: float, limits: Limits) -> NDArray[np.uint8]:
    """uint8 (H, W, 3); square of side ``image_size`` where that is given."""
    image = open_image(data, limits)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies upright images, too
        image = _to_rgb(image)
        if image_size is not None:
            side = max(1.0, crop * min(image.size))
            if image.size != (image_size, image_size) or side != image_size:
                left, top = ((length - side) / 2 for length in image.size)
                box = (left, top, left + side, top + side)
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)
    except ImageError:
        raise
    except Exception as error:  # as in open_image: a damaged body surfaces as any of a dozen exception types
        raise ImageError(f"cannot be decoded: {shown(error)}") from error


def decode_image(
    data: bytes, image_size: int | None = None, *, crop: float = 1.0, limits: Limits = DEFAULT_LIMITS
) -> Tensor:
    """One image as uint8 (3, H, W), RGB in [0, 255].

    With an ``image_size``, in pixels, its central square is resized to that; ``crop`` is the side of the square as a
    share of the shorter side. Without one the image is kept as it is.

    Raises:
        ImageError: damaged, unknown format, or beyond the limits.
    """
    import torch  # here and below: whoever reads headers alone does without

    return torch.from_numpy(_pixels(data, image_size, crop, limits).transpose(2, 0, 1).copy())


@contextmanager
def own_limits() -> Iterator[None]:
    """Silence Pillow's warnings of large images, where :class:`Limits` decide, and of odd headers.

    What cannot be decoded is listed anyway.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def workers() -> int:
    """Threads worth starting: the cores this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def by_threads(work: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """``map(work, items)``, done ahead by threads; however many items there are, few are on their way at a time."""
    coming = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="bench-stream") as pool:
        waiting = deque(pool.submit(work, item) for item in itertools.islice(coming, AHEAD * workers))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in itertools.islice(coming, 1))
                yield done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # an interrupt does not do the rest first


#: Baseline, extended and progressive Huffman frames.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
#: Segments that change how the pixels are to be read: Exif (orientation), Adobe (colour transform).
_SPECIAL = frozenset({0xE1, 0xEE})
_RGB = 3  # torchvision.io.ImageReadMode.RGB


@functools.cache
def _native_decoder() -> Callable[[Tensor, int, bool], Tensor] | None:
    """libjpeg-turbo as torchvision binds it, or None where it does not (any longer: deprecated since 0.29).

    Looked for when the first image is decoded: torchvision takes as long to import as torch.
    """
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        import torch
        import torchvision.io  # noqa: F401 - registers the operator

        # The operator itself: the function around it costs a tenth of the decoding and warns at each call.
        decoder: Callable[[Tensor, int, bool], Tensor] = torch.ops.image.decode_jpeg.default
        return decoder
    return None


def plain_header(data: memoryview | bytes, size: int) -> bytes:
    """How an 8-bit JPEG of ``size`` x ``size`` pixels in three colours begins that is nothing special; else empty.

    Only the header is walked: markers of two bytes, each followed by a segment that begins with its length. Whatever
    begins with the same bytes is such a file, too.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return b""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            plain = height == width == size and data[at + 4] == 8 and data[at + 9] == 3
            return bytes(data[: at + 10]) if plain else b""
        if marker in _SPECIAL:
            return b""
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return b""


def decode_batch(
    encoded: Sequence[Encoded], size: int, limits: Limits = DEFAULT_LIMITS, *, crop: float = 1.0, exact: bool = False
) -> tuple[Tensor, dict[int, str]]:
    """Decode N images on the calling thread; the interpreter lock is free during most of it.

    Images of another size than ``size``, in pixels, are cropped and resized as :func:`decode_image` does. With
    ``exact`` every image goes the long way: two builds of libjpeg may round differently, and pixels that are compared
    with those of a set in memory must come from the same one.

    Returns:
        uint8 (N, 3, size, size), and why images could not be decoded, by their number; those are left black.
    """
    import torch

    images = torch.empty(len(encoded), 3, size, size, dtype=torch.uint8)
    target, failed = images.numpy(), {}
    native = None if exact or crop != 1 else _native_decoder()
    header = b""  # as files of one set mostly begin alike, and the interpreter lock is held while one is walked
    for i, data in enumerate(encoded):
        try:
            if isinstance(data, ImageError):
                raise data
            view = data.data
            if not header or bytes(view[: len(header)]) != header:
                header = plain_header(view, size)
            if header and native is not None and len(view) <= limits.max_bytes:
                # What this cannot decode goes the long way, which says why, or makes do with it as everywhere else.
                with contextlib.suppress(RuntimeError):
                    target[i] = native(torch.from_numpy(data), _RGB, False).numpy()
                    continue
            target[i] = _pixels(bytes(view), size, crop, limits).transpose(2, 0, 1)
        except ImageError as error:
            target[i], failed[i] = 0, str(error)
    return images, failed


def decode_all(
    rows: NDArray[np.int64],
    read: Callable[[NDArray[np.int64]], Sequence[Encoded]],
    size: int,
    *,
    crop: float = 1.0,
    limits: Limits = DEFAULT_LIMITS,
    report: Report = no_report,
) -> tuple[Tensor, dict[int, str]]:
    """Decode the images ``rows``, int64 (N,), into one tensor, on as many threads as there are cores.

    ``read`` gives some of them, encoded; the rest is as for :func:`decode_image`.

    Returns:
        uint8 (M, 3, size, size), those that could be decoded, in order; and why the others could not, by their place in
        ``rows``.

    Raises:
        DataError: the set does not fit into memory, or cannot be read.
    """
    import torch

    count, available = len(rows), psutil.virtual_memory().available
    if (needed := count * 3 * size * size) > 0.9 * available:
        raise DataError(
            f"{count} faces of {size}x{size} pixels need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} "
            "GiB are free: choose a smaller image size, fewer identities, or fewer images to hold (stream_images)"
        )
    images = torch.empty((count, 3, size, size), dtype=torch.uint8)
    failed: dict[int, str] = {}
    filled = 0

    def work(start: int) -> tuple[int, Tensor, dict[int, str]]:
        encoded = read(rows[start : start + AT_ONCE])
        return start, *decode_batch(encoded, size, limits, crop=crop, exact=True)

    with own_limits():
        for start, batch, lost in by_threads(work, range(0, count, AT_ONCE), workers()):
            kept = [i for i in range(len(batch)) if i not in lost]
            images[filled : filled + len(kept)] = batch[kept] if lost else batch
            filled += len(kept)
            failed |= {start + i: reason for i, reason in lost.items()}
            report(start + len(batch), count)
    return images[:filled], failed
