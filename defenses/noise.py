"""Additive noise on the pixels, or on what another defence sends."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import DefenseOptions
from defenses.compose import PostProcess
from defenses.draws import gaussian, laplace


class NoiseOptions(DefenseOptions):
    """Options of :class:`Noise`. A huge scale sends nothing but noise, which no attack may beat."""

    distribution: Literal["gaussian", "laplace"] = Field(default="gaussian", description="law of the noise")
    scale: float = Field(
        default=0.5,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="standard deviation, whichever the law (Laplace: b = scale / sqrt 2), in the units of what is sent "
        "(faces: [0, 1])",
    )


class Noise(PostProcess):
    """Independent noise on every value, not clipped: of a face (N, 3, H, W), unbounded.

    Clipping would be information lost for the recogniser and no protection. Fresh noise is drawn for each call; it is
    no countable state.
    """

    name = "noise"
    summary = "additive Gaussian or Laplace noise"
    Options = NoiseOptions
    options: NoiseOptions

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Noisy values; the noise is drawn in float32."""
        if self.options.distribution == "gaussian":
            noise = gaussian(faces.shape, generator, faces.device)
        else:
            noise = laplace(faces.shape, generator, faces.device) / math.sqrt(2)
        return faces + self.options.scale * noise.to(faces)
