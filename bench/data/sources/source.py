"""Faces that stay on disk: what a source of encoded images owes its readers, and the part that all of them share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, Limits, decode_batch
from bench.data.faces import Skipped
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
    """Images on disk, of which memory holds the index only. Reading is safe from any thread and after a fork."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def image_size(self) -> int:
        """S, side of the faces in pixels."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 (N,), the identity of every image, in 0..K-1."""

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
        crop: side of the central square of each image that is kept, as a share of its shorter side.
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
        crop: float = 1.0,
    ) -> None:
        if image_size < 8:
            raise UsageError(f"the image size must be at least 8 pixels, got {image_size}")
        if on_error not in ("refuse", "skip"):
            raise UsageError(f"on_error must be refuse or skip, got {on_error!r}")
        self.path, self.image_size, self.labels = path, image_size, labels
        self.on_error, self.limits, self.crop = on_error, limits, crop
        self.exact = False
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

    def reading(self, on_error: OnError, *, exact: bool = False) -> Self:
        """This source, read in another way.

        Args:
            on_error: what becomes of an image that cannot be decoded.
            exact: whether images are decoded bit for bit as sets in memory are, which is slower: to be compared with
                them.
        """
        other = copy.copy(self)
        other.on_error, other.exact = on_error, exact
        return other

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
        images, failed = decode_batch(
            self._encoded(rows), self.image_size, self.limits, crop=self.crop, exact=self.exact
        )
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
