"""Fixed subset: PartialFace without its randomness, one S for every image ('vanilla' in the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from defenses.base import Defense, DefenseOptions
from defenses.frequency import COLOURS, FrequencyOperator, block_dct
from defenses.ranks import SubsetOptions, draw_seed, subsets_of_layouts


class FixedSubsetOptions(SubsetOptions):
    """Options of :class:`FixedSubset`."""

    subset: int = Field(default=0, ge=0, description="which subset of the table, 0..m-1")

    @model_validator(mode="after")
    def _subset_exists(self) -> Self:
        if self.subset >= self.n_subsets:
            raise ValueError(f"subset must be in 0..{self.n_subsets - 1}, got {self.subset}")
        return self


class FixedSubset(Defense):
    """The same s channels of each colour for every face: (N, 3s, H, W), colour-major, un-normalised."""

    name = "fixed-subset"
    summary = "one fixed subset of the frequency channels"
    reference = "baseline of PartialFace, Mi et al., ICCV 2023"
    Options = FixedSubsetOptions
    options: FixedSubsetOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.kept_channels: Tensor
        self.subset_channels: Tensor
        self.register_buffer("kept_channels", torch.tensor(self.options.kept_channels), persistent=False)
        subset = self.options.subset_table()[self.options.subset]
        self.register_buffer("subset_channels", self.kept_channels[subset])

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        """(3s, H, W)."""
        return (COLOURS * self.options.subset_size, self.image_size, self.image_size)

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """``channels``: int64 (s,), the subset in output order."""
        return {"channels": self.subset_channels}

    def guess(self, generator: torch.Generator) -> Self:
        """A subset of a random table."""
        update = {"tables": "random", "table_seed": draw_seed(generator)}
        return type(self)(self.options.model_copy(update=update), image_size=self.image_size)

    def with_layouts(self, layouts: Tensor) -> Self:
        """The mechanism that sends the canonical channels ``layouts[0]``, int64 (1, 3s).

        Raises:
            ValueError: more than one layout, or as :func:`~defenses.ranks.subsets_of_layouts`.
        """
        if len(layouts) != 1:
            raise ValueError(f"{self.name} has one layout, got {len(layouts)}")
        (subset,) = subsets_of_layouts(layouts, len(self.kept_channels), self.options.subset_size)
        imitation = type(self)(self.options, image_size=self.image_size).to(self.kept_channels.device)
        imitation.subset_channels = imitation.kept_channels[subset.to(self.kept_channels.device)]
        return imitation

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Each map back at its own frequency among the kept ones: (N, 3s, h, w) to (N, 3d, h, w), zero elsewhere."""
        kept = self.kept_channels
        own = torch.searchsorted(kept, self.subset_channels)
        target = torch.cat([colour * len(kept) + own for colour in range(COLOURS)]).to(representation.device)
        shape = (len(representation), COLOURS * len(kept), *representation.shape[2:])
        return representation.new_zeros(shape).index_copy(1, target, representation)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """The subset's channels, (N, 3s, H, W)."""
        return block_dct(faces, self.subset_channels)

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        """The transform of the subset."""
        return FrequencyOperator(self.image_size, self.subset_channels)
