"""Which victim images are attacked, and which plain image of each victim a linkage is judged against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data.faceset import FaceSet
from bench.errors import DataError
from bench.metrics.identity import content_ids, split_gallery


@dataclass(frozen=True, slots=True)
class Probes:
    """Victim images, as indices into the victims' faces.

    Attributes:
        attacked: int64 (V,), the images that are protected, intercepted and recovered.
        gallery: int64 (G,), one other plain image of every victim who has one.
    """

    attacked: Tensor
    gallery: Tensor


def select_probes(victims: FaceSet, count: int, generator: torch.Generator) -> Probes:
    """Draw at most ``count`` images to attack, as many people as possible before a second image of anyone.

    Only people with another image take part, so that type II acceptance and rank-1 are defined for every probe.

    Raises:
        DataError: nobody has two different images.
    """
    division = split_gallery(victims.labels, generator, content=content_ids(victims.images))
    if not len(division.gallery):
        raise DataError("no victim has two different images: identity leakage cannot be measured; use a larger dataset")
    enrolled = torch.zeros(len(victims.names), dtype=torch.bool)
    enrolled[victims.labels[division.gallery]] = True
    candidates = division.probes[enrolled[victims.labels[division.probes]]]
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    turn = _occurrence(victims.labels[candidates])
    return Probes(candidates[turn.argsort(stable=True)][:count], division.gallery)


def _occurrence(labels: Tensor) -> Tensor:
    """For each position, how often its label stood before it: int64 (N,)."""
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first = torch.searchsorted(ranked, ranked)
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(order)) - first
    return occurrence
