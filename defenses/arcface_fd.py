"""ArcFace-FD: all frequency channels, no protection. What the frequency domain itself costs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, pure
from defenses.frequency import CHANNELS, COLOURS, FrequencyOperator, block_dct, map_size
from defenses.ranks import UPSAMPLING_MEANS, Upsampling


class ArcFaceFDOptions(DefenseOptions):
    upsampling: Upsampling = Field(default=8, description=UPSAMPLING_MEANS)


class ArcFaceFD(Defense):
    """All 64 block-DCT channels of each colour: (N, 192, h, h), colour-major, un-normalised.

    h is the side of the face where it is up-sampled x8, as published. At factor 1 the maps are the face itself, turned
    (an orthonormal transform of its blocks).
    """

    name = "arcface-fd"
    summary = "all 192 frequency channels, no protection"
    reference = "baseline of PartialFace, Mi et al., ICCV 2023"
    Options = ArcFaceFDOptions
    options: ArcFaceFDOptions

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        """(192, h, h)."""
        side = map_size(self.image_size, self.options.upsampling)
        return (COLOURS * CHANNELS, side, side)

    @pure
    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return block_dct(faces, torch.arange(CHANNELS), upsampling=self.options.upsampling)

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        return FrequencyOperator(self.image_size, torch.arange(CHANNELS), upsampling=self.options.upsampling)
