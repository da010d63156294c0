"""A recogniser whose embeddings can be worked out."""

from __future__ import annotations

import torch
from torch import nn

EMBEDDING = 20


class Recogniser(nn.Module):
    """A fixed random linear embedding.

    Args:
        shape: of the representations.
        common: a part that all embeddings share, as one of little training has it.
    """

    def __init__(self, shape, common=0.0):
        super().__init__()
        size = shape[0] * shape[1] * shape[2]
        self.weight = nn.Parameter(torch.randn(size, EMBEDDING, generator=torch.Generator().manual_seed(4)) / size**0.5)
        self.common = common

    def forward(self, representation):
        return (representation.flatten(1) - 0.5) @ self.weight + self.common
