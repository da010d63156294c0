"""Cloak: learnt Gaussian noise on the pixels that recognition can do without, and constants in place of the noisiest.

Mireshghallah et al., *Not All Features Are Equal: Discovering Essential Features for Preserving Prediction Privacy*,
WWW 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from defenses.base import Defense, DefenseOptions, DefenseTraining
from defenses.draws import gaussian
from defenses.linear import ElementwiseOperator

#: Where rho starts: nearly at the least scale.
_FIRST_RHO = -4.0
#: Learning rates of Adam: of the recogniser, and of what is learnt once the noise has its size.
_RECOGNISER_RATE, _LATER_RATE = 1e-3, 1e-3


class CloakOptions(DefenseOptions):
    suppressed: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the elements, those of the largest scale, in whose place a learnt constant is sent "
        "(how many is ours: the paper varies a threshold)",
    )
    size_weight: float = Field(
        default=10.0, ge=0, le=1e4, allow_inf_nan=False, description="weight of -log(mean scale) in the first stage"
    )
    noise_rate: float = Field(
        default=0.01,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="learning rate of the first stage: Adam moves rho by about as much a step, and 4 make a scale half "
        "of the largest",
    )
    least: float = Field(
        default=1e-4, ge=0, le=1e6, allow_inf_nan=False, description="least scale, of pixels in [-1, 1]"
    )
    most: float = Field(
        default=1.5, ge=0, le=1e6, allow_inf_nan=False, description="largest scale, of pixels in [-1, 1]"
    )
    recogniser_epochs: int = Field(
        default=4, ge=1, le=10_000, description="passes that train the recogniser of plain faces, which then stays"
    )
    noise_epochs: int = Field(default=3, ge=1, le=10_000, description="passes of the first stage")
    later_epochs: int = Field(
        default=1, ge=0, le=10_000, description="passes of the second stage, and of the one that learns the constants"
    )
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least, {self.least:g}, exceeds most, {self.most:g}")
        return self


class _Seen(nn.Module):
    """How many faces a fit has been shown, int64 (): which stage it is in."""

    faces: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("faces", torch.zeros((), dtype=torch.int64))


class Cloak(Defense):
    """z = x + loc + scale N(0, 1) where recognition needs x, and a constant elsewhere: (N, 3, H, W), x in [-1, 1].

    Each element of a picture has its own ``loc``, ``scale`` and, if it is one of the suppressed, constant. They are
    learnt against a recogniser of plain faces, which is trained first, and fixed: the noise grows where that does not
    mind. Nothing is secret; the noise is fresh for each face and no countable state.

    Simplified from the released code: the recogniser is made here instead of being brought along, the share that is
    suppressed is an option instead of a threshold that is searched for, and each stage has a set number of passes.
    """

    name = "cloak"
    summary = "learnt Gaussian noise on pixels, constants in place of those that recognition needs least (simplified)"
    reference = "Mireshghallah et al., Not All Features Are Equal, WWW 2021"
    fidelity = "simplified"
    weakened: ClassVar[Mapping[str, Any]] = {"suppressed": 0.0, "most": 1e-4}
    hidden = "noise: drawn for every element of every face; nothing is secret"
    learns = "mean and scale of the noise of every element, which of them are suppressed, and their constants"
    trainable = True
    Options = CloakOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # A few dozen steps in all.
        "quick": {"recogniser_epochs": 4, "noise_epochs": 6, "noise_rate": 0.1}
    }
    options: CloakOptions
    kept: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        shape = (3, image_size, image_size)
        self.loc = nn.Parameter(torch.zeros(shape))
        self.rho = nn.Parameter(torch.full(shape, _FIRST_RHO))
        self.constant = nn.Parameter(torch.zeros(shape))
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise of each element before any is suppressed, (3, H, W), of [-1, 1]."""
        least, most = self.options.least, self.options.most
        return (1 + self.rho.tanh()) / 2 * (most - least) + least

    def fit(self, training: DefenseTraining) -> None:
        """Train a recogniser of plain faces, then the noise against it; then choose the suppressed, and learn these."""
        recogniser, head = training.make_recogniser(self.representation_shape)
        optimisers = {
            "plain": torch.optim.Adam([*recogniser.parameters(), *head.parameters()], lr=_RECOGNISER_RATE),
            "noise": torch.optim.Adam([self.loc, self.rho], lr=self.options.noise_rate),
            "later": torch.optim.Adam([self.loc, self.rho], lr=_LATER_RATE),
            "constants": torch.optim.Adam([self.constant], lr=_LATER_RATE),
        }
        later = self.options.later_epochs
        counts = (self.options.recogniser_epochs, self.options.noise_epochs, later, later)
        stages = [name for name, count in zip(optimisers, counts, strict=True) for _ in range(count)]
        seen = _Seen()
        kept: dict[str, nn.Module | torch.optim.Optimizer] = {
            "defence": self,
            "recogniser": recogniser,
            "head": head,
            "seen": seen,
            **optimisers,
        }
        updates = dict(zip(optimisers, training.fabric.setup_optimizers(*optimisers.values()), strict=True))
        stage = ""
        for faces, labels, generator in training.steps(len(stages), self.options.batch_size, kept):
            now = stages[min(int(seen.faces) // training.images, len(stages) - 1)]
            if now != stage:
                stage, plain = now, now == "plain"
                recogniser.train(plain).requires_grad_(plain)
                head.train(plain).requires_grad_(plain)
                if stage == "constants":
                    self._suppress()
            updates[stage].zero_grad()
            with training.fabric.autocast():
                shown = 2 * faces - 1 if stage == "plain" else self.transform(faces, None, generator)
                loss, _ = head(recogniser(shown), labels)
            if stage == "noise":
                loss = loss - self.options.size_weight * self.scale.mean().log()
            training.fabric.backward(loss)
            updates[stage].step()
            seen.faces.add_(len(faces))
        self._suppress()

    @torch.no_grad()
    def _suppress(self) -> None:
        """Choose the elements of the largest scale."""
        count = round(self.options.suppressed * self.kept.numel())
        self.kept.fill_(True)
        self.kept.view(-1)[self.scale.flatten().argsort(descending=True, stable=True)[:count]] = False

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """The noise is drawn in float32."""
        noise = gaussian(faces.shape, generator, faces.device).to(faces)
        loc, scale, constant = (part.to(faces) for part in (self.loc, self.scale, self.constant))
        return torch.where(self.kept, 2 * faces - 1 + loc + scale * noise, constant)

    def linear_operator(self, state: Tensor | None) -> ElementwiseOperator:
        offset = torch.where(self.kept, self.loc - 1, self.constant).detach().double()
        return ElementwiseOperator(2.0 * self.kept, offset)
