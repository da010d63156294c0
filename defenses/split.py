"""Split inference: the first layers of a network run at the client, and only their features are sent.

Kang et al., *Neurosurgeon*, ASPLOS 2017; features under noise as in Titcombe et al., *Practical Defences Against Model
Inversion Attacks for Split Neural Networks*, 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from defenses.base import DefenseOptions, DefenseTraining, Shape
from defenses.client import ClientDefense, train_jointly, with_noise


class SplitOptions(DefenseOptions):
    width: int = Field(default=16, ge=1, le=1024, description="channels of the features that are sent")
    noise: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="standard deviation of the noise; a feature's is 1",
    )
    epochs: int = Field(default=8, ge=1, le=10_000, description="passes of the joint training over the faces")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of the joint training")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False, description="of Adam, constant")


class Split(ClientDefense):
    """Features of two strided convolutions: (N, width, H/4, W/4), each channel of about mean 0 and variance 1.

    The client's network is trained jointly with a recogniser, under the noise that is added later, and then frozen. It
    is public, as it lies on every client; the noise is fresh for each face and no countable state.
    """

    name = "split"
    summary = "features of a small client network, trained jointly with a recogniser, and noise"
    reference = "split inference: Kang et al. (Neurosurgeon), ASPLOS 2017; noise: Titcombe et al., 2021"
    Options = SplitOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {"epochs": 2}}
    options: SplitOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        width = self.options.width
        self.client = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width, affine=False),
        )

    @property
    def representation_shape(self) -> Shape:
        """(width, H/4, W/4), rounded up."""
        side = -(-self.image_size // 4)
        return (self.options.width, side, side)

    def fit(self, training: DefenseTraining) -> None:
        """Train the client's network and a recogniser behind it to tell the provider's identities apart."""
        recogniser, head = training.make_recogniser(self.representation_shape)

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            sent = with_noise(self.client(faces), self.options.noise, generator)
            value: Tensor = head(recogniser(sent), labels)[0]
            return value

        train_jointly(
            training,
            {"client": self.client, "recogniser": recogniser, "head": head},
            lambda weights: [torch.optim.Adam(weights, lr=self.options.learning_rate)],
            loss,
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
        )

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Noisy features, computed in the network's own precision."""
        return with_noise(self.features(faces), self.options.noise, generator)
