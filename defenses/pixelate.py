"""Pixelation: the mean colour of square cells. The classic obfuscation, and a weak one."""

from __future__ import annotations

from pydantic import Field

from defenses.base import DefenseOptions
from defenses.linear import SeparableDefense, area_matrix


class PixelateOptions(DefenseOptions):
    block: float = Field(
        default=8, ge=1, le=112, allow_inf_nan=False, description="side of a cell, in pixels of the 112x112 template"
    )


class Pixelate(SeparableDefense):
    """Sends the grid of cell means itself, (N, 3, g, g) in [0, 1], not the mosaic blown up to the size of the face.

    Both carry the same information; the grid is what has to be transmitted. g = round(112 / block) whatever the
    size of the face (at most that size), so that a defence of one name is equally strong at every resolution.
    """

    name = "pixelate"
    summary = "mean colour of square cells"
    Options = PixelateOptions
    options: PixelateOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.cells = min(image_size, max(1, round(112 / self.options.block)))
        self.register_buffer("factor", area_matrix(self.cells, image_size), persistent=False)

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        """(3, g, g)."""
        return (3, self.cells, self.cells)
