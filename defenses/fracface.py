"""FracFace: half of the high-frequency channels, rearranged by a small secret square that is applied to itself.

*FracFace: Breaking the Visual Clues -- Fractal-Based Privacy-Preserving Face Recognition*, NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from bench.randomness import drawn_seed
from defenses.base import Defense, DefenseOptions, Shape
from defenses.frequency import CHANNELS, SpectrumOperator, zigzag
from defenses.ranks import OFFICIAL_SIGMA, Seed

_ROWS, _COLUMNS = 18, 9
#: Channels of part 1, a square of 9 x 9, and values of the secret, a square of 3 x 3.
_SIDE, _KEY_SIDE = 9, 3
_SENT, _VALUES = _SIDE**2, _KEY_SIDE**2


class FracFaceOptions(DefenseOptions):
    permutation: Literal["paper", "official"] = Field(
        default="paper",
        description="paper: the secret holds each of 1..9 once, so that all 81 channels are sent, permuted; official: "
        "it is drawn with replacement, so that channels repeat and others (on average 45 of 81) are lost",
    )
    input: Literal["paper", "official"] = Field(
        default="paper",
        description="paper: the transform sees the face; official: it takes a face of [0, 1] for one of [-1, 1], which "
        "halves every coefficient",
    )
    key_seed: Seed = Field(default=0, description="seed of the secret square")


class FracFace(Defense):
    """81 block-DCT coefficients, (N, 81, H, W), un-normalised, within +-78 (half of that with ``input=official``).

    Of each colour the ten lowest frequencies are pruned. The 162 channels that are left lie in a snake of 18 rows by 9
    columns (odd rows run backwards), of which the first nine rows are kept: 54 of Y, 27 of Cb, none of Cr. The secret
    square A, 3 x 3 with values 1..9, says which of them stands in row r and column c of the nine by nine that are sent:
    number 9 (A[r // 3, c // 3] - 1) + A[r % 3, c % 3] - 1. It is the same for all faces.
    """

    name = "fracface"
    summary = "half of the high-frequency channels, rearranged by a secret of nine numbers"
    reference = "FracFace: Breaking the Visual Clues, NeurIPS 2025"
    fidelity = "faithful"
    weakened: ClassVar[Mapping[str, Any]] = {"permutation": "paper"}
    hidden = "secret: a square of 3 x 3 numbers, the same for all faces"
    departures: ClassVar[Mapping[str, str]] = {
        "permutation=official": "the secret is drawn with replacement: no permutation, 35.5 of 81 channels survive",
        "input=official": "a face of [0, 1] is fed to a transform of [-1, 1]: coefficients are halved",
    }
    Options = FracFaceOptions
    options: FracFaceOptions
    square: Tensor
    channels_in: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        kept = sorted(set(range(CHANNELS)) - set(zigzag(OFFICIAL_SIGMA)))
        both = torch.tensor(
            kept + [CHANNELS + channel for channel in kept] + [2 * CHANNELS + channel for channel in kept]
        )
        snake = both.view(_ROWS, _COLUMNS).clone()
        snake[1::2] = snake[1::2].flip(1)
        self.register_buffer("channels_in", snake.flatten()[:_SENT], persistent=False)
        drawn = torch.Generator().manual_seed(self.options.key_seed)
        values = (
            torch.randperm(_VALUES, generator=drawn)
            if self.options.permutation == "paper"
            else torch.randint(_VALUES, (_VALUES,), generator=drawn)
        )
        self.register_buffer("square", 1 + values.view(_KEY_SIDE, _KEY_SIDE))

    @property
    def representation_shape(self) -> Shape:
        """(81, H, W)."""
        return (_SENT, self.image_size, self.image_size)

    @property
    def sent(self) -> Tensor:
        """The number in part 1 of each channel that is sent, int64 (81,); a permutation if the square holds one."""
        values = self.square.flatten() - 1
        block, within = _cells()
        return _VALUES * values[block] + values[within]

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """``square``: int64 (3, 3), values 1..9."""
        return {"square": self.square}

    def guess(self, generator: torch.Generator) -> Self:
        """The same mechanism with a square drawn at random."""
        seed = drawn_seed(generator)
        return self._imitation(self.options.model_copy(update={"key_seed": seed}))

    def _imitation(self, options: DefenseOptions) -> Self:
        return type(self)(options, image_size=self.image_size).to(self.square.device)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.linear_operator(state)(faces)

    def linear_operator(self, state: Tensor | None) -> SpectrumOperator:
        scale = 0.5 if self.options.input == "official" else 1.0
        return SpectrumOperator(self.image_size, self.channels_in[self.sent], scale)

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """The channels of part 1 in their order, (N, 81, h, w): the mean of those sent more than once, zero if never.

        Raises:
            ValueError: shapes that do not fit.
        """
        if representation.ndim != 4 or representation.shape[1] != _SENT:
            raise ValueError(f"expected (N, {_SENT}, h, w), got {tuple(representation.shape)}")
        sent = self.sent.to(representation.device)
        copies = torch.bincount(sent, minlength=_SENT).clamp(min=1)
        canonical = torch.zeros_like(representation).index_add(1, sent, representation)
        return canonical / copies.to(representation)[:, None, None]

    def with_layouts(self, layouts: Tensor) -> Self:
        """The mechanism whose square agrees best with the canonical channels ``layouts[0]``, int64 (1, 81).

        Each of the 81 numbers speaks for two values of the square; of 18 voices for each most decide.

        Raises:
            ValueError: more than one layout, or layouts of another kind.
        """
        if layouts.dtype != torch.int64 or tuple(layouts.shape) != (1, _SENT):
            raise ValueError(f"layouts must be int64 (1, {_SENT}), got {layouts.dtype} {tuple(layouts.shape)}")
        if int(layouts.min()) < 0 or int(layouts.max()) >= _SENT:
            raise ValueError(f"layouts must lie in 0..{_SENT - 1}")
        votes = torch.zeros(_VALUES, _VALUES, dtype=torch.int64)
        read = layouts[0].cpu()
        for cell, value in zip(_cells(), (read // _VALUES, read % _VALUES), strict=True):
            votes.index_put_((cell, value), torch.ones_like(cell), accumulate=True)
        if self.options.permutation == "paper":
            from scipy.optimize import linear_sum_assignment  # slow to import, and seldom needed

            values = torch.from_numpy(linear_sum_assignment(votes.numpy(), maximize=True)[1])
        else:
            values = votes.argmax(dim=1)
        imitation = self._imitation(self.options)
        imitation.square = 1 + values.view(_KEY_SIDE, _KEY_SIDE).to(self.square.device)
        return imitation


def _cells() -> tuple[Tensor, Tensor]:
    """The two cells of the square, int64 (81,) each, 0..8, that decide on each place of the nine by nine."""
    row, column = torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij")
    side = _KEY_SIDE
    block, within = side * (row // side) + column // side, side * (row % side) + column % side
    return block.flatten(), within.flatten()
