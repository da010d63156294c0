"""Faces that stay on disk: what a source of encoded images owes its readers, and the part that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, Limits
from bench.data.faceset import Skipped
from bench.data.stream.jpeg import decode_batch
from bench.errors import DataError, UsageError

OnError = Literal["refuse", "skip"]


class Batch(NamedTuple):
    """A batch as it was read.

    Attributes:
        images: uint8 (N, 3, S, S), RGB in [0, 255].
        labels: int64 (N,), in 0..K-1.
        rows: int64 (N,), which images of the source these are, in the order asked for.
        skipped: images that were asked for and could not be decoded; empty unless the source skips them.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    skipped: tuple[Skipped, ...] = ()


class RecordSource(Protocol):
    """Images on disk, of which memory holds the index only. Reading is safe from any thread and after a fork.

    Attributes:
        path: what was opened.
        image_size: S, side of the faces in pixels.
        labels: int32 (N,), the identity of every image, in 0..K-1.
    """

    path: Path
    image_size: int
    labels: NDArray[np.int32]

    @property
    def identities(self) -> int:
        """K, how many people there are."""

    def __len__(self) -> int: ...

    def name(self, label: int) -> str:
        """What the identity ``label`` is called; unique within the source."""

    def where(self, row: int) -> str:
        """What messages call the image ``row``: file, record and offset."""

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """Read and decode the images ``rows`` (N,).

        Raises:
            DataError: a damaged file; or an image that cannot be decoded, unless those are skipped.
        """


class EncodedSource(ABC):
    """A :class:`RecordSource` whose subclass says where the bytes of each image lie.

    Args:
        path: what was opened.
        image_size: S, in pixels.
        labels: int32 (N,), in 0..K-1.
        names: of the K identities.
        on_error: what becomes of an image that cannot be decoded.
        limits: what one image may cost.
    """

    def __init__(
        self,
        path: Path,
        image_size: int,
        labels: NDArray[np.int32],
        names: Sequence[str] | NDArray[np.int64],
        *,
        on_error: OnError = "refuse",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if image_size < 8:
            raise UsageError(f"the image size must be at least 8 pixels, got {image_size}")
        if on_error not in ("refuse", "skip"):
            raise UsageError(f"on_error must be refuse or skip, got {on_error!r}")
        self.path, self.image_size, self.labels = path, image_size, labels
        self.on_error, self.limits = on_error, limits
        self._names = names

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identities(self) -> int:
        """K, how many people there are."""
        return len(self._names)

    def name(self, label: int) -> str:
        """What the identity ``label`` is called."""
        return str(self._names[label])

    @abstractmethod
    def where(self, row: int) -> str:
        """What messages call the image ``row``."""

    @abstractmethod
    def _encoded(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """The encoded images, uint8 (bytes,) each, in the order of ``rows``."""

    def encoded(self, row: int) -> bytes:
        """One image as it is stored.

        Raises:
            DataError: a damaged file.
        """
        return self._encoded(np.array([row]))[0].numpy().tobytes()

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """Read and decode the images ``rows`` (N,).

        Raises:
            DataError: a damaged file; or an image that cannot be decoded, unless those are skipped.
        """
        images, failed = decode_batch(self._encoded(rows), self.image_size, self.limits)
        if failed and self.on_error == "refuse":
            place, reason = next(iter(failed.items()))
            raise DataError(
                f"{self.where(int(rows[place]))}: {reason} (on_error=skip leaves out images that cannot be decoded)"
            )
        labels, found = torch.from_numpy(self.labels[rows].astype(np.int64)), torch.from_numpy(rows)
        if not failed:
            return Batch(images, labels, found)
        kept = torch.ones(len(rows), dtype=torch.bool)
        kept[list(failed)] = False
        skipped = tuple(Skipped(self.where(int(rows[place])), reason) for place, reason in failed.items())
        return Batch(images[kept], labels[kept], found[kept], skipped)


@dataclass(frozen=True, slots=True)
class IdentityView:
    """Some identities of a source, relabelled 0..K-1 in the order given.

    Attributes:
        source: the whole.
        chosen: int64 (K,), labels of the source.
        rows: int64 (N,), the images of these identities, as the source counts them.
        labels: int32 (N,), their labels here.
    """

    source: RecordSource
    chosen: NDArray[np.int64]
    rows: NDArray[np.int64]
    labels: NDArray[np.int32]

    @classmethod
    def of(cls, source: RecordSource, identities: NDArray[np.int64]) -> IdentityView:
        """The view of ``identities`` (K,), distinct labels of ``source``.

        Raises:
            ValueError: an identity that the source does not have, or one twice.
        """
        if len(np.unique(identities)) < len(identities):
            raise ValueError("an identity is chosen twice")
        if len(identities) and not 0 <= identities.min() <= identities.max() < source.identities:
            raise ValueError(f"identities must be labels of the source, 0 to {source.identities - 1}")
        lookup = np.full(source.identities, -1, dtype=np.int32)
        lookup[identities] = np.arange(len(identities), dtype=np.int32)
        rows = np.flatnonzero(lookup[source.labels] >= 0)
        return cls(source, identities, rows, lookup[source.labels[rows]])

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
