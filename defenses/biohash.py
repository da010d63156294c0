"""BioHash: a template is the signs of a few projections of the embedding, on directions that are each client's key.

Jin, Ling and Goh, *BioHashing: two factor authentication featuring fingerprint data and tokenised random number*,
Pattern Recognition 37(11), 2004; released code of Krivokuca Hahn and Marcel (bob.btp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from defenses.base import DefenseOptions
from defenses.template import Misfit, TemplateDefense

#: How far on its side of the threshold a projection must lie to fit, in standard deviations of the projections.
_MARGIN = 0.01


class BioHashOptions(DefenseOptions):
    bits: int | None = Field(
        default=None, ge=8, le=8192, description="bits of a template; none: as many as an embedding has values"
    )
    threshold: Literal["mean", "zero"] = Field(
        default="mean", description="above which a projection is a one. mean: that of the template's own projections"
    )


class BioHash(TemplateDefense):
    """Signs of keyed projections of the embedding: (N, bits, 1, 1), each +-1 / sqrt(bits).

    The directions are the columns of Q in the QR decomposition of a matrix of uniform numbers, D x bits; for more bits
    than values, of further matrices. Two templates are compared by the share of equal bits, which at threshold zero
    tells the angle between the embeddings under one key (1 - angle / pi). Under different keys they agree in half of
    the bits, whoever is on them, but for the first of a block: the numbers are positive, which leaves its
    direction nearly the same for all keys. Who has stolen the key has an inequality on the embedding of every bit.
    """

    name = "biohash"
    summary = "template of sign bits of the embedding's projections on directions that are each client's key"
    reference = "Jin, Ling and Goh, BioHashing, Pattern Recognition 37(11), 2004"
    fidelity = "faithful"
    hidden = "key: the directions of projection"
    weakened: ClassVar[Mapping[str, Any]] = {"bits": 4096, "threshold": "zero"}
    departures: ClassVar[Mapping[str, str]] = {
        "threshold=mean": "released code thresholds the projections at their mean, the paper at a preset value, zero"
    }
    differentiable = False
    Options = BioHashOptions
    options: BioHashOptions

    @property
    def template_size(self) -> int:
        """The number of bits."""
        return self.options.bits or self.embedding_size

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """A bit is stored as a bit."""
        return math.ceil(self.template_size / 8)

    def expand(self, key: Tensor) -> Tensor:
        """The directions as columns, (D, bits), in blocks of D orthonormal ones at most."""
        draws = torch.Generator().manual_seed(int(key))
        size = self.embedding_size
        widths = [min(size, self.template_size - start) for start in range(0, self.template_size, size)]
        return torch.cat([torch.linalg.qr(torch.rand(size, width, generator=draws))[0] for width in widths], dim=1)

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Bits (N, bits) of embeddings (N, D): unit rows, +-1 / sqrt(bits)."""
        unit = self.checked(embeddings)
        heights = self.by_key(keys, unit, lambda rows, directions: self._heights(rows @ directions))
        return torch.where(heights > 0, 1.0, -1.0).to(unit) / math.sqrt(self.template_size)

    def _heights(self, projections: Tensor) -> Tensor:
        """How far projections (..., bits) lie above the threshold."""
        return projections - projections.mean(dim=-1, keepdim=True) if self.options.threshold == "mean" else projections

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Share of equal bits (N,), in [0, 1]."""
        self.same_system(first, second)
        return ((first > 0) == (second > 0)).float().mean(dim=1)

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit:
        """Mean over the bits of how far a projection lies on the wrong side, in standard deviations."""
        directions, signs = self.secrets(keys, templates), templates.sign()[:, None]

        def misfit(embeddings: Tensor) -> Tensor:
            # A projection of a unit vector has variance 1 / D.
            heights = self._heights(embeddings @ directions) * math.sqrt(embeddings.shape[2])
            return functional.relu(_MARGIN - signs * heights).mean(dim=2)

        return misfit

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor:
        """The sum of the directions, each with the sign of its bit, (N, D): least squares, as they are orthonormal."""
        return (self.secrets(keys, templates) @ self._heights(templates)[..., None])[..., 0]
