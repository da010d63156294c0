"""DCTDP: all frequencies but the lowest under Laplace noise, whose budget is shared out by training.

Ji et al., *Privacy-Preserving Face Recognition with Learnable Privacy Budgets in Frequency Domain*, ECCV 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.randomness import base_seed, derived
from defenses.base import Defense, DefenseOptions, DefenseTraining, Shape
from defenses.client import train_jointly
from defenses.draws import laplace
from defenses.frequency import CHANNELS, COLOURS, FrequencyOperator, block_dct

#: Both learning rates fall by this factor over the fit, as in the released recipe.
_FALL = 1e-3
#: Ratio of a scale to the mean that the budget allows, as a power of e: beyond it float32 would overflow.
_LOUDEST = 40.0


class DCTDPOptions(DefenseOptions):
    budget: float = Field(
        default=1.0,
        gt=0,
        le=1e12,
        allow_inf_nan=False,
        description="mean epsilon of a coefficient: 0.5 and 1 in the paper, 4 in the released code; 1e6 is next to no "
        "noise",
    )
    sensitivity: Literal["ones", "range"] = Field(
        default="range",
        description="range: of each coefficient, what it spans over the provider's faces (the paper); ones: 1",
    )
    noise: Literal["paper", "official"] = Field(
        default="paper", description="paper: drawn for every face; official: drawn once for all faces of a batch"
    )
    epochs: int = Field(default=24, ge=1, le=10_000, description="passes of the joint training over the faces")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of the joint training")
    noise_learning_rate: float = Field(
        default=0.1, gt=0, le=1, allow_inf_nan=False, description="of Adam, for the noise; falls to a thousandth"
    )
    learning_rate: float = Field(
        default=0.1, gt=0, le=10, allow_inf_nan=False, description="of SGD, for the recogniser; falls to a thousandth"
    )


@dataclass(frozen=True, eq=False)
class ShiftedOperator(FrequencyOperator):
    """The transform of one channel list, and a learnt ``shift`` (3K, H, H) of what it makes."""

    shift: Tensor

    @property
    def offset(self) -> Tensor:
        """The representation of the black face, float64 (3K, H, H), on the shift's device."""
        return super().offset.to(self.shift.device) + self.shift.double()


class DCTDP(Defense):
    """Noisy frequency components: (N, 189, H, W), the 63 AC channels of each colour, un-normalised.

    What is sent is z + loc + scale e, with e independent draws of Laplace(0, 1). ``rho`` shares out the budget:
    scale = S / epsilon with epsilon = softmax(rho) times the number of coefficients times the mean epsilon. Both
    ``loc`` and ``rho`` are learnt jointly with a recogniser that is thrown away. Noise is no countable state.
    """

    name = "dctdp"
    summary = "all frequency channels but the mean, under Laplace noise with a learnt privacy budget"
    reference = (
        "Ji et al., Privacy-Preserving Face Recognition with Learnable Privacy Budgets in Frequency Domain, ECCV 2022"
    )
    fidelity = "faithful"
    weakened: ClassVar[Mapping[str, Any]] = {"budget": 1e6}
    hidden = "noise, fresh for every face"
    learns = "an offset and a share of the privacy budget for each coefficient, jointly with a recogniser"
    departures: ClassVar[Mapping[str, str]] = {
        "noise=official": "one draw of the noise for a whole batch: differences of two faces are free of it",
        "sensitivity=ones": "takes 1 for the range of every coefficient: up to 180 times less noise at the same budget",
    }
    trainable = True
    Options = DCTDPOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"epochs": 1, "batch_size": 32},
        "cpu": {"epochs": 2},
    }
    options: DCTDPOptions
    channels_kept: Tensor
    sensitivity: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        shape = self.representation_shape
        self.register_buffer("channels_kept", torch.arange(1, CHANNELS))
        self.loc = nn.Parameter(torch.zeros(shape))
        self.rho = nn.Parameter(torch.zeros(shape))
        measured = self.options.sensitivity == "range"
        self.register_buffer("sensitivity", torch.full(shape, math.nan) if measured else torch.ones(1, 1, 1))

    @property
    def representation_shape(self) -> Shape:
        """(189, H, W): channel 63 colour + 8u + v - 1."""
        return (COLOURS * (CHANNELS - 1), self.image_size, self.image_size)

    @property
    def epsilon(self) -> Mapping[str, float]:
        """``element``: the mean budget of a coefficient; ``image``: of all of them."""
        return {"element": self.options.budget, "image": self.options.budget * math.prod(self.representation_shape)}

    @property
    def shares_noise(self) -> bool:
        return self.options.noise == "official"

    @property
    def scale(self) -> Tensor:
        """The scale b of each coefficient's Laplace noise, (189, H, W), of standard deviation b sqrt(2).

        Raises:
            ValueError: sensitivities were not measured yet.
        """
        if self.sensitivity[0, 0, 0].isnan():
            raise ValueError(
                f"{self.name} with sensitivity=range has to be fitted first: it measures the range of faces"
            )
        # The softmax over millions of entries as a ratio to their mean, which float32 holds well: no entry gets tiny.
        lifted = self.rho - self.rho.detach().max()
        spread = lifted.exp().mean().log() - lifted
        return self.sensitivity / self.options.budget * spread.clamp(max=_LOUDEST).exp()

    def fit(self, training: DefenseTraining) -> None:
        """Learn where noise does the least harm to a recogniser that is trained along."""
        options = self.options
        if options.sensitivity == "range":
            self._measure(training)
        recogniser, head = training.make_recogniser(self.representation_shape)
        steps = options.epochs * -(-training.images // options.batch_size)

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            sent = self._noisy(block_dct(faces, self.channels_kept), generator)
            value: Tensor = head(recogniser(sent), labels)[0]
            return value

        def optimise(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
            theirs = [*recogniser.parameters(), *head.parameters()]
            return [
                torch.optim.Adam([self.loc, self.rho], lr=options.noise_learning_rate),
                torch.optim.SGD(theirs, lr=options.learning_rate, momentum=0.9, weight_decay=5e-4),
            ]

        train_jointly(
            training,
            {"noise": self, "recogniser": recogniser, "head": head},
            optimise,
            loss,
            epochs=options.epochs,
            batch_size=options.batch_size,
            schedule=lambda optimiser: torch.optim.lr_scheduler.ExponentialLR(optimiser, _FALL ** (1 / steps)),
        )

    @torch.no_grad()
    def _measure(self, training: DefenseTraining) -> None:
        """The range of each coefficient over one pass of the provider's faces."""
        lowest = torch.full_like(self.sensitivity, math.inf)
        highest = torch.full_like(self.sensitivity, -math.inf)
        generator = derived(base_seed(training.generator), "range")
        for faces, _ in training.batches(self.options.batch_size, generator):
            low, high = block_dct(faces, self.channels_kept).aminmax(dim=0)
            lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
        self.sensitivity.copy_(highest - lowest)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self._noisy(block_dct(faces, self.channels_kept), generator)

    def _noisy(self, spectrum: Tensor, generator: torch.Generator) -> Tensor:
        drawn = 1 if self.shares_noise else len(spectrum)
        noise = laplace((drawn, *self.representation_shape), generator, spectrum.device).to(spectrum)
        return spectrum + self.loc.to(spectrum) + self.scale.to(spectrum) * noise

    def linear_operator(self, state: Tensor | None) -> ShiftedOperator:
        return ShiftedOperator(self.image_size, self.channels_kept, self.loc.detach())
