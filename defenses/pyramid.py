"""Laplacian pyramid without its coarsest level: what is left of a face when its rough shape stays at home.

Burt and Adelson, *The Laplacian Pyramid as a Compact Image Code*, IEEE Transactions on Communications 31(4), 1983.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, Shape

#: The generating kernel with a = 0.4 (section II), which is close to a Gaussian.
KERNEL = (0.05, 0.25, 0.4, 0.25, 0.05)


class PyramidOptions(DefenseOptions):
    levels: int = Field(default=3, ge=1, le=8, description="band-pass levels that are sent, each of half the size")


def reduce_matrix(size: int) -> Tensor:
    """REDUCE along one axis: filters and keeps every second value, float64 (ceil(size / 2), size).

    Beyond the border its value is repeated.
    """
    matrix = torch.zeros((size + 1) // 2, size, dtype=torch.float64)
    for row, (offset, weight) in itertools.product(range(len(matrix)), enumerate(KERNEL, start=-2)):
        matrix[row, min(max(2 * row + offset, 0), size - 1)] += weight
    return matrix


def expand_matrix(size: int) -> Tensor:
    """EXPAND along one axis: interpolates between the values, float64 (size, ceil(size / 2)); rows sum to 1."""
    matrix = reduce_matrix(size).T
    return matrix / matrix.sum(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class PyramidOperator:
    """Each level is A x A^T - B x B^T, a :class:`~defenses.base.LinearOperator`.

    Attributes:
        reduced: A, float64 (levels, H, H): the image of that level, repeated to the size of the face.
        expanded: B, float64 (levels, H, H): the next level, expanded to this one and repeated likewise.
    """

    reduced: Tensor
    expanded: Tensor

    @property
    def offset(self) -> Tensor:
        """Zero, float64 (1, 1, 1): the map is linear."""
        return torch.zeros(1, 1, 1, dtype=torch.float64)

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, 3 levels, H, H), dtype and device kept."""
        a, b = self.reduced.to(faces)[:, None], self.expanded.to(faces)[:, None]
        with torch.autocast(faces.device.type, enabled=False):  # a defence means the same at every training precision
            levels: Tensor = a @ faces[:, None] @ a.mT - b @ faces[:, None] @ b.mT
        return levels.flatten(1, 2)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, 3 levels, H, H) to (N, 3, H, H)."""
        a, b = self.reduced.to(representation)[:, None], self.expanded.to(representation)[:, None]
        levels: Tensor = representation.unflatten(1, (-1, 3))
        with torch.autocast(representation.device.type, enabled=False):
            return (a.mT @ levels @ a - b.mT @ levels @ b).sum(dim=1)


class Pyramid(Defense):
    """Band-pass levels of a face, each a part of its own: ``level-l`` is (N, 3, H / 2^l, H / 2^l), about mean 0.

    Kept back is the low-pass level below them, which alone holds brightness, colour and the rough shape.
    """

    name = "pyramid"
    summary = "Laplacian pyramid of the face without its coarsest level"
    reference = "Burt and Adelson, The Laplacian Pyramid as a Compact Image Code, IEEE Trans. Communications, 1983"
    Options = PyramidOptions
    options: PyramidOptions
    reduced: Tensor
    expanded: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        level, reduced, expanded = torch.eye(image_size, dtype=torch.float64), [], []
        self._sizes = []
        for _ in range(self.options.levels):
            size = len(level)
            if size < 2:
                raise ValueError(f"faces of {image_size} pixels have fewer than {self.options.levels} levels")
            coarser = reduce_matrix(size) @ level
            repeat = torch.arange(image_size) * size // image_size  # as the parts are packed
            reduced.append(level[repeat])
            expanded.append((expand_matrix(size) @ coarser)[repeat])
            self._sizes.append(size)
            level = coarser
        self.register_buffer("reduced", torch.stack(reduced), persistent=False)
        self.register_buffer("expanded", torch.stack(expanded), persistent=False)

    @property
    def representation_shape(self) -> Shape:
        """(3 levels, H, H)."""
        return (3 * self.options.levels, self.image_size, self.image_size)

    @property
    def parts(self) -> dict[str, Shape]:
        """``level-0``, the finest, and so on."""
        return {f"level-{level}": (3, size, size) for level, size in enumerate(self._sizes)}

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.linear_operator(state)(faces)

    def linear_operator(self, state: Tensor | None) -> PyramidOperator:
        return PyramidOperator(self.reduced, self.expanded)
