"""MinusFace: a face minus what a network generates of it, its channels shuffled anew for every sample.

Mi et al., *Privacy-Preserving Face Recognition Using Trainable Feature Subtraction*, CVPR 2024.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from defenses.base import Defense, DefenseOptions, DefenseTraining
from defenses.client import train_jointly
from defenses.frequency import CHANNELS, COLOURS, block_dct, inverse_block_dct, inverse_block_dct_adjoint
from defenses.ranks import comma_separated

_SPECTRUM = COLOURS * CHANNELS
#: What is decoded of an empty spectrum: the level shift.
_GREY = 128 / 255
#: Of the L1 distance between the face and the generated picture, both in [-1, 1].
_WEIGHT = 5.0
#: Of 24 passes, after which the learning rates fall to a tenth.
_MILESTONES, _PASSES = (10, 18, 22), 24
#: Of presets for two cores, where a few hundred steps are all one can afford.
_FEW_STEPS: Mapping[str, Any] = {"batch_size": 16, "optimiser": "adam", "learning_rate": 1e-2, "scale": 128.0}


class MinusFaceOptions(DefenseOptions):
    """The published values, where a preset does not say otherwise."""

    widths: Annotated[
        tuple[Annotated[int, Field(ge=1, le=4096)], ...],
        BeforeValidator(comma_separated),
        Field(min_length=1, max_length=7),
    ] = Field(default=(64, 128, 256, 512, 1024), description="channels of the U-Net's levels, the finest first")
    epochs: int = Field(default=_PASSES, ge=1, le=10_000, description="passes of the U-Net's training over the faces")
    steps: int | None = Field(default=None, ge=1, description="steps at most, where fewer than all passes are to do")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of that training")
    scale: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="coefficients are divided by it for the U-Net, and what that makes is multiplied by it: the same "
        "maps can be learnt, sooner in a short training; 1 as published",
    )
    optimiser: Literal["sgd", "adam"] = Field(
        default="sgd", description="sgd with momentum .9, as published, or adam, which gets further in few passes"
    )
    learning_rate: float = Field(
        default=1e-2, gt=0, le=1, allow_inf_nan=False, description="of the recogniser trained along; the U-Net has half"
    )
    learning_rates: Literal["paper", "official"] = Field(
        default="paper", description="paper: the U-Net learns at half the rate; official: at the recogniser's"
    )
    weight_decay: float = Field(
        default=1e-4, ge=0, le=1, allow_inf_nan=False, description="1e-4 in the paper, 5e-4 in the released code"
    )
    reconstruction: float = Field(
        default=_WEIGHT, ge=0, le=1e6, allow_inf_nan=False, description="weight of the generated picture's L1 distance"
    )
    permute: bool = Field(default=True, description="shuffle the channels of the residue, anew for every sample")
    clamp: bool = Field(default=True, description="clamp what is sent to [0, 1], as a picture is stored")
    views: int = Field(default=3, ge=1, le=1000, description="random copies of each image in recogniser training")

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if not self.permute and self.views > 1 and "views" in self.model_fields_set:
            raise ValueError(f"views={self.views} copies without permute would all be the same: set views=1")
        return self


class MinusFace(Defense):
    """X_p = d(r[pi]) with r = e(X) - g(e(X)): (N, 3, H, W), a picture in [0, 1].

    e is the block DCT of the up-sampled face (192 channels), d its decoder, and g a U-Net that learns, jointly with a
    recogniser of r, to generate what looks like the face: d(g(e(X))) = X. The decoder sees three numbers of each block
    of 192, so that r keeps plenty, and its picture is grey; the shuffled residue decodes to coloured noise that a
    recogniser, which is not told pi, can be trained on.

    g is public. The state of a face is pi, int64 (192,): place p of what is decoded holds channel pi[p] of r.
    """

    name = "minusface"
    summary = "what a trained network leaves over of a face, its 192 channels shuffled for every sample, as a picture"
    reference = "Mi et al., Privacy-Preserving Face Recognition Using Trainable Feature Subtraction, CVPR 2024"
    fidelity = "faithful"
    weakened: ClassVar[Mapping[str, Any]] = {"permute": False, "clamp": False, "steps": 1}
    hidden = "state: the permutation of 192 channels, fresh for every sample"
    learns = "the U-Net that generates what is subtracted, jointly with a recogniser of the residue"
    departures: ClassVar[Mapping[str, str]] = {
        "learning_rates=official": "the U-Net learns at the recogniser's rate: the branch for its own is never taken",
    }
    trainable = True
    Options = MinusFaceOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"widths": (8, 16), "epochs": 1, **_FEW_STEPS},
        "cpu": {"widths": (16, 32), "epochs": 1, "steps": 400, **_FEW_STEPS},
    }
    options: MinusFaceOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.generator = _UNet(self.options.widths)

    @property
    def views(self) -> int:
        """Copies of a face differ in their permutation only."""
        return self.options.views if self.options.permute else 1

    @property
    def entropy_bits(self) -> float:
        """log2(192!), about 1,184 bits."""
        return math.lgamma(_SPECTRUM + 1) / math.log(2) if self.options.permute else 0.0

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor | None:
        """A permutation of the channels for each face, int64 (count, 192)."""
        if not self.options.permute:
            return None
        keys = torch.rand(count, _SPECTRUM, generator=generator, device=generator.device, dtype=torch.float64)
        return keys.argsort(dim=1).cpu()

    def fit(self, training: DefenseTraining) -> None:
        """Train g and a recogniser of the residue: 5 L1(X, d(g(e(X)))), in [-1, 1], plus the margin loss.

        The rates fall to a tenth after 10, 18 and 22 of 24 parts of the training. The generated picture is not clamped
        here: where a clamp cuts off, it has no gradient.

        This suite's recognisers bring every map to one scale, so that their gradient is largest in the faintest of the
        192 (.003 beside 300), and would drown the other by orders of magnitude. Of what reaches the U-Net it is cut
        down to the norm of the L1 distance's, at the published weight.
        """
        options = self.options
        recogniser, head = training.make_recogniser((_SPECTRUM, self.image_size, self.image_size))
        share = 1.0 if options.learning_rates == "official" else 0.5
        total = options.epochs * -(-training.images // options.batch_size)
        total = min(total, options.steps or total)
        falls = [round(total * passes / _PASSES) for passes in _MILESTONES]
        one_face = inverse_block_dct_adjoint(torch.ones(1, COLOURS, self.image_size, self.image_size))
        say = 2 * _WEIGHT * float(one_face.norm()) / one_face[:, :COLOURS].numel()

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            spectrum = _spectrum(faces)
            generated = options.scale * self.generator(spectrum / options.scale)
            residue = spectrum - generated
            residue.register_hook(functools.partial(_cut, limit=say / len(faces) ** 0.5))
            recognition: Tensor = head(recogniser(residue), labels)[0]
            looks = 2 * (inverse_block_dct(generated.float()) - faces).abs().mean()
            return options.reconstruction * looks + recognition

        def optimise(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
            groups: list[dict[str, Any]] = [
                {"params": [*recogniser.parameters(), *head.parameters()]},
                {"params": [*self.generator.parameters()], "lr": share * options.learning_rate},
            ]
            rate, decay = options.learning_rate, options.weight_decay
            if options.optimiser == "sgd":
                return [torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=decay)]
            return [torch.optim.Adam(groups, lr=rate, weight_decay=decay)]

        train_jointly(
            training,
            {"generator": self.generator, "recogniser": recogniser, "head": head},
            optimise,
            loss,
            epochs=options.epochs,
            batch_size=options.batch_size,
            schedule=lambda optimiser: torch.optim.lr_scheduler.MultiStepLR(optimiser, falls),
            limit=total,
        )

    def residue(self, faces: Tensor) -> Tensor:
        """r, (N, 192, H, W), of faces (N, 3, H, W): un-normalised coefficients, colour-major."""
        spectrum = _spectrum(faces)
        with torch.autocast(faces.device.type, enabled=False):
            inputs = spectrum.to(next(self.generator.parameters()).dtype) / self.options.scale
            generated: Tensor = self.options.scale * self.generator(inputs)
        return spectrum - generated.to(spectrum)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        residue = self.residue(faces)
        if self.options.permute:
            residue = _taken(residue, self._checked(state, len(faces)))
        sent = inverse_block_dct(residue)
        return sent.clamp(0, 1) if self.options.clamp else sent

    def canonical_maps(self, faces: Tensor) -> Tensor:
        """r, as :meth:`residue`."""
        return self.residue(faces)

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """The picture, less the grey of an empty spectrum, projected back: the adjoint of what decoded it.

        (N, 3, h, w) to (N, 192, h, w), each channel of r in its own place: a pixel of the picture times the weight that
        this channel had in it. Without a state, the picture.
        """
        if state is None:
            return representation
        projected = inverse_block_dct_adjoint(representation - _GREY)
        return _taken(projected, self._checked(state, len(representation)).argsort(dim=1))

    def _checked(self, state: Tensor | None, count: int) -> Tensor:
        if state is None or state.dtype != torch.int64 or state.shape != (count, _SPECTRUM):
            told = "none" if state is None else f"{state.dtype} {tuple(state.shape)}"
            raise ValueError(
                f"{self.name} needs the permutation of each face, int64 ({count}, {_SPECTRUM}), got {told}"
            )
        if not torch.equal(state.sort(dim=1).values.cpu(), torch.arange(_SPECTRUM).expand(count, -1)):
            raise ValueError(f"{self.name}: each state has to be a permutation of 0..{_SPECTRUM - 1}")
        return state


def _spectrum(faces: Tensor) -> Tensor:
    return block_dct(faces, torch.arange(CHANNELS))


def _cut(gradient: Tensor, limit: float) -> Tensor:
    """The gradient, no longer than ``limit``."""
    cut: Tensor = gradient * (limit / gradient.norm().clamp(min=limit))
    return cut


def _taken(maps: Tensor, order: Tensor) -> Tensor:
    """Maps (N, C, h, w) of which place p holds map order[n, p], int64 (N, C)."""
    return maps.gather(1, order.to(maps.device)[:, :, None, None].expand_as(maps))


class _UNet(nn.Module):
    """192 maps to 192: two 3x3 convolutions with ReLU a level, no normalisation, max-pooling, transposed convolutions.

    Maps of any size: they are padded to what the levels divide.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(_convolutions(a, b) for a, b in itertools.pairwise((_SPECTRUM, *widths)))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 3, stride=2, padding=1, output_padding=1) for a, b in itertools.pairwise(widths)
        )
        self.merge = nn.ModuleList(_convolutions(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], _SPECTRUM, 1)
        # Nothing is subtracted before training: of 192 coefficients the decoder tells three apart, and what the first
        # weights happen to put into the others no training would take out.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(cast("Tensor", self.head.bias))

    def forward(self, x: Tensor) -> Tensor:
        """float (N, 192, h, w) to (N, 192, h, w)."""
        height, width = x.shape[-2:]
        x = functional.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        out: Tensor = self.head(x)
        return out[..., :height, :width]


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )
