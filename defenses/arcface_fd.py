"""ArcFace-FD: all frequency channels, no protection. What the frequency domain itself costs."""

from __future__ import annotations

import torch
from torch import Tensor

from defenses.base import Defense
from defenses.frequency import CHANNELS, COLOURS, FrequencyOperator, block_dct


class ArcFaceFD(Defense):
    """All 64 block-DCT channels of each colour: (N, 192, H, W), colour-major, un-normalised."""

    name = "arcface-fd"
    summary = "all 192 frequency channels, no protection"
    reference = "baseline of PartialFace, Mi et al., ICCV 2023"

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        """(192, H, W)."""
        return (COLOURS * CHANNELS, self.image_size, self.image_size)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return block_dct(faces, torch.arange(CHANNELS))

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        return FrequencyOperator(self.image_size, torch.arange(CHANNELS))
