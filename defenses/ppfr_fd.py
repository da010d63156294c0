"""PPFR-FD: a third of the frequencies, chosen by training, shuffled and mixed. A reconstruction: no code is public.

Wang et al., *Privacy-Preserving Face Recognition in the Frequency Domain*, AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bench.randomness import base_seed, derived
from defenses.base import Defense, DefenseOptions, DefenseTraining, Shape
from defenses.client import train_jointly
from defenses.draws import gaussian
from defenses.frequency import CHANNELS, COLOURS, block_dct, block_dct_adjoint, zigzag

AC = CHANNELS - 1
#: Batches of faces that tell how strong each channel is.
_BATCHES = 8


class PPFRFDOptions(DefenseOptions):
    keep: int = Field(default=36, ge=1, le=AC, description="channels that are kept of each colour's 63")
    mixing: Literal["pairs", "none"] = Field(
        default="pairs", description="pairs: two shuffled maps at a time become their mean; none: maps stay apart"
    )
    shuffle_seed: int = Field(
        default=0, ge=0, lt=2**53, description="seed of the order of the maps, one for all clients and no secret"
    )
    penalty: float = Field(
        default=10.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="weight of what is visible of a face, against recognition, where channels are chosen",
    )
    epochs: int = Field(default=4, ge=1, le=10_000, description="passes over the faces that channels are chosen by")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of it")
    learning_rate: float = Field(
        default=0.05, gt=0, le=10, allow_inf_nan=False, description="of SGD, for the recogniser that channels serve"
    )
    weight_learning_rate: float = Field(
        default=1.0, gt=0, le=1e3, allow_inf_nan=False, description="of SGD, for the weights of the channels"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.mixing == "pairs" and self.keep % 2:
            raise ValueError(f"{COLOURS * self.keep} maps make no pairs: keep an even number, or set mixing=none")
        return self


@dataclass(frozen=True, eq=False)
class MixedOperator:
    """Shuffled channels of the transform, averaged in groups: a :class:`~defenses.base.LinearOperator`.

    Attributes:
        channels: int64 (U,), those that any colour keeps, 1..63.
        order: int64 (M,), which of the 3U maps of these channels, colour-major, stand one after another.
        group: how many of them at a time become their mean.
    """

    channels: Tensor
    order: Tensor
    group: int

    @property
    def offset(self) -> Tensor:
        """Zero, float64 (1, 1, 1): a black face has no AC components."""
        return torch.zeros(1, 1, 1, dtype=torch.float64)

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, M / group, H, H)."""
        maps = block_dct(faces, self.channels, with_offset=False)
        shuffled = maps[:, self.order.to(maps.device)]
        groups = len(self.order) // self.group
        return shuffled.reshape(len(maps), groups, self.group, *maps.shape[2:]).mean(dim=2)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, M / group, H, H) to (N, 3, H, H)."""
        count, _, height, width = representation.shape
        maps = representation.new_zeros(count, COLOURS * len(self.channels), height, width)
        maps[:, self.order.to(maps.device)] = representation.repeat_interleave(self.group, dim=1) / self.group
        return block_dct_adjoint(maps, self.channels)


class PPFRFD(Defense):
    """Means of pairs of frequency maps: (N, 54, H, W), un-normalised.

    Of each colour's 63 AC channels 36 are kept. Which, a training tells: each channel gets a weight g in (0, 1), and
    stands as g z + (1 - g) noise of its own strength before a recogniser; its loss and ``penalty`` times the visible
    share of the face, the sum of g mean abs(z) over that of mean abs(z), are minimised together; the largest weights
    are kept. Their maps are shuffled across colours in an order that all clients share, and mixed in pairs. The paper's
    analysis network, its weighting and its constants are not public: noise, penalty and pairs are ours.
    """

    name = "ppfr-fd"
    summary = "36 frequency channels of a colour, chosen by training, shuffled and mixed (reconstruction)"
    reference = "Wang et al., Privacy-Preserving Face Recognition in the Frequency Domain, AAAI 2022"
    fidelity = "reconstruction"
    hidden = "the channels that are left out; nothing is secret"
    weakened: ClassVar[Mapping[str, Any]] = {"mixing": "none", "keep": 63}
    learns = "which channels are kept: those that recognition needs and that show little"
    trainable = True
    Options = PPFRFDOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"epochs": 1, "batch_size": 32},
        "cpu": {"epochs": 1},
    }
    options: PPFRFDOptions
    kept_channels: Tensor
    shuffle: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        keep = self.options.keep
        # Until it is fitted: the highest frequencies.
        self.register_buffer("kept_channels", torch.tensor(zigzag()[-keep:]).sort().values.repeat(COLOURS, 1))
        drawn = torch.Generator().manual_seed(self.options.shuffle_seed)
        self.register_buffer("shuffle", torch.randperm(COLOURS * keep, generator=drawn))
        self.importance = nn.Parameter(torch.zeros(COLOURS, AC))

    @property
    def _group(self) -> int:
        return 2 if self.options.mixing == "pairs" else 1

    @property
    def representation_shape(self) -> Shape:
        """(3 keep / 2, H, W); twice as many without mixing."""
        return (COLOURS * self.options.keep // self._group, self.image_size, self.image_size)

    def fit(self, training: DefenseTraining) -> None:
        """Choose the channels."""
        options, everything = self.options, torch.arange(1, CHANNELS)
        recogniser, head = training.make_recogniser((COLOURS * AC, self.image_size, self.image_size))
        some = islice(
            training.batches(options.batch_size, derived(base_seed(training.generator), "strength")), _BATCHES
        )
        spectra = [block_dct(faces, everything) for faces, _ in some]
        squares = torch.stack([spectrum.square().mean(dim=(0, 2, 3)) for spectrum in spectra])
        sizes = torch.stack([spectrum.abs().mean(dim=(0, 2, 3)) for spectrum in spectra]).mean(dim=0)
        strength, visible = squares.mean(dim=0).sqrt()[:, None, None], sizes / sizes.sum()

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            spectrum = block_dct(faces, everything)
            weight = self.importance.sigmoid().flatten()
            noise = gaussian(spectrum.shape, generator, spectrum.device).to(spectrum)
            share = weight[:, None, None]
            recognition: Tensor = head(recogniser(share * spectrum + (1 - share) * strength * noise), labels)[0]
            return recognition + options.penalty * (weight * visible).sum()

        def optimise(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
            # No Adam: of the weights' gradients it would keep the signs, and one channel would weigh like another.
            others = [weight for weight in weights if weight is not self.importance]
            groups: list[dict[str, Any]] = [
                {"params": [self.importance], "lr": options.weight_learning_rate},
                {"params": others, "weight_decay": 5e-4},
            ]
            return [torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9)]

        networks = {"defense": self, "recogniser": recogniser, "head": head}
        train_jointly(training, networks, optimise, loss, epochs=options.epochs, batch_size=options.batch_size)
        chosen = self.importance.detach().topk(options.keep, dim=1).indices.sort(dim=1).values
        self.kept_channels.copy_(chosen + 1)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.linear_operator(state)(faces)

    def linear_operator(self, state: Tensor | None) -> MixedOperator:
        channels = self.kept_channels.cpu().unique()
        maps = torch.searchsorted(channels, self.kept_channels.cpu())
        maps += len(channels) * torch.arange(COLOURS)[:, None]
        return MixedOperator(channels, maps.flatten()[self.shuffle.cpu()], self._group)
