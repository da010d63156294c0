"""Channels that are left out, others for every face."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import DefenseOptions, Shape
from defenses.compose import Payload, PostProcess


class DropoutOptions(DefenseOptions):
    share: float = Field(default=0.5, ge=0, lt=1, description="of the channels that are left out of a face, rounded")
    number: int | None = Field(default=None, ge=0, description="channels that are left out, instead of a share")
    views: int = Field(default=2, ge=1, le=1000, description="random copies of each image in recogniser training")


class Dropout(PostProcess):
    """Fills as many channels of every face with zeros, a uniformly random choice for each face and each call.

    Which they are shows in what is sent, and is no state that anybody would have to guess: the choice adds no entropy
    (:meth:`describe` gives its ``pattern_bits``). Nothing is scaled up for what is missing.
    """

    name = "dropout"
    summary = "random channels are left out of every face"
    hidden = "noise: the channels that are left out, which show"
    Options = DropoutOptions
    options: DropoutOptions

    def __init__(
        self, options: DefenseOptions | None = None, *, image_size: int = 112, takes: Shape | None = None
    ) -> None:
        super().__init__(options, image_size=image_size, takes=takes)
        number, channels = self.options.number, self.takes[0]
        self.dropped = min(round(self.options.share * channels), channels - 1) if number is None else number
        if self.dropped >= channels:
            raise ValueError(f"number={number} leaves none of {channels} channels")

    @property
    def views(self) -> int:
        return self.options.views

    def payload(self, before: Payload) -> Payload:
        """The channels that are left, and a bit for each that says whether it is there."""
        channels = self.takes[0]
        values = round(before.values * (channels - self.dropped) / channels)
        return replace(before, values=values, extra=before.extra + math.ceil(channels / 8))

    def describe(self) -> dict[str, Any]:
        """Adds how many channels are left out, and the bits that tell which."""
        patterns = math.comb(self.takes[0], self.dropped)
        return super().describe() | {"dropped": self.dropped, "pattern_bits": math.log2(patterns)}

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Values (N, C, h, w), zero in the channels that are left out."""
        drawn = torch.rand(faces.shape[:2], generator=generator, device=generator.device)
        out = torch.zeros(faces.shape[:2], dtype=torch.bool)
        out.scatter_(1, drawn.argsort(dim=1)[:, : self.dropped].to(out.device), True)
        return faces.masked_fill(out[..., None, None].to(faces.device), 0.0)
