"""HFCF: the fine structure of a face and a few of its colours, both under noise.

*Privacy-Preserving Face Recognition in Hybrid Frequency-Color Domain*, arXiv 2401.13386. No code is public: which high
frequencies are sent, how sparse the colours are, and to what the noise is calibrated, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, Shape
from defenses.draws import laplace
from defenses.frequency import YCBCR
from defenses.linear import SeparableTerms, area_matrix, mosaic_matrix

#: How far two faces can lie apart in an element: a detail lies in -1..1, a mean colour in 0..1.
SENSITIVITIES = (2.0, 1.0)


class HybridOptions(DefenseOptions):
    """Options of :class:`Hybrid`; lengths in pixels of the 112x112 template, scaled with the size of the face."""

    cell: float = Field(
        default=8, ge=1, le=112, allow_inf_nan=False, description="side of the squares whose mean luma is taken away"
    )
    sparsity: float = Field(
        default=16, ge=1, le=112, allow_inf_nan=False, description="side of the squares of which one colour is sent"
    )
    epsilon: float = Field(
        default=40.0, gt=0, le=1e9, allow_inf_nan=False, description="privacy budget of each number that is sent"
    )


class Hybrid(Defense):
    """Two parts: ``detail`` (N, 1, H, W), luma less local means, and ``colour`` (N, 3, g, g), mean RGB.

    To every number Laplace noise is added of scale sensitivity / epsilon, where the sensitivity is the width of all
    values that it can take: 2 for a detail, 1 for a colour. The map is linear; nothing is trained or secret.
    """

    name = "hybrid"
    summary = "reconstruction: high frequencies of luma and a coarse grid of colours, under Laplace noise (HFCF)"
    reference = "Privacy-Preserving Face Recognition in Hybrid Frequency-Color Domain, arXiv 2401.13386"
    fidelity = "reconstruction"
    weakened: ClassVar[Mapping[str, Any]] = {"cell": 112, "sparsity": 1, "epsilon": 1e9}
    hidden = "noise: on every number"
    Options = HybridOptions
    options: HybridOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self._cells = min(image_size, max(1, round(112 / self.options.sparsity)))
        repeated = torch.arange(image_size) * self._cells // image_size  # as parts are packed
        luma, nothing = torch.tensor(YCBCR[:1], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
        detail, colour = (
            torch.cat((luma, nothing.expand(3, 3))),
            torch.cat((nothing, torch.eye(3, dtype=torch.float64))),
        )
        low = mosaic_matrix(image_size, max(1, round(self.options.cell * image_size / 112)))
        self._map = SeparableTerms(
            torch.stack((detail, -detail, colour)),
            torch.stack(
                (torch.eye(image_size, dtype=torch.float64), low, area_matrix(self._cells, image_size)[repeated])
            ),
        )

    @property
    def representation_shape(self) -> Shape:
        """(4, H, W)."""
        return (4, self.image_size, self.image_size)

    @property
    def parts(self) -> dict[str, Shape]:
        """``detail`` and ``colour``."""
        return {"detail": (1, self.image_size, self.image_size), "colour": (3, self._cells, self._cells)}

    @property
    def epsilon(self) -> dict[str, float]:
        """``element`` is a number that is sent."""
        numbers = self.bytes_per_face(torch.uint8)
        return {"element": self.options.epsilon, "image": self.options.epsilon * numbers}

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Both parts, the noise drawn in float32 on the generator's device."""
        noise = {
            name: laplace((len(faces), *shape), generator, faces.device).to(faces) * (width / self.options.epsilon)
            for (name, shape), width in zip(self.parts.items(), SENSITIVITIES, strict=True)
        }
        return self._map(faces) + self.pack(noise)

    def linear_operator(self, state: Tensor | None) -> SeparableTerms:
        return self._map
