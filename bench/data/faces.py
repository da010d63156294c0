"""Decoded faces in memory, verification pairs over them, and what a dataset loader returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.images import to_float


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that was left out, with the reason: counted and listed, never silent."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class FaceSet:
    """Faces with identity labels.

    Attributes:
        images: uint8 (N, 3, H, W), RGB in [0, 255].
        labels: int64 (N,), indices into ``names``.
        names: one name per identity; globally unique within a dataset, so that two sets are
            identity-disjoint exactly when their used names are.
        skipped: images that the loader left out.
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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identities(self) -> int:
        """K: labels are in 0..K-1; some may have no image."""
        return len(self.names)

    @property
    def size(self) -> int:
        """Height (= width) of the faces in pixels."""
        return int(self.images.shape[-1])

    @property
    def used_names(self) -> frozenset[str]:
        """Names of the identities that have at least one image here."""
        return frozenset(self.names[i] for i in torch.unique(self.labels).tolist())

    def name(self, label: int) -> str:
        """What the identity ``label`` is called."""
        return self.names[label]

    def where_true(self, kept: NDArray[np.bool_]) -> Self:
        """The faces at ``kept`` (N,), and what was skipped; identities are unchanged, some may have no face left."""
        mask = torch.from_numpy(kept)
        return replace(self, images=self.images[mask], labels=self.labels[mask])

    def subset(self, index: Tensor) -> FaceSet:
        """The faces at ``index`` (int64 or bool), labels and names unchanged."""
        return replace(self, images=self.images[index], labels=self.labels[index], skipped=())

    def of_identities(self, identities: Tensor) -> FaceSet:
        """All faces of the given label values, relabelled 0..K-1 in the order given."""
        lookup = torch.full((len(self.names),), -1, dtype=torch.int64)
        lookup[identities] = torch.arange(len(identities))
        labels = lookup[self.labels]
        keep = labels >= 0
        names = tuple(self.names[int(i)] for i in identities)
        return FaceSet(self.images[keep], labels[keep], names)

    def to(self, device: torch.device | str) -> FaceSet:
        """The set with its images on ``device`` (labels stay on the CPU, where indexing happens)."""
        return replace(self, images=self.images.to(device))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """float32 (n, 3, H, W) batches in [0, 1], in order."""
        for start in range(0, len(self), batch_size):
            yield to_float(self.images[start : start + batch_size])


@dataclass(frozen=True, slots=True)
class PairProtocol:
    """Verification pairs: ``first[i]`` against ``second[i]``, of one person where ``same[i]``.

    Attributes:
        first, second: int64 (P,), indices into a :class:`FaceSet`.
        same: bool (P,).
        fold: int64 (P,), the fold of each pair, 0..F-1.
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


@dataclass(frozen=True, slots=True)
class Source:
    """What a dataset loader returns, before it is split.

    Attributes:
        faces: the identities that provider, attacker and (where needed) evaluator share out.
        victims: a set of its own where the dataset has one (a verification pack), else None: then
            victims are split off ``faces``.
        pairs: the dataset's own protocol over ``victims``; None where pairs are drawn by seed.
        synthetic: rendered faces, which every report has to say.
    """

    name: str
    faces: FaceSet
    victims: FaceSet | None = None
    pairs: PairProtocol | None = None
    synthetic: bool = False
    details: dict[str, str | int | float] = field(default_factory=dict)
