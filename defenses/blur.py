"""Gaussian blur."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from defenses.base import DefenseOptions
from defenses.linear import SeparableDefense, blur_matrix


class BlurOptions(DefenseOptions):
    """Options of :class:`Blur`; lengths in pixels of the 112x112 template, scaled with the size of the face."""

    sigma: float = Field(
        default=4.0,
        gt=0,
        le=112,
        allow_inf_nan=False,
        description="standard deviation of the Gaussian, in pixels of 112",
    )
    kernel: int | None = Field(
        default=None,
        ge=3,
        le=223,
        description="width of the kernel, odd; none: 2 ceil(3 sigma) + 1, beyond which the Gaussian is negligible",
    )

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class Blur(SeparableDefense):
    """Gaussian-blurred face, (N, 3, H, W) in [0, 1]."""

    name = "blur"
    summary = "Gaussian blur"
    Options = BlurOptions
    options: BlurOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        scale = image_size / 112
        sigma = self.options.sigma * scale
        half_width = 3 * sigma if self.options.kernel is None else (self.options.kernel - 1) / 2 * scale
        self.register_buffer("factor", blur_matrix(image_size, sigma, max(1, math.ceil(half_width))), persistent=False)
