"""IoM hashing: a template tells which of several random projections of the embedding is largest, again and again.

Jin, Hwang, Lai, Kim and Teoh, *Ranking-based Locality Sensitive Hashing-enabled Cancelable Biometrics: Index-of-Max
Hashing*, IEEE TIFS 13(2), 2018, and the code that its authors released.
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

#: How far ahead of the others the chosen value must be to fit, in standard deviations of the values.
_MARGIN = 0.01
#: Codes and choices, as published.
_CODES = {"grp": 300, "urp": 600}
_CHOICES = {"grp": 16, "urp": 128}


class IoMOptions(DefenseOptions):
    hashing: Literal["grp", "urp"] = Field(
        default="grp",
        description="what is compared. grp: Gaussian random projections; urp: products of values that random "
        "permutations bring together",
    )
    codes: int | None = Field(
        default=None, ge=1, le=8192, description="indices in a template; none: as published, 300 of grp, 600 of urp"
    )
    choices: int | None = Field(
        default=None,
        ge=2,
        le=1024,
        description="values of which one is largest; none: as published, 16 of grp, 128 of urp, of a small embedding "
        "half its values",
    )
    products: int = Field(default=2, ge=1, le=8, description="factors of a product (urp)")


class IoM(TemplateDefense):
    """Indices of the largest of some keyed values of the embedding: (N, codes, 1, 1), each in 0..choices-1.

    Under ``grp`` the values are projections on Gaussian directions. Under ``urp`` the embedding is permuted a few
    times, what comes to lie in one place is multiplied, and the first ``choices`` products are compared; of an even
    number of factors an embedding and its negative have one template. Two templates are compared by the share of
    equal indices. Under different keys that is one in ``choices``, whoever is on them. Who has stolen the key has
    choices - 1 inequalities on the embedding of every code.
    """

    name = "iom"
    summary = "template of indices: which of several random values of the embedding, each client's key, is largest"
    reference = "Jin et al., Index-of-Max Hashing, IEEE TIFS 13(2), 2018"
    fidelity = "faithful"
    hidden = "key: the projections or permutations"
    weakened: ClassVar[Mapping[str, Any]] = {"codes": 2048}
    departures: ClassVar[Mapping[str, str]] = {
        "choices=50": "released code compares 50 Gaussian projections, the paper 16"
    }
    differentiable = False
    Options = IoMOptions
    options: IoMOptions

    @property
    def template_size(self) -> int:
        """The number of codes."""
        return self.options.codes or _CODES[self.options.hashing]

    @property
    def choices(self) -> int:
        """How many values are compared.

        Raises:
            ValueError: more products than the embedding has values.
        """
        hashing, asked = self.options.hashing, self.options.choices
        if hashing == "urp" and asked is not None and asked > self.embedding_size:
            raise ValueError(f"{self.name}: choices={asked} products of an embedding of {self.embedding_size} values")
        return asked or (min(_CHOICES["urp"], self.embedding_size // 2) if hashing == "urp" else _CHOICES["grp"])

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """log2(choices) bits a code."""
        return math.ceil(self.template_size * math.log2(self.choices) / 8)

    def expand(self, key: Tensor) -> Tensor:
        """Directions as columns (D, codes * choices), or the places of factors, (codes, products, choices)."""
        draws = torch.Generator().manual_seed(int(key))
        codes, choices = self.template_size, self.choices
        if self.options.hashing == "grp":
            return torch.randn(self.embedding_size, codes * choices, generator=draws)
        ranks = torch.rand(codes, self.options.products, self.embedding_size, generator=draws)
        return ranks.argsort(dim=2)[..., :choices].float()

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Codes (N, codes) of embeddings (N, D)."""
        unit = self.checked(embeddings)
        return self.by_key(
            keys, unit, lambda rows, secret: self._values(rows[None], secret[None])[0].argmax(dim=2).to(unit)
        )

    def _values(self, embeddings: Tensor, secrets: Tensor) -> Tensor:
        """What is compared, of variance 1 about, (K, n, codes, choices), of n embeddings (K, n, D) under K keys."""
        if self.options.hashing == "grp":
            projections: Tensor = (embeddings @ secrets).unflatten(-1, (self.template_size, self.choices))
            return projections
        places = secrets.long().flatten(1)[:, None].expand(-1, embeddings.shape[1], -1)
        factors = (embeddings * math.sqrt(self.embedding_size)).gather(2, places)
        products: Tensor = factors.unflatten(-1, secrets.shape[1:]).prod(dim=3)
        return products

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Share of equal codes (N,), in [0, 1]."""
        self.same_system(first, second)
        return (first == second).float().mean(dim=1)

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit:
        """Mean over the codes of how far the largest other value is ahead of the chosen one, in standard deviations."""
        secrets, chosen = self.secrets(keys, templates), templates.long()[:, None, :, None]

        def misfit(embeddings: Tensor) -> Tensor:
            values = self._values(embeddings, secrets)
            own = chosen.expand(-1, embeddings.shape[1], -1, -1)
            ahead = values.scatter(3, own, -torch.inf).amax(dim=3) - values.gather(3, own)[..., 0]
            return functional.relu(_MARGIN + ahead).mean(dim=2)

        return misfit

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor | None:
        """About the embeddings, (N, D); under ``urp`` of two factors up to the sign, of other numbers None.

        Under ``grp`` the mean of the chosen directions less that of all. Of two factors, chosen pairs (i, j) have large
        v_i v_j: the first eigenvector of how often which pair was.
        """
        size, secrets = self.embedding_size, self.secrets(keys, templates)
        if self.options.hashing == "grp":
            directions = secrets.view(-1, size, self.template_size, self.choices)
            chosen = templates.long()[:, None, :, None].expand(-1, size, -1, -1)
            return directions.gather(3, chosen).mean(dim=(2, 3)) - directions.mean(dim=(2, 3))
        if self.options.products != 2:
            return None
        places = secrets.long().gather(3, templates.long()[:, :, None, None].expand(-1, -1, 2, -1))[..., 0]
        pairs = torch.full((len(templates), size * size), -self.template_size / size**2).to(templates)
        pairs = pairs.scatter_add(1, places[..., 0] * size + places[..., 1], torch.ones_like(templates))
        counts = pairs.view(-1, size, size)
        vectors: Tensor = torch.linalg.eigh(counts + counts.mT).eigenvectors
        return vectors[..., -1]
