"""Random projection: a template is the signs of the embedding under a rotation that each client draws for itself.

Jin, Ling and Goh, *BioHashing*, Pattern Recognition 37(11), 2004. The rotation is H D3 H D2 H D1, with random signs D
and the Hadamard matrix H (Andoni et al., *Practical and Optimal LSH for Angular Distance*, NeurIPS 2015).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from pydantic import Field
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional

from defenses.base import DefenseOptions, Shape, TemplateDefense

_ROUNDS = 3


class RandomProjectionOptions(DefenseOptions):
    bits: int = Field(default=256, ge=8, le=4096, description="bits of a template")


class RandomProjection(TemplateDefense):
    """Signs of a keyed rotation of the embedding: (N, bits, 1, 1), each +-1 / sqrt(bits).

    Two templates are compared by the share of equal bits, which under one key tells the angle between the embeddings (1
    - angle / pi). Under different keys they agree in half of the bits, whoever is on them, so that a template can be
    revoked. Who has stolen the key can undo the rotation, and has the embedding up to the lengths of its coordinates.
    """

    name = "random-projection"
    summary = "template of sign bits under a rotation that is each client's key"
    reference = "Jin, Ling and Goh, BioHashing, Pattern Recognition 37(11), 2004"
    differentiable = False
    Options = RandomProjectionOptions
    options: RandomProjectionOptions

    @property
    def representation_shape(self) -> Shape:
        """(bits, 1, 1)."""
        return (self.options.bits, 1, 1)

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """A bit is sent as a bit."""
        return math.ceil(self.options.bits / 8)

    @property
    def size(self) -> int:
        """P, the power of two in which vectors are rotated: room for the embedding and for the bits."""
        return int(2 ** math.ceil(math.log2(max(self.options.bits, self.embedding_size, 2))))

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor:
        """The signs D1, D2, D3 as bits, int64 (count, 3 P)."""
        return torch.randint(2, (count, _ROUNDS * self.size), generator=generator, device=generator.device).cpu()

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Signs of the first coordinates of the rotated embeddings; unit rows (N, bits)."""
        rotated = functional.pad(embeddings, (0, self.size - embeddings.shape[1]))
        for signs in self._signs(keys, embeddings):
            rotated = (signs * rotated) @ _hadamard(self.size, embeddings.dtype, embeddings.device)
        bits = self.options.bits
        return torch.where(rotated[:, :bits] >= 0, 1.0, -1.0).to(embeddings) / math.sqrt(bits)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Share of equal bits (N,), in [0, 1]."""
        return ((first > 0) == (second > 0)).float().mean(dim=1)

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor:
        """The templates rotated back, (N, D): the pseudo-inverse of the projection."""
        rotated = functional.pad(templates, (0, self.size - templates.shape[1]))
        for signs in reversed(self._signs(keys, templates)):
            rotated = signs * (rotated @ _hadamard(self.size, templates.dtype, templates.device))
        return rotated[:, : self.embedding_size]

    def _signs(self, keys: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        expected = (len(like), _ROUNDS * self.size)
        if keys is None or tuple(keys.shape) != expected:
            raise ValueError(
                f"{self.name} needs keys int64 {expected}, got {None if keys is None else tuple(keys.shape)}"
            )
        return (2 * keys.to(like) - 1).chunk(_ROUNDS, dim=1)


@lru_cache(maxsize=4)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix as an orthogonal, symmetric one, (size, size)."""
    with torch.inference_mode(False):  # the cache outlives the caller's inference mode
        return torch.from_numpy(hadamard(size) / math.sqrt(size)).to(device, dtype)
