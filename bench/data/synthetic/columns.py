"""Tables of named random parameters: how the columns of identities and conditions are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Law = Callable[[Tensor], Tensor]
"""Maps uniform numbers in [0, 1) to the values of one column (an inverse distribution function)."""


def uniform(low: float, high: float) -> Law:
    """Uniform in [low, high)."""
    return lambda u: low + (high - low) * u


def bell(mean: float, deviation: float) -> Law:
    """Normal, cut at two deviations (the tails are what makes a face implausible)."""
    return lambda u: mean + deviation * torch.special.ndtri(0.02275 + 0.9545 * u)


def coin(probability: float) -> Law:
    """1 with the given probability, else 0."""
    return lambda u: (u < probability).to(u.dtype)


@dataclass(frozen=True, slots=True)
class Table:
    """N rows of named scalar parameters.

    Attributes:
        values: float32 (N, D).
        columns: position of each name in the D columns.
    """

    values: Tensor
    columns: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.columns):
            raise ValueError(f"values must be (N, {len(self.columns)}), got {tuple(self.values.shape)}")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> Tensor:
        """Column ``name`` as (N, 1, 1), ready to broadcast over pixels."""
        return self.values[:, self.columns[name], None, None]

    def rows(self, index: Tensor | slice) -> Self:
        """The rows at ``index``."""
        return type(self)(self.values[index], self.columns)

    def to(self, device: torch.device | str) -> Self:
        """The table on ``device``."""
        return type(self)(self.values.to(device), self.columns)


def draw(laws: Mapping[str, Law], n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``n`` draws of every law, float64 (n,) each.

    One uniform (n, D) matrix is filled row by row, so that the first rows do not depend on ``n``.
    """
    u = torch.rand((n, len(laws)), generator=generator, dtype=torch.float64)
    return {name: law(u[:, i]) for i, (name, law) in enumerate(laws.items())}


def stack(values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
    """Columns (N,) to one float32 (N, D) matrix and the position of each name."""
    matrix = torch.stack(list(values.values()), dim=1).to(torch.float32)
    return matrix, {name: i for i, name in enumerate(values)}
