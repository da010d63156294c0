"""Random convolution: a face under secret random kernels, brought to a common scale by learnt statistics.

After the randomised convolutions with self-learning batch normalisation of J. Imaging 10(3):59, 2024. No code is
public; sizes and the order of things are decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from bench.randomness import drawn_seed
from defenses.base import Defense, DefenseOptions, DefenseTraining, Shape

_BATCH = 256
#: Least variance that a map is divided by, relative to 1: of a map that is the same for all faces nothing is made.
_LEAST = 1e-12


class RandomConvOptions(DefenseOptions):
    layers: int = Field(
        default=1, ge=1, le=8, description="convolutions; 1 is a linear map, between more stands a ReLU"
    )
    kernel: int = Field(default=3, ge=1, le=15, description="side of a kernel, in pixels; odd")
    channels: int = Field(default=3, ge=1, le=256, description="maps that each layer makes")
    key_seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the kernels: another one is another key")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, side: int) -> int:
        if side % 2 == 0:
            raise ValueError(f"kernel must be odd, got {side}")
        return side


@dataclass(frozen=True, eq=False)
class _Convolution:
    """z = (kernel * x - mean) / deviation: kernel (C, 3, k, k), mean and deviation (C,)."""

    kernel: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def offset(self) -> Tensor:
        """Of the black face, float64 (C, 1, 1)."""
        return (-self.mean.double() / self.deviation.double())[:, None, None]

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, W) to (N, C, H, W), dtype and device kept."""
        return _convolved(faces, self.kernel) / self.deviation.to(faces)[:, None, None]

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, C, H, W) to (N, 3, H, W)."""
        scaled, kernel = representation / self.deviation.to(representation)[:, None, None], self.kernel
        with torch.autocast(representation.device.type, enabled=False):
            return functional.conv_transpose2d(scaled, kernel.to(scaled), padding=kernel.shape[-1] // 2)


def _convolved(maps: Tensor, kernel: Tensor) -> Tensor:
    """Convolution to the same size, zeros around."""
    with torch.autocast(maps.device.type, enabled=False):  # a defence means the same at every training precision
        return functional.conv2d(maps, kernel.to(maps), padding=kernel.shape[-1] // 2)


class RandomConv(Defense):
    """Layers of z <- (kernel * z - mean) / deviation with a ReLU between them: (N, channels, H, W).

    The kernels are Gaussian and drawn from the key. The statistics of each map are those of the provider's faces under
    this key, learnt in the fit. The recogniser only understands what was made with the key that it was trained under,
    so the key is a secret that provider and all clients share, and not one of each client: to revoke it is to draw
    another one (``key_seed``) and to fit and train anew.

    A reconstruction: how many kernels there are, of what size and law, is ours.

    Attributes:
        means, deviations: float32 (layers, channels) buffers.
        learnt: bool () buffer, whether they are. Where they are not (in a guess of the key) the first faces that are
            protected tell them, as they would an adversary who tries a key on public faces.
    """

    name = "random-conv"
    summary = "secret random convolutions, normalised by learnt statistics (reconstruction)"
    reference = "random convolution with self-learning batch normalisation, J. Imaging 10(3):59, 2024"
    fidelity = "reconstruction"
    weakened: ClassVar[Mapping[str, Any]] = {"kernel": 1}
    hidden = "secret: the kernels, drawn from a key that can be revoked"
    learns = "mean and deviation of every map"
    trainable = True
    Options = RandomConvOptions
    options: RandomConvOptions
    means: Tensor
    deviations: Tensor
    learnt: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        layers, side, channels = self.options.layers, self.options.kernel, self.options.channels
        drawn = torch.Generator().manual_seed(self.options.key_seed)
        for number in range(layers):
            inputs = channels if number else 3
            kernel = torch.randn(channels, inputs, side, side, generator=drawn) / (inputs * side**2) ** 0.5
            self.register_buffer(f"kernel{number}", kernel)
        self.register_buffer("means", torch.zeros(layers, channels))
        self.register_buffer("deviations", torch.ones(layers, channels))
        self.register_buffer("learnt", torch.tensor(False))

    @property
    def representation_shape(self) -> Shape:
        """(channels, H, W)."""
        return (self.options.channels, self.image_size, self.image_size)

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """The kernels of each layer, (channels, maps before, kernel, kernel)."""
        return {f"kernel{number}": self.get_buffer(f"kernel{number}") for number in range(self.options.layers)}

    def guess(self, generator: torch.Generator) -> Self:
        """Other kernels, with statistics of their own (:attr:`learnt`)."""
        seed = drawn_seed(generator)
        guess = type(self)(self.options.model_copy(update={"key_seed": seed}), image_size=self.image_size)
        return guess.to(self.means).eval()

    def fit(self, training: DefenseTraining) -> None:
        """Measure the maps of each layer on the provider's faces, one pass for each."""

        def passes() -> Iterable[Tensor]:
            for faces, _ in training.batches(_BATCH, training.generator):
                yield faces

        self._learn(passes, lambda done: training.report(done, self.options.layers))

    @torch.no_grad()
    def _learn(self, passes: Callable[[], Iterable[Tensor]], report: Callable[[int], None]) -> None:
        """Set the statistics of layer after layer, each from one pass over faces."""
        for number in range(self.options.layers):
            count, total, squares = 0, torch.zeros(()), torch.zeros(())
            for faces in passes():
                maps = (
                    self._layer(self._after(faces, number), number).flatten(2).transpose(0, 1).flatten(1).cpu().double()
                )
                count += maps.shape[1]
                total, squares = total + maps.sum(dim=1), squares + maps.square().sum(dim=1)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=_LEAST)
            self.means[number] = mean.to(self.means)
            self.deviations[number] = variance.sqrt().to(self.deviations)
            report(number + 1)
        self.learnt.fill_(True)

    def _after(self, maps: Tensor, layers: int) -> Tensor:
        """What the first ``layers`` make of faces."""
        for number in range(layers):
            mean, deviation = (part[number].to(maps)[:, None, None] for part in (self.means, self.deviations))
            maps = (self._layer(maps, number) - mean) / deviation
        return maps

    def _layer(self, maps: Tensor, number: int) -> Tensor:
        """The convolution of a layer, before its statistics."""
        return _convolved(maps.relu() if number else maps, self.get_buffer(f"kernel{number}"))

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        if not self.learnt and len(faces):
            self._learn(lambda: [faces.detach()], lambda done: None)
        return self._after(faces, self.options.layers)

    def linear_operator(self, state: Tensor | None) -> _Convolution | None:
        """Of a single layer."""
        if self.options.layers > 1:
            return None
        return _Convolution(self.get_buffer("kernel0"), self.means[0], self.deviations[0])
