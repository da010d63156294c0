"""Linear maps that several defences have in common: separable, z_c = R x_c C^T, and element by element."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True, eq=False)
class SeparableTerms:
    """z = sum over terms t of M_t (F_t x F_t^T), plus ``offset``: a :class:`~defenses.base.LinearOperator`.

    What a filter takes away from a face is such a sum: the face less what passes.

    Attributes:
        colours: M_t, float64 (T, C, 3), which mix the colours.
        factors: F_t, float64 (T, h, H), which filter rows and columns alike.
        offset: broadcastable to (C, h, h).
    """

    colours: Tensor
    factors: Tensor
    offset: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, dtype=torch.float64))

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, C, h, h), dtype and device kept."""
        colours, factors = self.colours.to(faces), self.factors.to(faces)[:, None]
        with torch.autocast(faces.device.type, enabled=False):  # a defence means the same at every training precision
            return torch.einsum("tpc,ntchw->nphw", colours, factors @ faces[:, None] @ factors.mT)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, C, h, h) to (N, 3, H, H)."""
        colours, factors = self.colours.to(representation), self.factors.to(representation)[:, None]
        with torch.autocast(representation.device.type, enabled=False):
            terms = torch.einsum("tpc,nphw->ntchw", colours, representation)
            return (factors.mT @ terms @ factors).sum(dim=1)


def area_matrix(cells: int, size: int) -> Tensor:
    """Averages ``size`` pixels over ``cells`` equal intervals, float64 (cells, size); edge pixels count in part."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * size / cells
    pixels = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * cells / size


def mosaic_matrix(size: int, block: int) -> Tensor:
    """Each pixel becomes the mean of its block, float64 (size, size); the last block may be narrower."""
    blocks = torch.arange(size) // block
    same = (blocks[:, None] == blocks).double()
    return same / same.sum(dim=1, keepdim=True)


def blur_matrix(size: int, sigma: float | Tensor, radius: int) -> Tensor:
    """Gaussian filtering of one axis with mirrored borders (the edge pixel not repeated), float64 (size, size).

    Of several ``sigma``, any shape, the matrices: (*shape, size, size).
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64, device=sigma.device)
    kernel = torch.softmax(-0.5 * (distance / sigma[..., None]) ** 2, dim=-1)
    source = torch.arange(size, device=sigma.device)[:, None] + distance.to(torch.int64)
    period = 2 * (size - 1)
    source = source.remainder(period)
    source = torch.minimum(source, period - source)
    shape = (*sigma.shape, *source.shape)
    matrix = torch.zeros(*sigma.shape, size, size, dtype=torch.float64, device=sigma.device)
    return matrix.scatter_add_(-1, source.expand(shape), kernel[..., None, :].expand(shape))


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
