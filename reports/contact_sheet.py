"""Contact sheets: original | what is sent | recovered, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array = npt.NDArray[np.float32]

#: Pixels of one cell.
CELL = 112
_GAP = 4
_HEADER = 18
_FOOTER = 16


def as_picture(representation: Array) -> npt.NDArray[np.uint8]:
    """Something to look at for any representation (C, h, w): (H, W, 3) in [0, 255].

    Three channels in [0, 1] are shown as the picture they are. Other maps are tiled in channel order on
    the smallest square grid, each scaled so that its own 1st and 99th percentile span black to white:
    coefficients have no common range, and a reader wants to see structure.
    """
    channels, height, width = representation.shape
    if channels == 3 and representation.min() >= -0.001 and representation.max() <= 1.001:
        picture: npt.NDArray[np.uint8] = np.rint(np.moveaxis(representation, 0, -1).clip(0, 1) * 255).astype(np.uint8)
        return picture
    side = math.ceil(math.sqrt(channels))
    low, high = np.percentile(representation, (1, 99), axis=(1, 2), keepdims=True)
    scaled = (representation - low) / np.maximum(high - low, 1e-6)
    grid = np.zeros((side * side, height, width), dtype=np.float32)
    grid[:channels] = scaled.clip(0, 1)
    tiled = grid.reshape(side, side, height, width).transpose(0, 2, 1, 3).reshape(side * height, side * width)
    grey: npt.NDArray[np.uint8] = np.rint(tiled * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def contact_sheet(
    path: Path,
    columns: Sequence[tuple[str, Sequence[Array]]],
    captions: Sequence[str],
    title: str,
) -> None:
    """Write a PNG with one row per victim and one column per way of seeing it.

    Args:
        path: the file to write.
        columns: (heading, pictures); a picture is float (C, h, w) as for :func:`as_picture`.
        captions: one line per row, under it.
        title: above everything; must say when the faces are synthetic.

    Raises:
        ValueError: columns of different lengths.
    """
    rows = len(captions)
    if any(len(pictures) != rows for _, pictures in columns):
        raise ValueError("every column needs one picture per caption")
    width = len(columns) * (CELL + _GAP) + _GAP
    row_height = CELL + _FOOTER
    sheet = Image.new("RGB", (width, 2 * _HEADER + rows * (row_height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 3), title, fill="black")
    for column, (heading, pictures) in enumerate(columns):
        left = _GAP + column * (CELL + _GAP)
        draw.text((left, _HEADER + 2), heading, fill="black")
        for row, picture in enumerate(pictures):
            top = 2 * _HEADER + row * (row_height + _GAP)
            image = Image.fromarray(as_picture(picture))
            # Tiled maps are shrunk (smoothly), small pictures enlarged (with their pixels visible).
            method = Image.Resampling.BOX if image.width > CELL else Image.Resampling.NEAREST
            sheet.paste(image.resize((CELL, CELL), method), (left, top))
    for row, caption in enumerate(captions):
        draw.text((_GAP, 2 * _HEADER + row * (row_height + _GAP) + CELL + 2), caption, fill="#444444")
    sheet.save(path)
