"""Ranks {S, P}: which frequency channels are kept, how they are split into subsets, how they are permuted.

Mi et al., *Privacy-Preserving Face Recognition Using Random Frequency Components* (PartialFace), ICCV 2023,
section 3.3; the official tables are those of the released code.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from defenses.base import DefenseOptions
from defenses.frequency import CHANNELS, COLOURS, zigzag

Tables = Literal["official", "random"]

#: Indices into the 54 kept channels; the rows partition them.
OFFICIAL_SUBSETS = (
    (1, 24, 28, 12, 32, 45, 47, 40, 52),
    (35, 39, 44, 42, 10, 4, 37, 31, 53),
    (0, 50, 19, 6, 22, 51, 49, 23, 21),
    (38, 8, 25, 13, 17, 30, 7, 33, 9),
    (26, 29, 16, 2, 43, 14, 5, 11, 48),
    (36, 41, 46, 34, 15, 27, 18, 20, 3),
)
#: Output j takes input P[j].
OFFICIAL_PERMUTATIONS = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8),
    (7, 3, 0, 6, 5, 4, 1, 2, 8),
    (4, 8, 6, 0, 2, 5, 3, 7, 1),
)
#: sigma of the paper: the ten lowest frequencies u + v <= 3 hold over 95 % of the energy.
OFFICIAL_SIGMA = 10
PAPER_PERMUTATIONS = 6

#: Seeds that torch.Generator takes and JSON keeps.
Seed = Annotated[int, Field(ge=0, lt=2**53)]


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


#: A list of channel indices; on the command line ``0,1,2``.
ChannelList = Annotated[tuple[Annotated[int, Field(ge=0, lt=CHANNELS)], ...], BeforeValidator(_split)]


class SubsetOptions(DefenseOptions):
    """How the channels are pruned and split into subsets.

    Natural images hold their energy in the lowest frequencies; the first ten are the published triangle u + v <= 3.
    """

    sigma: int | None = Field(
        default=None,
        ge=0,
        lt=CHANNELS,
        description="channels pruned of each colour, the lowest first in JPEG's zig-zag order; none: as many as pruned "
        "lists, else 10",
    )
    pruned: ChannelList | None = Field(default=None, description="pruned channels, 8u + v; none: chosen by sigma")
    subset_size: int = Field(default=9, ge=1, le=CHANNELS, description="s, channels kept of each colour")
    tables: Tables = Field(
        default="official",
        description="official: the split of the released code (sigma 10, s 9); random: by table_seed",
    )
    table_seed: Seed = Field(default=0, description="seed of the random tables")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pruned is not None:
            if len(set(self.pruned)) != len(self.pruned):
                raise ValueError("pruned lists a channel twice")
            if self.sigma is not None and self.sigma != len(self.pruned):
                raise ValueError(f"sigma={self.sigma} contradicts the {len(self.pruned)} channels in pruned; give one")
        kept = len(self.kept_channels)
        if self.subset_size > kept:
            raise ValueError(f"subset_size={self.subset_size} exceeds the {kept} channels left after pruning")
        if self.tables == "official":
            size = len(OFFICIAL_SUBSETS[0])
            if kept != len(OFFICIAL_SUBSETS) * size or self.subset_size != size:
                raise ValueError(
                    f"the official tables split 54 channels into subsets of 9, not {kept} into subsets of "
                    f"{self.subset_size}; use tables=random"
                )
        return self

    @property
    def kept_channels(self) -> tuple[int, ...]:
        """Channels left after pruning, ascending."""
        pruned = self.pruned
        if pruned is None:
            pruned = tuple(zigzag(OFFICIAL_SIGMA if self.sigma is None else self.sigma))
        return tuple(sorted(set(range(CHANNELS)) - set(pruned)))

    @property
    def n_subsets(self) -> int:
        """m: as many whole subsets as the kept channels fill.

        Where s does not divide them, the remaining ones, chosen by the table's random order, belong to no subset.
        """
        return len(self.kept_channels) // self.subset_size

    def subset_table(self) -> Tensor:
        """int64 (m, s), indices into :attr:`kept_channels`; rows are disjoint."""
        if self.tables == "official":
            return torch.tensor(OFFICIAL_SUBSETS)
        order = torch.randperm(len(self.kept_channels), generator=torch.Generator().manual_seed(self.table_seed))
        return order[: self.n_subsets * self.subset_size].view(self.n_subsets, self.subset_size)


def random_permutations(size: int, count: int, seed: int) -> Tensor:
    """``count`` distinct permutations of ``size`` channels, int64 (count, size).

    Raises:
        ValueError: there are fewer than ``count``.
    """
    if count > math.factorial(size):
        raise ValueError(f"{size} channels have only {math.factorial(size)} permutations, not {count}")
    # A stream of its own: the permutations of a seed do not depend on how its subsets were drawn.
    generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(torch.randperm(size, generator=generator).tolist())] = None
    return torch.tensor(list(drawn))


def draw_seed(generator: torch.Generator) -> int:
    """A table seed drawn from ``generator``, for an adversary who guesses the tables."""
    return int(torch.randint(2**53, (1,), generator=generator, device=generator.device))


def subsets_of_layouts(layouts: Tensor, kept: int, size: int) -> Tensor:
    """The kept channels, int64 (K, s) in 0..d-1, that ``layouts`` send of every colour; their majority decides.

    Args:
        layouts: int64 (K, 3s), canonical channels, colour-major.
        kept: d, the kept channels of a colour.
        size: s.

    Raises:
        ValueError: ``layouts`` has another shape or type, lies outside 0..3d-1, or a row names a channel twice.
    """
    if layouts.dtype != torch.int64 or layouts.ndim != 2 or layouts.shape[1] != COLOURS * size or not len(layouts):
        raise ValueError(f"layouts must be int64 (K, {COLOURS * size}), got {layouts.dtype} {tuple(layouts.shape)}")
    if int(layouts.min()) < 0 or int(layouts.max()) >= COLOURS * kept:
        raise ValueError(f"layouts must lie in 0..{COLOURS * kept - 1}")
    rows = (layouts % kept).view(-1, COLOURS, size).mode(dim=1).values
    if any(len(set(row)) < size for row in rows.tolist()):
        raise ValueError("a row of layouts names a channel twice")
    return rows
