"""MLP-Hash: a template is the signs of what a random network, which is each client's key, makes of the embedding.

Shahreza, Krivokuca Hahn and Marcel, *MLP-Hash: Protecting Face Templates via Hashing of Randomized Multi-Layer
Perceptron*, EUSIPCO 2023. Their weights have orthonormal rows, which narrowing layers cannot have: these have
orthonormal columns here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from defenses.base import DefenseOptions
from defenses.template import Misfit, TemplateDefense

#: How far on its side of the mean an output must lie to fit, in standard deviations of a template's outputs.
_MARGIN = 0.01


class MLPHashOptions(DefenseOptions):
    hidden: int = Field(default=3, ge=0, le=8, description="hidden layers, twice as wide as the embedding")
    bits: int | None = Field(
        default=None, ge=8, le=8192, description="bits of a template; none: as many as an embedding has values"
    )


class MLPHash(TemplateDefense):
    """Signs of the outputs of a keyed perceptron about their mean: (N, bits, 1, 1), each +-1 / sqrt(bits).

    Layers of 2D, 2D, 2D and D units without biases, ReLU between them. Weights are random matrices of orthonormal rows
    or columns. Two templates are compared by the share of equal bits. Under different keys they agree in half of the
    bits, whoever is on them. Who has stolen the key has an inequality on the embedding of every bit, through the
    network.
    """

    name = "mlp-hash"
    summary = "template of sign bits of what a random network, each client's key, makes of the embedding"
    reference = "Shahreza, Krivokuca Hahn and Marcel, MLP-Hash, EUSIPCO 2023"
    fidelity = "reconstruction"
    hidden = "key: the weights of the network"
    weakened: ClassVar[Mapping[str, Any]] = {"hidden": 0, "bits": 4096}
    differentiable = False
    Options = MLPHashOptions
    options: MLPHashOptions

    @property
    def template_size(self) -> int:
        """The number of bits."""
        return self.options.bits or self.embedding_size

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """A bit is stored as a bit."""
        return math.ceil(self.template_size / 8)

    @property
    def _layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every layer."""
        hidden = [2 * self.embedding_size] * self.options.hidden
        return list(itertools.pairwise([self.embedding_size, *hidden, self.template_size]))

    def expand(self, key: Tensor) -> Tensor:
        """The weights of all layers one after the other, (inputs, outputs) each: (sum of inputs * outputs,)."""
        draws = torch.Generator().manual_seed(int(key))
        weights = [nn.init.orthogonal_(torch.empty(layer), generator=draws) for layer in self._layers]
        return torch.cat([weight.flatten() for weight in weights])

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Bits (N, bits) of embeddings (N, D): unit rows, +-1 / sqrt(bits)."""
        unit = self.checked(embeddings)
        outputs = self.by_key(keys, unit, self._outputs)
        return torch.where(outputs > 0, 1.0, -1.0).to(unit) / math.sqrt(self.template_size)

    def _outputs(self, values: Tensor, weights: Tensor) -> Tensor:
        """Outputs about their mean (..., n, bits) of values (..., n, D) under weights (..., W)."""
        parts = weights.split([math.prod(layer) for layer in self._layers], dim=-1)
        for number, (part, layer) in enumerate(zip(parts, self._layers, strict=True)):
            values = (functional.relu(values) if number else values) @ part.unflatten(-1, layer)
        return values - values.mean(dim=-1, keepdim=True)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Share of equal bits (N,), in [0, 1]."""
        self.same_system(first, second)
        return ((first > 0) == (second > 0)).float().mean(dim=1)

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit:
        """Mean over the bits of how far an output lies on the wrong side of the mean, in standard deviations."""
        weights, signs = self.secrets(keys, templates), templates.sign()[:, None]

        def misfit(embeddings: Tensor) -> Tensor:
            outputs = self._outputs(embeddings, weights)
            # With its gradient: without it, outputs that all shrink would seem to fit better.
            spread = (outputs.square().mean(dim=2, keepdim=True) + 1e-12).sqrt()
            return functional.relu(_MARGIN - signs * outputs / spread).mean(dim=2)

        return misfit
