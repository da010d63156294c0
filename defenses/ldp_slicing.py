"""LDP-Slicing: the bits of a picture's details, each told with a chance of a lie.

*LDP-Slicing*, CVPR 2026: the low-low band of a Haar wavelet transform is zeroed, the picture is cut into the 24 bit
planes of its YCbCr values, and every bit passes randomised response (Warner, *Randomized Response*, JASA 60, 1965).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, Shape
from defenses.draws import uniform
from defenses.frequency import YCBCR
from defenses.linear import SeparableTerms, mosaic_matrix

BITS = 8
#: w_c of Y, Cb and Cr.
WEIGHTS = (4.0, 1.0, 1.0)


class LDPSlicingOptions(DefenseOptions):
    """Options of :class:`LDPSlicing`. A huge budget keeps every bit as it is."""

    epsilon: float = Field(
        default=20.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="privacy budget of a pixel, shared out over its 24 bits",
    )
    levels: int = Field(
        default=1,
        ge=1,
        le=10,
        description="levels of the Haar transform; what is zeroed are the means of squares of 2^levels pixels",
    )
    reading: Literal["planes", "debiased", "picture"] = Field(
        default="planes",
        description="what is made of the received bits: 24 planes; the unbiased estimate of the picture; or the "
        "picture that they spell",
    )


class LDPSlicing(Defense):
    """Bits under randomised response, sent as three bytes a pixel.

    The face without the means of its squares of 2 x 2 pixels goes to YCbCr, every colour around 128, and to eight bits.
    Bit b (1..8, the highest last) of colour c is kept with probability p = e^eps / (1 + e^eps), else flipped, where
    eps is proportional to sqrt(w_c 2^(b-1)) and the 24 of them sum to ``epsilon``. Nothing is trained or secret.

    Whatever the ``reading``, the same bits are sent. ``planes`` are (N, 24, H, W) of 0 and 1, colour by colour, the
    lowest bit first. ``debiased``, (N, 3, H, W), weighs each bit by 2^(b-1) (bit - (1 - p)) / (2p - 1), of which the
    mean over all lies is the picture: a linear map of the face under noise. ``picture``, (N, 3, H, W) in [0, 1], takes
    the bits at their word.
    """

    name = "ldp-slicing"
    summary = "reconstruction: bit planes of a face's details, each bit flipped at random under a privacy budget"
    reference = "LDP-Slicing, CVPR 2026"
    fidelity = "reconstruction"
    weakened: ClassVar[Mapping[str, Any]] = {"epsilon": 1e6, "levels": 5}
    hidden = "noise: which bits were flipped"
    differentiable: ClassVar[bool] = False
    Options = LDPSlicingOptions
    options: LDPSlicingOptions
    keep: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        colour = torch.tensor(YCBCR, dtype=torch.float64)
        low = mosaic_matrix(image_size, 2**self.options.levels)
        self._detail = SeparableTerms(
            torch.stack((colour, -colour)),
            torch.stack((torch.eye(image_size, dtype=torch.float64), low)),
            torch.full((3, 1, 1), 128 / 255, dtype=torch.float64),
        )
        self.register_buffer("keep", torch.sigmoid(self.budgets), persistent=False)

    @property
    def budgets(self) -> Tensor:
        """Epsilon of each bit, float64 (3, 8), the lowest first: they sum to the budget of a pixel."""
        shares = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None] * 2.0 ** torch.arange(BITS)
        return self.options.epsilon * shares.sqrt() / shares.sqrt().sum()

    @property
    def representation_shape(self) -> Shape:
        """(24 or 3, H, W)."""
        channels = 3 * BITS if self.options.reading == "planes" else 3
        return (channels, self.image_size, self.image_size)

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """24 bits a pixel, whatever is made of them."""
        return 3 * self.image_size**2

    @property
    def epsilon(self) -> dict[str, float]:
        """``element`` is a pixel with its 24 bits."""
        return {"element": self.options.epsilon, "image": self.options.epsilon * self.image_size**2}

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """The received bits as ``reading`` says; a uniform number is drawn for each bit."""
        levels = (255 * (self._detail(faces) + self._detail.offset.to(faces))).round().clamp(0, 255).to(torch.int64)
        order = torch.arange(BITS, device=faces.device)
        bits = (levels[:, :, None] >> order[:, None, None]) & 1  # (N, 3, 8, H, W)
        drawn = uniform(bits.shape, generator, faces.device)
        received = (bits ^ (drawn >= self.keep[..., None, None]).long()).to(faces.dtype)
        if self.options.reading == "planes":
            return received.flatten(1, 2)
        values = torch.exp2(order.to(faces))[:, None, None] / 255
        if self.options.reading == "picture":
            return (received * values).sum(dim=2)
        keep = self.keep.to(faces)[..., None, None]
        return ((received - (1 - keep)) / (2 * keep - 1) * values).sum(dim=2)

    def linear_operator(self, state: Tensor | None) -> SeparableTerms | None:
        """Of ``debiased``, exact but for rounding, and noise that is independent from pixel to pixel."""
        return self._detail if self.options.reading == "debiased" else None
