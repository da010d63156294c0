"""What faces in memory and on disk have in common. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


#: Key in the details of a source whose people are guessed: one of them may stand there under two names.
GUESSED = "identities_guessed"


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that was left out, with the reason: counted and listed, never silent."""

    where: str
    reason: str


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
        rows = pixel_rows(images)
        sums = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
        return cls(np.frombuffer(sums, dtype=np.uint64), np.array([row.std() < BLANK for row in rows], dtype=bool))

    def where_true(self, kept: NDArray[np.bool_]) -> Contents:
        return Contents(self.digests[kept], self.blank[kept])

    def copies(self) -> NDArray[np.int64]:
        """int64 (L, 2): the first of every group of equal images that are not blank, and each of the others."""
        first, rows = self.firsts(np.zeros(len(self.digests), dtype=np.int8)), np.arange(len(self.digests))
        pairs: NDArray[np.int64] = np.stack((first, rows), axis=1)[(first != rows) & ~self.blank]
        return pairs

    def firsts(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """int64 (N,): for each image the first equal one of the same label, blank or not; itself where that is it."""
        order = np.lexsort((self.digests, labels))  # stable: the first of every group comes first
        digests, people = self.digests[order], np.asarray(labels)[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (digests[1:] != digests[:-1]) | (people[1:] != people[:-1])
        first = np.empty(len(order), dtype=np.int64)
        first[order] = order[new][np.cumsum(new) - 1]
        return first


def components(first: NDArray[np.integer], second: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """int64 (count,): the group of each of 0..count-1, where ``first[i]`` and ``second[i]`` are in one, by number."""
    from scipy.sparse import coo_array  # here, as plans, which compare no faces, load this module, too
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    groups: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return groups


def pixel_rows(images: Tensor) -> NDArray[np.uint8]:
    """The pixels of images uint8 (N, 3, H, W): uint8 (N, 3 H W), on the CPU."""
    rows: NDArray[np.uint8] = images.cpu().contiguous().flatten(1).numpy()
    return rows


class Faces(ABC):
    """Faces with identity labels, in memory (:class:`FaceSet`) or on disk (:class:`bench.data.encoded.IdentityView`).

    ``labels`` are integers (N,) in 0..K-1; ``skipped`` lists images that were left out.
    """

    __slots__ = ()

    labels: Tensor | NDArray[np.int32]
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def identities(self) -> int:
        """K: labels are in 0..K-1; some may have no image."""

    @abstractmethod
    def name(self, label: int) -> str:
        """What the identity ``label`` is called; unique within a data set."""

    @property
    def used_names(self) -> frozenset[str]:
        """Names of the identities that have at least one image here."""
        return frozenset(map(self.name, np.unique(self.labels).tolist()))

    @abstractmethod
    def where_true(self, kept: NDArray[np.bool_]) -> Self:
        """The images at ``kept`` (N,), and what was skipped; identities are unchanged, some may have no image left."""

    @abstractmethod
    def of_identities(self, identities: NDArray[np.integer]) -> Self:
        """All images of the given label values (K,), relabelled 0..K-1 in the order given."""

    @abstractmethod
    def copies(self) -> NDArray[np.int64]:
        """int64 (L, 2): every image that equals another one pixel for pixel and is not blank, behind the first such."""

    @abstractmethod
    def firsts(self) -> NDArray[np.int64]:
        """int64 (N,): for each image the first of the same person that equals it pixel for pixel; mostly itself."""

    @abstractmethod
    def among(self, images: Tensor) -> NDArray[np.bool_]:
        """bool (N,): whether each image equals one of ``images`` pixel for pixel."""

    @abstractmethod
    def digests(self) -> NDArray[np.uint64]:
        """uint64 (N,): of each image's pixels (:class:`Contents`)."""
