"""Fixed subset: PartialFace without its randomness, one S for every image ('vanilla' in the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from defenses.base import DefenseOptions
from defenses.ranks import FrequencySubset, SubsetOptions


class FixedSubsetOptions(SubsetOptions):
    subset: int = Field(default=0, ge=0, description="which subset of the table, 0..m-1")

    @model_validator(mode="after")
    def _subset_exists(self) -> Self:
        if self.subset >= self.n_subsets:
            raise ValueError(f"subset must be in 0..{self.n_subsets - 1}, got {self.subset}")
        return self


class FixedSubset(FrequencySubset):
    """The same s channels of each colour for every face."""

    name = "fixed-subset"
    summary = "one fixed subset of the frequency channels"
    reference = "baseline of PartialFace, Mi et al., ICCV 2023"
    Options = FixedSubsetOptions
    options: FixedSubsetOptions
    subset_channels: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.register_buffer("kept_channels", torch.tensor(self.options.kept_channels), persistent=False)
        subset = self.options.subset_table()[self.options.subset]
        self.register_buffer("subset_channels", self.kept_channels[subset])

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """``channels``: int64 (s,), the subset in output order."""
        return {"channels": self.subset_channels}

    def with_layouts(self, layouts: Tensor) -> Self:
        """The mechanism that sends the canonical channels ``layouts[0]``, int64 (1, 3s).

        Raises:
            ValueError: more than one layout, or layouts of another kind.
        """
        if len(layouts) != 1:
            raise ValueError(f"{self.name} has one layout, got {len(layouts)}")
        imitation = self._imitation(self.options)
        imitation.subset_channels = imitation.kept_channels[self._subsets_of(layouts)[0]]
        return imitation

    def sent(self, state: Tensor | None, count: int) -> Tensor:
        return torch.searchsorted(self.kept_channels, self.subset_channels)
