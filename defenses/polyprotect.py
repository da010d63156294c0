"""PolyProtect: a template is a polynomial of every few consecutive values of the embedding; the key lies beside it.

Krivokuca Hahn and Marcel, *Towards Protecting Face Embeddings in Mobile Face Verification Scenarios*, IEEE TBIOM 4(1),
2022, and their released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from defenses.base import DefenseOptions
from defenses.template import Misfit, TemplateDefense

#: Coefficients lie in -50..50 without 0, as published.
_LARGEST = 50


class PolyProtectOptions(DefenseOptions):
    m: int = Field(
        default=5, ge=2, le=14, description="values that go into one of the template, and its exponents 1..m"
    )
    overlap: int = Field(
        default=3,
        ge=0,
        le=13,
        description="values that a window shares with the next, below m; published 0..4. The more, the better faces "
        "are told apart, and the more the template tells",
    )

    @model_validator(mode="after")
    def _overlap_is_less(self) -> Self:
        if self.overlap >= self.m:
            raise ValueError(f"overlap={self.overlap} must be below m={self.m}, the values of a window")
        return self


class PolyProtect(TemplateDefense):
    """p_j = sum_i c_i v_(j(m-overlap)+i)^(e_i) of unit embeddings v, zero beyond their end: (N, T, 1, 1).

    T = ceil((D - m) / (m - overlap)) + 1. A client's key is m different coefficients c, integers in -50..50 but 0, and
    the exponents e, a permutation of 1..m; the template is of no use without it, so that it is stored beside it. Two
    templates are compared by their cosine. Of D = 512 values, overlaps 0..4 leave 103, 128, 170, 255 and 508: with 4
    there are nearly as many equations as unknowns. 3, the default, is the overlap of the authors' later evaluation
    (*A Deeper Dive into the Irreversibility of PolyProtect*, 2026), which takes normalised embeddings, too.

    Values of a unit vector are small, and the term of exponent 1 is most of a sum: two keys that put it in the same
    place, one pair in m, give templates that are nearly parallel or opposite.
    """

    name = "polyprotect"
    summary = "template of polynomials of consecutive values of the embedding, stored beside the client's key"
    reference = "Krivokuca Hahn and Marcel, PolyProtect, IEEE TBIOM 4(1), 2022"
    fidelity = "faithful"
    hidden = "nothing but what fewer equations than unknowns leave open; the key lies beside the template"
    weakened: ClassVar[Mapping[str, Any]] = {"overlap": 4}
    key_stored = True
    Options = PolyProtectOptions
    options: PolyProtectOptions

    @property
    def _step(self) -> int:
        return self.options.m - self.options.overlap

    @property
    def template_size(self) -> int:
        """T, the windows that it takes to reach the last value."""
        return math.ceil(max(0, self.embedding_size - self.options.m) / self._step) + 1

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """The template, and a byte for each number of the key."""
        return self.template_size * dtype.itemsize + 2 * self.options.m

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor:
        """Coefficients, then exponents: int64 (count, 2 m)."""

        def orders(size: int) -> Tensor:
            drawn = torch.rand(count, size, generator=generator, device=generator.device)
            return drawn.argsort(dim=1)[:, : self.options.m].cpu()

        coefficients = orders(2 * _LARGEST) - _LARGEST
        return torch.cat((coefficients + (coefficients >= 0), orders(self.options.m) + 1), dim=1)

    def expand(self, key: Tensor) -> Tensor:
        """Coefficients and exponents, float32 (2, m).

        Raises:
            ValueError: coefficients are not distinct, or not in -50..50 but 0, or exponents no permutation of 1..m.
        """
        coefficients, exponents = (half.tolist() for half in key.chunk(2))
        if len(set(coefficients)) < len(coefficients) or not all(0 < abs(c) <= _LARGEST for c in coefficients):
            allowed = f"-{_LARGEST}..{_LARGEST} but 0"
            raise ValueError(f"{self.name} needs different coefficients in {allowed}, got {coefficients}")
        if sorted(exponents) != list(range(1, self.options.m + 1)):
            raise ValueError(f"{self.name} needs exponents 1..{self.options.m} in any order, got {exponents}")
        return key.view(2, -1).float()

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Polynomials (N, T) of embeddings (N, D); differentiable."""
        unit = self.checked(embeddings)
        return self._polynomials(unit[:, None], self.secrets(keys, unit))[:, 0]

    def _polynomials(self, embeddings: Tensor, secrets: Tensor) -> Tensor:
        """(N, S, T) of embeddings (N, S, D) under coefficients and exponents (N, 2, m)."""
        coefficients, exponents = secrets.view(len(embeddings), 2, 1, 1, self.options.m).unbind(1)
        length = (self.template_size - 1) * self._step + self.options.m
        windows = functional.pad(embeddings, (0, length - embeddings.shape[2])).unfold(2, self.options.m, self._step)
        return (coefficients * windows.pow(exponents)).sum(dim=3)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosine (N,), in [-1, 1]."""
        self.same_system(first, second)
        return functional.cosine_similarity(first, second, dim=1)

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit:
        """Squared distance of the templates, relative to the square of the stored one."""
        secrets, stored = self.secrets(keys, templates), templates[:, None]
        scale = stored.square().sum(dim=2).clamp(min=1e-12)

        def misfit(embeddings: Tensor) -> Tensor:
            return (self._polynomials(embeddings, secrets) - stored).square().sum(dim=2) / scale

        return misfit

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor:
        """What the terms of exponent 1 alone would be, (N, D); 0 where no window puts a value there."""
        coefficients, exponents = self.secrets(keys, templates).unbind(1)
        linear = exponents.argmin(dim=1, keepdim=True)
        places = linear + self._step * torch.arange(self.template_size, device=templates.device)
        reached = templates.new_zeros(len(templates), int(places.max()) + 1 if places.numel() else 0)
        reached = reached.scatter(1, places, templates / coefficients.gather(1, linear))
        return functional.pad(reached, (0, self.embedding_size))[:, : self.embedding_size]
