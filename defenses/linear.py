"""Linear maps that several defences have in common: separable, z_c = R x_c C^T, and element by element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.base import Defense


@dataclass(frozen=True, eq=False)
class SeparableOperator:
    """z_c = factor x_c factor^T for each colour, ``factor`` float64 (h, H): a :class:`~defenses.base.SeparableSum`."""

    factor: Tensor

    @property
    def offset(self) -> Tensor:
        """Zero, float64 (1, 1, 1): the map is linear."""
        return torch.zeros(1, 1, 1, dtype=torch.float64)

    @property
    def row_factors(self) -> Tensor:
        return self.factor[None]

    @property
    def column_factors(self) -> Tensor:
        return self.factor[None]

    @property
    def colour(self) -> Tensor:
        """Colours are left as they are, float64 (3, 3)."""
        return torch.eye(3, dtype=torch.float64)

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, 3, h, h), dtype and device kept."""
        return _both_axes(faces, self.factor)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, 3, h, h) to (N, 3, H, H)."""
        return _both_axes(representation, self.factor.T)


def _both_axes(x: Tensor, factor: Tensor) -> Tensor:
    if x.ndim != 4 or tuple(x.shape[2:]) != (factor.shape[1],) * 2:
        raise ValueError(f"expected (N, 3, {factor.shape[1]}, {factor.shape[1]}), got {tuple(x.shape)}")
    factor = factor.to(x)
    with torch.autocast(x.device.type, enabled=False):  # a defence means the same at every training precision
        return factor @ x @ factor.T


class IdentityOperator(SeparableOperator):
    """The face itself, of H = ``size`` pixels a side."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.eye(size, dtype=torch.float64))

    def __call__(self, faces: Tensor) -> Tensor:
        return faces

    def adjoint(self, representation: Tensor) -> Tensor:
        return representation


@dataclass(frozen=True, eq=False)
class ElementwiseOperator:
    """z = gain x + offset, element by element: a :class:`~defenses.base.LinearOperator`.

    ``gain`` and ``offset``, float (3, H, W) or broadcastable to it.
    """

    gain: Tensor
    offset: Tensor

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, W) to the same, dtype and device kept."""
        return self.gain.to(faces) * faces

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: a diagonal map is its own adjoint."""
        return self(representation)


class SeparableDefense(Defense):
    """Filters rows and columns alike by one matrix, which a subclass registers as the buffer ``factor``."""

    factor: Tensor

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.linear_operator(state)(faces)

    def linear_operator(self, state: Tensor | None) -> SeparableOperator:
        return SeparableOperator(self.factor)
