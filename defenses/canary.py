"""Canaries: maps that hide nothing, to find out whether an attack works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, LinearOperator
from defenses.linear import SeparableOperator

#: What neighbouring rows and columns add to each other: the map's eigenvalues lie between (1 - 2 w)^2 and (1 + 2 w)^2.
_NEIGHBOUR = 0.25
#: How colours are mixed: a circulant matrix, whose least singular value is .44.
_COLOURS = ((0.6, 0.3, 0.1), (0.1, 0.6, 0.3), (0.3, 0.1, 0.6))
_LEAST_GAIN, _MOST_GAIN = 0.5, 1.5


class CanaryOptions(DefenseOptions):
    """Options of :class:`Canary`."""

    kind: Literal["mixture", "affine", "permutation"] = Field(
        default="mixture",
        description="mixture: pixels with their neighbours, and colours, under one invertible linear map; affine: "
        "another gain (.5 to 1.5) for each face and another shift for each of its colours; permutation: all pixels in "
        "one other order, each with its colours",
    )
    shift: float = Field(2.0, ge=0, le=1e6, description="of affine: the largest shift either way, drawn uniformly")
    declared: bool = Field(True, description="whether a linear kind tells its map, as linear_operator")


@dataclass(frozen=True, eq=False)
class _Mixture(SeparableOperator):
    """Colours mixed, then z_c = factor x_c factor^T."""

    @property
    def colour(self) -> Tensor:
        """float64 (3, 3)."""
        return torch.tensor(_COLOURS, dtype=torch.float64)

    def __call__(self, faces: Tensor) -> Tensor:
        return super().__call__(torch.einsum("pc,nchw->nphw", self.colour.to(faces), faces))

    def adjoint(self, representation: Tensor) -> Tensor:
        return torch.einsum("pc,nphw->nchw", self.colour.to(representation), super().adjoint(representation))


@dataclass(frozen=True, eq=False)
class _Permutation:
    """Pixel i goes to where ``order``, int64 (H W,), has it; the inverse is the adjoint."""

    order: Tensor

    @property
    def offset(self) -> Tensor:
        """Zero, float64 (1, 1, 1)."""
        return torch.zeros(1, 1, 1, dtype=torch.float64)

    def __call__(self, faces: Tensor) -> Tensor:
        return faces.flatten(2)[..., self.order.to(faces.device)].view_as(faces)

    def adjoint(self, representation: Tensor) -> Tensor:
        return representation.flatten(2)[..., self.order.argsort().to(representation.device)].view_as(representation)


class Canary(Defense):
    """No defence at all: an invertible map, on which an attack that says so has to get in.

    ``none`` shows little of an attack: one that returns what it was sent opens it. Nothing of a face is lost in
    these: what an attack does not get back here it lacks itself. A run against a canary that an attack claims
    (:attr:`attacks.base.RecoveryAttack.opens`) calls the attack broken where it is no better than a floor.
    """

    name = "canary"
    summary = "no protection: an invertible map to check attacks with (mixture, affine, permutation)"
    Options = CanaryOptions
    options: CanaryOptions
    order: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        order = torch.randperm(image_size**2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order, persistent=False)

    @property
    def canary(self) -> str:
        """Its kind."""
        return self.options.kind

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """The faces (N, 3, H, W) under the map; what ``affine`` draws is drawn in float32 on the generator's device."""
        if (operator := self._operator()) is not None:
            return operator(faces)
        drawn = torch.rand(len(faces), 4, 1, 1, generator=generator, device=generator.device).to(faces)
        gain = _LEAST_GAIN + (_MOST_GAIN - _LEAST_GAIN) * drawn[:, :1]
        return gain * faces + self.options.shift * (2 * drawn[:, 1:] - 1)

    def linear_operator(self, state: Tensor | None) -> LinearOperator | None:
        return self._operator() if self.options.declared else None

    def _operator(self) -> LinearOperator | None:
        size = self.image_size
        if self.options.kind == "mixture":
            beside = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
            return _Mixture(torch.eye(size, dtype=torch.float64) + _NEIGHBOUR * (beside + beside.T))
        return _Permutation(self.order) if self.options.kind == "permutation" else None
