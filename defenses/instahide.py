"""InstaHide: a face mixed with public pictures, and the sign of every element flipped at random.

Huang et al., *InstaHide: Instance-hiding Schemes for Private Distributed Learning*, ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import DefenseError
from defenses.base import Defense, DefenseOptions, DefenseTraining
from defenses.linear import ElementwiseOperator

_BATCH = 256
#: In a state, in place of a picture's number: nothing is mixed in.
_PLAIN = -1


class InstaHideOptions(DefenseOptions):
    mixed: int = Field(default=4, ge=2, le=6, description="k, pictures in a mixture: the face and k - 1 public ones")
    largest: float = Field(
        default=0.65,
        ge=0.55,
        le=1,
        allow_inf_nan=False,
        description="coefficients are drawn again while one is larger than this",
    )
    pool: int = Field(
        default=1000, ge=1, le=50_000, description="public pictures, fewer where the provider has not so many faces"
    )
    inference: Literal["encoded", "plain"] = Field(
        default="encoded",
        description="what a query is: encoded as faces are in training or, as the released test path has it, the plain "
        "face, normalised",
    )


class InstaHide(Defense):
    """z = s (w_1 x + w_2 p_2 + ... + w_k p_k), (N, 3, H, W), x and p normalised by the channel.

    w = |N(0, 1)|, divided by their sum and drawn again while one exceeds ``largest``; s is +-1, drawn for every
    element; the p are drawn with replacement from a public pool. All of it is fresh for each face. The state of a
    face, int64 (k - 1,), holds the numbers of the pictures that were mixed in; coefficients and signs are no countable
    state.

    Simplified in one respect: the paper mixes labels as it mixes faces, with those of one training batch. A recogniser
    here is trained on queries as they are sent, a face among public pictures, with the label of the face alone.

    Attributes:
        pool: uint8 (P, 3, H, W), of the provider's faces, but public: the attacker has it, too.
        mean, deviation: float32 (3, 1, 1), of the channels of the provider's faces.
    """

    name = "instahide"
    summary = "the face mixed with public pictures, every element's sign flipped at random (simplified)"
    reference = "Huang et al., InstaHide: Instance-hiding Schemes for Private Distributed Learning, ICML 2020"
    fidelity = "simplified"
    weakened: ClassVar[Mapping[str, Any]] = {"inference": "plain"}
    hidden = "state: which public pictures were mixed in; noise: coefficients, and the sign of every element"
    learns = "mean and deviation of the channels; which faces of the provider are the public pool"
    departures: ClassVar[Mapping[str, str]] = {
        "inference=plain": "faces are encoded in training only: a query is the plain face, normalised",
    }
    trainable = True
    Options = InstaHideOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {"pool": 200}}
    options: InstaHideOptions
    pool: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.register_buffer("pool", torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("deviation", torch.full((3, 1, 1), 0.5))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (pool := state_dict.get(f"{prefix}pool")) is not None:  # how many there are is known after the fit
            self.pool = torch.empty_like(pool, device=self.pool.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, training: DefenseTraining) -> None:
        """Choose the pool at random, and measure the channels on the faces that are passed on the way to it."""
        pool: list[Tensor] = []
        for faces, _ in training.batches(_BATCH, training.generator):
            pool.append((255 * faces).round().to(torch.uint8))
            count = sum(map(len, pool))
            training.report(min(count, self.options.pool), min(self.options.pool, training.images))
            if count >= self.options.pool:
                break
        seen = torch.cat(pool)
        channels = seen.transpose(0, 1).flatten(1).double() / 255
        self.mean.copy_(channels.mean(dim=1)[:, None, None])
        self.deviation.copy_(channels.std(dim=1)[:, None, None])
        self.pool = seen[: self.options.pool].clone()

    # -- what it draws ---------------------------------------------------------------------------

    @property
    def _plain(self) -> bool:
        return self.options.inference == "plain"

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """Numbers of the pictures to mix with, int64 (count, k - 1), -1 where a query stays plain.

        Raises:
            DefenseError: there is no pool, as it is not fitted.
        """
        others = self.options.mixed - 1
        if self._plain and labels is None:
            return torch.full((count, others), _PLAIN)
        if not len(self.pool):
            raise DefenseError(f"{self.name} mixes faces with public pictures and has none: fit it to some faces first")
        return torch.randint(len(self.pool), (count, others), generator=generator, device=generator.device).cpu()

    def states(self) -> Tensor | None:
        """The one of a plain query; else there are too many to be listed."""
        return torch.full((1, self.options.mixed - 1), _PLAIN) if self._plain else None

    @property
    def entropy_bits(self) -> float:
        """Of the pictures that are mixed in, of a full pool; coefficients and signs are not counted."""
        return 0.0 if self._plain else (self.options.mixed - 1) * math.log2(self.options.pool)

    @property
    def mixed_in(self) -> tuple[Tensor, int] | None:
        """The pool, normalised, and k - 1; None where queries are plain."""
        if self._plain or not len(self.pool):
            return None
        return self.normalised(self.pool.float() / 255), self.options.mixed - 1

    def _coefficients(self, count: int, generator: torch.Generator) -> Tensor:
        """w, float32 (count, k) on the generator's device."""

        def drawn(rows: int) -> Tensor:
            normal = torch.randn(rows, self.options.mixed, generator=generator, device=generator.device).abs()
            return normal / normal.sum(dim=1, keepdim=True)

        weights = drawn(count)
        while len(rows := (weights.amax(dim=1) > self.options.largest).nonzero().flatten()):
            weights[rows] = drawn(len(rows))
        return weights

    # -- what it does ----------------------------------------------------------------------------

    def normalised(self, pictures: Tensor) -> Tensor:
        """Float pictures (..., 3, H, W) in [0, 1], by the channel."""
        return (pictures - self.mean.to(pictures)) / self.deviation.to(pictures)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Coefficients and signs are drawn in float32 on the generator's device.

        Raises:
            ValueError: ``state`` is not k - 1 numbers of pictures of the pool for each face.
        """
        count, others, pool = len(faces), self.options.mixed - 1, self.pool
        if state is None or state.shape != (count, others):
            raise ValueError(f"{self.name} needs the numbers of the pictures to mix with, int64 ({count}, {others})")
        face, plain = self.normalised(faces), (state < 0).all(dim=1)
        if bool((state >= len(pool)).any() or (state < 0).any(dim=1).ne(plain).any()):
            raise ValueError(f"{self.name} has public pictures 0..{len(pool) - 1}")
        if bool(plain.all()):
            return face
        public = self.normalised(pool[state.clamp(min=0).to(pool.device)].to(faces) / 255)
        weights = self._coefficients(count, generator).to(faces)
        signs = torch.randint(2, faces.shape, generator=generator, device=generator.device).to(faces) * 2 - 1
        mixture = signs * torch.einsum("nk,nkchw->nchw", weights, torch.cat((face[:, None], public), dim=1))
        return torch.where(plain.to(faces.device)[:, None, None, None], face, mixture)

    def linear_operator(self, state: Tensor | None) -> ElementwiseOperator | None:
        """Of a plain query; a mixture's signs are drawn anew for every face."""
        if state is None or bool((state >= 0).any()):
            return None
        gain = 1 / self.deviation.double()
        return ElementwiseOperator(gain, -gain * self.mean.double())
