"""Uniform quantisation of what is sent, with or without dither."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from defenses.base import DefenseOptions, DefenseTraining, Shape
from defenses.compose import Payload, PostProcess
from defenses.draws import uniform

#: Half widths of a range that are tried, as shares of the largest distance to the mean.
_SHARES = torch.logspace(-2, 0, 40)
_PLACES = 32
_BATCH = 64


class QuantiseOptions(DefenseOptions):
    bits: int = Field(default=8, ge=1, le=16, description="of each value that is sent")
    dither: Literal["none", "uniform", "subtractive"] = Field(
        default="none",
        description="uniform: noise as wide as a step before rounding (not subtractive); subtractive: the server knows "
        "the noise and takes it away again",
    )
    low: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="lowest level; none: 0 of a face, and learnt for each channel behind another defence",
    )
    high: float | None = Field(default=None, allow_inf_nan=False, description="highest level; none: 1 of a face, ...")
    faces: int = Field(default=1000, ge=1, description="of the provider, that ranges are learnt from")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are given together, or neither")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


class Quantise(PostProcess):
    """Rounds every value to the nearest of 2^bits levels, evenly spaced from ``low`` to ``high``: low + k step.

    Values beyond are sent as the outermost levels. A face has the range [0, 1]. Behind another defence each channel has
    a range of its own about its mean, the one of least mean squared error on the provider's faces; the server, which
    need not know any state, knows the ranges. A map of zeros, which that defence leaves out, stays one.

    Without dither the error follows the value. Under ``uniform`` its mean is zero whatever the value, and its variance
    step^2 f (1 - f), f being the place between two levels (Lipshitz, Wannamaker and Vanderkooy, *Quantization and
    Dither*, J. AES 40(5), 1992). Under ``subtractive`` it is uniform within half a step and independent of the value
    (Schuchman, *Dither Signals and Their Effect on Quantization Noise*, IEEE Trans. Comm. 12, 1964). Both as long as
    value and dither lie in the range. Gradients pass as if nothing were rounded (Bengio et al., 2013).
    """

    name = "quantise"
    summary = "values rounded to a few bits, with or without dither"
    reference = "Gray and Neuhoff, Quantization, IEEE Trans. Information Theory 44(6), 1998"
    hidden = "noise: rounding and dither"
    learns = "behind another defence, the range of each channel"
    learns_behind = True
    Options = QuantiseOptions
    options: QuantiseOptions
    low: Tensor
    step: Tensor

    def __init__(
        self, options: DefenseOptions | None = None, *, image_size: int = 112, takes: Shape | None = None
    ) -> None:
        super().__init__(options, image_size=image_size, takes=takes)
        low, high = self.options.low, self.options.high
        self.trainable = takes is not None and low is None
        if low is None or high is None:
            low, high = (0.0, 1.0) if takes is None else (float("nan"), float("nan"))
        self.register_buffer("low", torch.full((self.takes[0], 1, 1), low))
        self.register_buffer("step", torch.full((self.takes[0], 1, 1), (high - low) / self._steps))

    @property
    def _steps(self) -> int:
        return (1 << self.options.bits) - 1

    def payload(self, before: Payload) -> Payload:
        """``bits`` a value."""
        return replace(before, bits=self.options.bits)

    @torch.no_grad()
    def fit(self, training: DefenseTraining) -> None:
        """Learn each channel's range: symmetric about its mean, of least mean squared error."""
        columns, seen = [], 0
        most = min(self.options.faces, training.images)
        for sent, _ in training.batches(min(_BATCH, most), training.generator):
            maps = sent.float().flatten(2)
            places = torch.randint(maps.shape[2], (_PLACES,), generator=training.generator).to(maps.device)
            # A map of zeros was left out, and says nothing of the channel.
            shown = maps[..., places].masked_fill((maps == 0).all(dim=2, keepdim=True), float("nan"))
            columns.append(shown.transpose(0, 1).flatten(1))
            seen += len(sent)
            training.report(min(seen, most), most)
            if seen >= most:
                break
        values = torch.cat(columns, dim=1)  # (C, M)
        centre = values.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
        centred = values - centre
        widest = centred.abs().nan_to_num(0.0).amax(dim=1, keepdim=True)
        widest = torch.where(widest > 0, widest, torch.ones_like(widest))
        best = torch.full_like(widest, float("inf"))
        half = widest.clone()
        for share in _SHARES.to(widest):
            error = self._expected_error(centred, share * widest)
            half = torch.where(error < best, share * widest, half)
            best = torch.minimum(error, best)
        self.low.copy_((centre - half)[..., None])
        self.step.copy_((2 * half / self._steps)[..., None])

    def _expected_error(self, values: Tensor, half: Tensor) -> Tensor:
        """Mean squared error (C, 1) of values (C, M) about 0 within the ranges of half width ``half`` (C, 1)."""
        step = 2 * half / self._steps
        inside = torch.minimum(torch.maximum(values, -half), half)
        place = (inside + half) / step
        fraction = place - place.floor()
        rounding = {
            "none": (place - place.round()).square(),
            "uniform": fraction * (1 - fraction),
            "subtractive": torch.full_like(place, 1 / 12),
        }[self.options.dither]
        return ((values - inside).square() + step.square() * rounding).nanmean(dim=1, keepdim=True)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Levels for values (N, C, h, w), or what is left of them once the dither is subtracted.

        Raises:
            ValueError: ranges are to be learnt, and were not yet.
        """
        low, step = self.low.to(faces), self.step.to(faces)
        if bool(low.isnan().any()):
            raise ValueError(f"{self.name} is not fitted: it learns ranges from faces, or takes them as low and high")
        values = faces.detach()
        place, dither = (values - low) / step, torch.zeros((), dtype=values.dtype, device=values.device)
        if self.options.dither != "none":
            dither = uniform(values.shape, generator, values.device).to(values) - 0.5
        level = (place + dither).round_().clamp_(0, self._steps)
        sent = low + step * (level - dither if self.options.dither == "subtractive" else level)
        sent = sent.masked_fill((values == 0).all(dim=3, keepdim=True).all(dim=2, keepdim=True), 0.0)
        return sent + (faces - values) if faces.requires_grad else sent
