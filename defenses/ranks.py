"""Defences that send a subset of the frequency channels, and their ranks {S, P}: which channels are kept, how they are
split into subsets, how they are permuted.

Mi et al., *Privacy-Preserving Face Recognition Using Random Frequency Components* (PartialFace), ICCV 2023,
section 3.3; the official tables are those of the released code.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from bench.randomness import drawn_seed
from defenses.base import Defense, DefenseOptions, Shape, pure
from defenses.frequency import CHANNELS, COLOURS, FrequencyOperator, block_dct, map_size, zigzag

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


def comma_separated(value: Any) -> Any:
    """``"0,1,2"``, as the command line passes it, to its parts; anything else as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


#: Factors by which a face is up-sampled before its block DCT. A Literal of integers takes no strings, which is what the
#: command line passes.
Upsampling = Annotated[Literal[1, 2, 3, 4, 8], BeforeValidator(_whole)]
UPSAMPLING_MEANS = (
    "factor by which a face is up-sampled before its 8x8 block DCT: 8 as published, a block for each pixel; 1 is the "
    "block DCT of JPEG. Sends (factor / 8)^2 of the numbers"
)

#: A list of channel indices; on the command line ``0,1,2``.
ChannelList = Annotated[tuple[Annotated[int, Field(ge=0, lt=CHANNELS)], ...], BeforeValidator(comma_separated)]


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
    upsampling: Upsampling = Field(default=8, description=UPSAMPLING_MEANS)

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
        pruned = zigzag(OFFICIAL_SIGMA if self.sigma is None else self.sigma) if self.pruned is None else self.pruned
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

    def with_random_tables(self, seed: int) -> Self:
        """These options with as many subsets, drawn by ``seed``."""
        return self.model_copy(update={"tables": "random", "table_seed": seed})


def random_permutations(size: int, count: int, seed: int) -> Tensor:
    """``count`` distinct ones of the ``size`` factorial permutations of channels, int64 (count, size)."""
    # A stream of its own: the permutations of a seed do not depend on how its subsets were drawn.
    generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(torch.randperm(size, generator=generator).tolist())] = None
    return torch.tensor(list(drawn))


class FrequencySubset(Defense):
    """Sends s of the d kept channels of each colour: (N, 3s, h, h), colour-major, un-normalised block-DCT coefficients.

    h is the side of the face where it is up-sampled x8, as published, and ceil(factor H / 8) at other factors. A
    subclass says which channels (:meth:`sent`), whether they depend on the state or not.
    """

    options: SubsetOptions
    kept_channels: Tensor

    @abstractmethod
    def sent(self, state: Tensor | None, count: int) -> Tensor:
        """Indices into the kept channels in output order, int64 (N, s), or (s,) for all faces.

        Raises:
            ValueError: ``state`` is not one state of the defence for each of ``count`` faces.
        """

    @property
    def representation_shape(self) -> Shape:
        """(3s, h, h)."""
        side = map_size(self.image_size, self.options.upsampling)
        return (COLOURS * self.options.subset_size, side, side)

    @pure
    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        channels = self.kept_channels[self.sent(state, len(faces))]
        return block_dct(faces, channels, upsampling=self.options.upsampling, known=True)

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        indices = self.sent(None if state is None else state[None], 1)
        return FrequencyOperator(
            self.image_size, self.kept_channels[indices].flatten(), upsampling=self.options.upsampling
        )

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Each map back at its own frequency: (N, 3s, h, w) to (N, 3d, h, w), colour-major, zero elsewhere.

        Raises:
            ValueError: shapes that do not fit, or ``state`` is not one state per representation.
        """
        if representation.ndim != 4 or representation.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, h, w), got {tuple(representation.shape)}")
        indices = self.sent(state, len(representation)).to(representation.device)
        maps: Tensor = representation.unflatten(1, (COLOURS, -1))
        canonical = maps.new_zeros(*maps.shape[:2], len(self.kept_channels), *maps.shape[3:])
        target = indices.view(-1, 1, maps.shape[2], 1, 1).expand(maps.shape)
        return canonical.scatter(2, target, maps).flatten(1, 2)

    def guess(self, generator: torch.Generator) -> Self:
        """The same mechanism with tables drawn at random, as large as these."""
        seed = drawn_seed(generator)
        return self._imitation(self.options.with_random_tables(seed))

    def _imitation(self, options: DefenseOptions) -> Self:
        return type(self)(options, image_size=self.image_size).to(self.kept_channels.device)

    def _subsets_of(self, layouts: Tensor) -> Tensor:
        """The indices into the kept channels, int64 (K, s), that ``layouts`` send of every colour: their majority's.

        ``layouts`` are int64 (K, 3s), canonical channels, colour-major.

        Raises:
            ValueError: ``layouts`` has another shape or type, lies outside 0..3d-1, or a row names a channel twice.
        """
        kept, size = len(self.kept_channels), self.options.subset_size
        if layouts.dtype != torch.int64 or layouts.ndim != 2 or layouts.shape[1] != COLOURS * size or not len(layouts):
            raise ValueError(f"layouts must be int64 (K, {COLOURS * size}), got {layouts.dtype} {tuple(layouts.shape)}")
        if int(layouts.min()) < 0 or int(layouts.max()) >= COLOURS * kept:
            raise ValueError(f"layouts must lie in 0..{COLOURS * kept - 1}")
        rows = (layouts % kept).view(-1, COLOURS, size).mode(dim=1).values
        if any(len(set(row)) < size for row in rows.tolist()):
            raise ValueError("a row of layouts names a channel twice")
        return rows.to(self.kept_channels.device)
