"""Faces with identity labels, verification pairs over them, and what a dataset loader returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.base import GUESSED, Contents, Faces, Skipped, pixel_rows
from bench.images import to_float

if TYPE_CHECKING:
    from bench.data.encoded import IdentityView
    from bench.data.pairs import PairRows


def _probes(images: Tensor) -> NDArray[np.void]:
    """(N,): a few pixels of every image. They tell nearly all apart, and cost a hundredth of reading all."""
    rows = pixel_rows(images)
    probes = np.ascontiguousarray(rows[:, np.linspace(0, rows.shape[1] - 1, 64).astype(np.int64)])
    return probes.view("V64")[:, 0]


@dataclass(frozen=True, slots=True)
class FaceSet(Faces):
    """Faces in memory: ``images`` uint8 (N, 3, H, W), RGB in [0, 255]; ``labels`` int64 (N,), indices into ``names``.

    There is one name per identity, globally unique within a dataset: two sets are identity-disjoint exactly when their
    used names are.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 (N,), got {self.labels.dtype} {tuple(self.labels.shape)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.names):
            raise ValueError(f"labels must index the {len(self.names)} names")

    @property
    def identities(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Height (= width) of the faces in pixels."""
        return int(self.images.shape[-1])

    def name(self, label: int) -> str:
        return self.names[label]

    def where_true(self, kept: NDArray[np.bool_]) -> Self:
        mask = torch.from_numpy(kept)
        return replace(self, images=self.images[mask], labels=self.labels[mask])

    def subset(self, index: Tensor) -> Self:
        """The faces at ``index`` (int64 or bool), labels and names unchanged."""
        return replace(self, images=self.images[index], labels=self.labels[index], skipped=())

    def of_identities(self, identities: NDArray[np.integer]) -> Self:
        lookup = torch.full((len(self.names),), -1, dtype=torch.int64)
        lookup[torch.from_numpy(identities)] = torch.arange(len(identities))
        labels = lookup[self.labels]
        keep = labels >= 0
        return type(self)(self.images[keep], labels[keep], tuple(self.names[i] for i in identities.tolist()))

    def _alike(self) -> tuple[NDArray[np.int64], Contents]:
        """Images that may equal another one, int64 (A,), ascending, and their contents."""
        _, number, counts = np.unique(_probes(self.images), return_inverse=True, return_counts=True)
        alike = np.flatnonzero(counts[number] > 1)
        return alike, Contents.of(self.images[torch.from_numpy(alike)])

    def copies(self) -> NDArray[np.int64]:
        alike, contents = self._alike()
        return alike[contents.copies()]

    def firsts(self) -> NDArray[np.int64]:
        alike, contents = self._alike()
        first = np.arange(len(self))
        first[alike] = alike[contents.firsts(self.labels.numpy()[alike])]
        return first

    def among(self, images: Tensor) -> NDArray[np.bool_]:
        mine, theirs = _probes(self.images), _probes(images)
        alike = np.isin(mine, theirs)
        wanted = Contents.of(images[torch.from_numpy(np.isin(theirs, mine))]).digests
        alike[alike] = np.isin(Contents.of(self.images[torch.from_numpy(alike)]).digests, wanted)
        return alike

    def digests(self) -> NDArray[np.uint64]:
        return Contents.of(self.images).digests

    def to(self, device: torch.device | str) -> FaceSet:
        """The set with its images on ``device`` (labels stay on the CPU, where indexing happens)."""
        return replace(self, images=self.images.to(device))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """float32 (n, 3, H, W) batches in [0, 1], in order."""
        for start in range(0, len(self), batch_size):
            yield to_float(self.images[start : start + batch_size])


@dataclass(frozen=True, slots=True)
class PairProtocol:
    """Verification pairs: ``first[i]`` against ``second[i]``, indices into a :class:`FaceSet`, int64 (P,).

    ``same`` says where both are of one person, bool (P,); ``fold`` int64 (P,) counts 0..F-1.
    """

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.first, self.second, self.same, self.fold)}
        if len(shapes) != 1 or self.first.ndim != 1:
            raise ValueError(f"pair columns must share one shape (P,), got {sorted(shapes)}")

    def __len__(self) -> int:
        return len(self.same)

    @classmethod
    def of(cls, rows: PairRows) -> Self:
        """Of pairs on disk, whose rows are faces in memory."""
        return cls(*map(torch.tensor, (rows.first, rows.second, rows.same, rows.fold)))


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset before it is split.

    Attributes:
        name: of the dataset.
        faces: the identities that provider, attacker and (where needed) evaluator share out; on disk where the dataset
            is streamed.
        victims: a set of its own where the dataset has one (a verification pack), else None: then
            victims are split off ``faces``.
        pairs: the dataset's own protocol over ``victims``; None where pairs are drawn by seed.
        synthetic: rendered faces, which every report has to say.
        details: what a result says of the dataset.
        notes: sentences that a result warns of: how files were understood where that could be doubted.
    """

    name: str
    faces: FaceSet | IdentityView
    victims: FaceSet | None = None
    pairs: PairProtocol | None = None
    synthetic: bool = False
    details: dict[str, str | int | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def guessed(self) -> str | None:
        """Why nobody can be looked up by name, where the data does not say who is who (:data:`GUESSED`); else None."""
        why = self.details.get(GUESSED)
        return None if why is None else str(why)

    @property
    def in_memory(self) -> FaceSet:
        """The faces, of a dataset that is not streamed; a TypeError if they are on disk."""
        if not isinstance(self.faces, FaceSet):
            raise TypeError(f"the faces of {self.name} are on disk")
        return self.faces

    @property
    def on_disk(self) -> IdentityView:
        """The faces, of a dataset that is streamed; a TypeError if they are in memory."""
        if isinstance(self.faces, FaceSet):
            raise TypeError(f"the faces of {self.name} are in memory")
        return self.faces
