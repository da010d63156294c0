"""Nested parts of a set of faces: what an attacker with less data has is a part of what one with more has."""

from __future__ import annotations

from typing import TypeVar

import torch

from bench.data.faceset import FaceSet
from bench.data.stream.view import IdentityView
from bench.errors import DataError

Faces = TypeVar("Faces", FaceSet, IdentityView)

#: One to learn from, one to validate on.
_LEAST_IDENTITIES = 2


def whole_identities(faces: Faces, budget: float, generator: torch.Generator) -> Faces:
    """The faces of as many people as fit into a budget, everyone with all their images.

    People are taken in one random order as long as they fit, so that with generators of one state a smaller budget
    gives a part of what a larger one gives. Two people are taken whatever they cost.

    Args:
        faces: the set, in memory or on disk.
        budget: a share up to 1 of its faces, or a number of faces above 1.
        generator: draws the order.

    Returns:
        ``faces`` itself where all fit; else a set relabelled 0..K-1, its images in the order of ``faces``.

    Raises:
        DataError: a budget that is not above 0.

    Example:
        >>> import torch
        >>> images, people = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) // 2
        >>> faces = FaceSet(images, people, ("a", "b", "c"))
        >>> len(whole_identities(faces, 5, torch.Generator().manual_seed(0)))
        4
    """
    if not budget > 0:
        raise DataError(f"a budget of faces must be above 0, got {budget}")
    labels = torch.as_tensor(faces.labels)
    people = torch.unique(labels)
    order = people[torch.randperm(len(people), generator=generator)]
    costs = torch.bincount(labels, minlength=faces.identities)[order].cumsum(0)
    limit = budget * len(faces) if budget <= 1 else budget
    # Of a share such as 0.1 of 30, the product may fall short of the whole number by its rounding.
    count = max(int((costs <= limit + 1e-6).sum()), min(_LEAST_IDENTITIES, len(people)))
    if count == len(people):
        return faces
    return faces.of_identities(order[:count].sort().values)
