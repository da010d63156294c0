"""No defence: the face itself is sent. The ceiling of utility and of recovery."""

from __future__ import annotations

import torch
from torch import Tensor

from defenses.base import Defense
from defenses.linear import IdentityOperator


class Unprotected(Defense):
    """The representation is the face: float (N, 3, H, W), RGB in [0, 1]."""

    name = "none"
    summary = "no protection: the face itself"

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return faces

    def linear_operator(self, state: Tensor | None) -> IdentityOperator:
        return IdentityOperator(self.image_size)
