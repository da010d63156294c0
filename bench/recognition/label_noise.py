"""Wrong labels on purpose, to measure how a head stands them."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_labels(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """A copy of int64 ``labels`` (N,) with ``round(share * N)`` of them replaced by another identity's.

    Which ones and by what is uniform (symmetric label noise), and the same for the same generator.
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    # A shift by 1..C-1 never comes back to where it started.
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + shift) % classes
    return flipped
