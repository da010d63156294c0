"""What tells the images of a set apart when their pixels are too many to keep: nine bytes an image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

#: An image whose values vary less than this (standard deviation, of 255) is blank: two of them prove nothing.
BLANK = 2.0


@dataclass(frozen=True, slots=True)
class Contents:
    """Digests of N images: those of two that are equal pixel for pixel are equal.

    Digests have 64 bits. Two different images of N share one by chance with a probability of about N^2 / 2^65: 1e-6
    for 6 million. Then one identity too many is left out.

    Attributes:
        digests: uint64 (N,), of the pixels.
        blank: bool (N,).
    """

    digests: NDArray[np.uint64]
    blank: NDArray[np.bool_]

    @classmethod
    def of(cls, images: Tensor) -> Contents:
        """Of images uint8 (N, 3, H, W)."""
        rows = images.cpu().contiguous().flatten(1).numpy()
        sums = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
        return cls(np.frombuffer(sums, dtype=np.uint64), np.array([is_blank(row) for row in rows], dtype=bool))

    def where_true(self, kept: NDArray[np.bool_]) -> Contents:
        """Of the images at ``kept`` (N,)."""
        return Contents(self.digests[kept], self.blank[kept])


def is_blank(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image shows nothing."""
    return bool(pixels.std() < BLANK)
