"""Some identities of a source: what a :class:`bench.data.faces.FaceSet` is in memory, on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import Report, no_report, workers
from bench.data.faces import FaceSet, Skipped
from bench.data.sources.source import Batch, EncodedSource
from bench.data.stream.loader import by_threads
from bench.errors import DataError

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


#: Images that a thread reads and decodes at once, on the way through a whole view.
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class IdentityView:
    """Some identities of a source, relabelled 0..K-1 in the order given.

    Attributes:
        source: the whole.
        chosen: int64 (K,), labels of the source.
        rows: int64 (N,), the images of these identities, as the source counts them, ascending.
        labels: int32 (N,), their labels here.
        contents: what tells the N images apart; None where nobody looked (or where it is not needed any more).
        skipped: images that were left out.
    """

    source: EncodedSource
    chosen: NDArray[np.int64]
    rows: NDArray[np.int64]
    labels: NDArray[np.int32]
    contents: Contents | None = None
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(cls, source: EncodedSource, identities: NDArray[np.int64]) -> IdentityView:
        """The view of ``identities`` (K,), distinct labels of ``source``.

        Raises:
            ValueError: an identity that the source does not have, or one twice.
        """
        return cls.everything(source).of_identities(torch.from_numpy(identities))

    @classmethod
    def everything(cls, source: EncodedSource) -> IdentityView:
        """The view of all identities, labelled as the source labels them."""
        return cls(source, np.arange(source.identities), np.arange(len(source)), source.labels)

    @property
    def path(self) -> Path:
        """Of the source."""
        return self.source.path

    @property
    def image_size(self) -> int:
        """Of the source."""
        return self.source.image_size

    @property
    def identities(self) -> int:
        """K, how many people there are here."""
        return len(self.chosen)

    @property
    def used_names(self) -> frozenset[str]:
        """Names of the identities that have at least one image here."""
        return frozenset(map(self.name, np.unique(self.labels).tolist()))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, label: int) -> str:
        """What the source calls the identity."""
        return self.source.name(int(self.chosen[label]))

    def where(self, row: int) -> str:
        """What the source calls the image."""
        return self.source.where(int(self.rows[row]))

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """As the source does, with the labels of the view."""
        read = self.source.read(self.rows[rows])
        back = np.searchsorted(self.rows, read.rows.numpy())
        labels = torch.from_numpy(self.labels[back].astype(np.int64))
        return Batch(read.images, labels, torch.from_numpy(back), read.skipped)

    def of_identities(self, identities: Tensor) -> IdentityView:
        """All images of the given label values (K,), relabelled 0..K-1 in the order given.

        Raises:
            ValueError: an identity that is not here, or one twice.
        """
        wanted = identities.numpy()
        if len(np.unique(wanted)) < len(wanted):
            raise ValueError("an identity is chosen twice")
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.identities:
            raise ValueError(f"identities must be labels of this set, 0 to {self.identities - 1}")
        lookup = np.full(self.identities, -1, dtype=np.int32)
        lookup[wanted] = np.arange(len(wanted), dtype=np.int32)
        labels = lookup[self.labels]
        kept = labels >= 0
        return IdentityView(self.source, self.chosen[wanted], self.rows[kept], labels[kept])

    def where_true(self, kept: NDArray[np.bool_]) -> Self:
        """The images at ``kept`` (N,), labels and identities unchanged: some may have no image left."""
        contents = None if self.contents is None else self.contents.where_true(kept)
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], contents=contents)

    def load(self, report: Report = no_report) -> FaceSet:
        """Decode everything into memory, bit for bit as a set that is loaded as a whole.

        Raises:
            DataError: the set does not fit into memory, or an image cannot be decoded, unless the source skips those.
        """
        size, needed = self.image_size, len(self) * 3 * self.image_size**2
        if needed > 0.9 * (free := psutil.virtual_memory().available):
            raise DataError(
                f"{len(self)} faces of {size}x{size} pixels need {needed / 2**30:.1f} GiB of memory, "
                f"{free / 2**30:.1f} GiB are free: choose a smaller image size, or fewer images to hold (stream_images)"
            )
        images = torch.empty((len(self), 3, size, size), dtype=torch.uint8)
        read = replace(self, source=self.source.reading(self.source.on_error, exact=True)).read
        labels, skipped, done = torch.empty(len(self), dtype=torch.int64), list(self.skipped), 0
        parts = (np.arange(start, min(start + AT_ONCE, len(self))) for start in range(0, len(self), AT_ONCE))
        for batch in by_threads(read, parts, workers()):
            place = slice(done, done + len(batch.labels))
            images[place], labels[place] = batch.images, batch.labels
            skipped += batch.skipped
            done = place.stop
            report(done + len(skipped), len(self))
        return FaceSet(images[:done], labels[:done], tuple(map(self.name, range(self.identities))), tuple(skipped))
