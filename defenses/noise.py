"""Additive noise on the pixels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions
from defenses.laplace import laplace
from defenses.linear import IdentityOperator


class NoiseOptions(DefenseOptions):
    """Options of :class:`Noise`. A huge scale sends nothing but noise, which no attack may beat."""

    distribution: Literal["gaussian", "laplace"] = Field(default="gaussian", description="law of the noise")
    scale: float = Field(
        default=0.5,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="standard deviation for faces in [0, 1], whichever the law (Laplace: b = scale / sqrt 2)",
    )


class Noise(Defense):
    """Independent noise on every value, not clipped: (N, 3, H, W), unbounded.

    Clipping would be information lost for the recogniser and no protection. Fresh noise is drawn for each call; it is
    no countable state.
    """

    name = "noise"
    summary = "additive Gaussian or Laplace noise"
    Options = NoiseOptions
    options: NoiseOptions

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Noisy faces; the noise is drawn in float32 on the generator's device."""
        if self.options.distribution == "gaussian":
            noise = torch.randn(faces.shape, generator=generator, device=generator.device)
        else:
            noise = laplace(faces.shape, generator) / math.sqrt(2)
        return faces + self.options.scale * noise.to(faces)

    def linear_operator(self, state: Tensor | None) -> IdentityOperator:
        return IdentityOperator(self.image_size)
