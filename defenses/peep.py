"""PEEP: Laplace noise on the eigenface coefficients of a face, which is then put together again.

Chamikara et al., *Privacy Preserving Face Recognition Utilizing Differential Privacy*, Computers & Security 97, 2020.
No code is public; what the paper leaves open is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from defenses.base import Defense, DefenseOptions, DefenseTraining
from defenses.draws import laplace

_BATCH = 256
#: Random directions beyond those asked for (Halko et al. 2011, section 4).
_OVERSAMPLING = 32
#: Share of the largest singular value below which a component is rounding error.
_NEGLIGIBLE = 1e-4


class PeepOptions(DefenseOptions):
    epsilon: float = Field(
        default=5.0,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="privacy budget: of each coefficient, with sensitivity=l1 of the whole face",
    )
    sensitivity: Literal["range", "bound", "l1", "std"] = Field(
        default="range",
        description="how far a coefficient is taken to move from face to face. range: from the least to the largest "
        "of the provider's faces; bound: over all pictures there can be, a guarantee; l1: the sum of all ranges, for "
        "every coefficient; std: one standard deviation, as if whitened ones moved by 1, which guarantees nothing",
    )
    components: int = Field(
        default=128, ge=1, le=4096, description="eigenfaces, fewer where the provider's faces do not give so many"
    )
    faces: int = Field(
        default=2000, ge=2, le=100_000, description="faces of the provider that eigenfaces are made of, at most"
    )


@dataclass(frozen=True, eq=False)
class _Projection:
    """z = B^T B x + offset with orthonormal rows ``basis`` B, (r, 3, H, W)."""

    basis: Tensor
    offset: Tensor

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, W) to the same, dtype and device kept."""
        return _combined(_coefficients(faces, self.basis), self.basis)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: a projection is its own adjoint."""
        return self(representation)


def _coefficients(faces: Tensor, basis: Tensor) -> Tensor:
    with torch.autocast(faces.device.type, enabled=False):  # a defence means the same at every training precision
        return faces.flatten(1) @ basis.to(faces).flatten(1).T


def _combined(coefficients: Tensor, basis: Tensor) -> Tensor:
    with torch.autocast(coefficients.device.type, enabled=False):
        flat = coefficients @ basis.to(coefficients).flatten(1)
    return flat.view(-1, *basis.shape[1:])


class Peep(Defense):
    """z = mean + B^T (B (x - mean) + b Laplace), a picture (N, 3, H, W), not clipped.

    B holds the eigenfaces, b_i = sensitivity_i / epsilon. The noise is fresh for each face and no countable state;
    nothing is secret. The numbers of a picture are 3 H W, but no more than its coefficients is said by it.

    A reconstruction: whose eigenfaces, how many of them, and what the sensitivity is of, is ours. With ``range`` and
    ``l1`` the budget holds for faces whose coefficients lie within the provider's range.
    """

    name = "peep"
    summary = "Laplace noise on eigenface coefficients, put together to a picture again (reconstruction)"
    reference = "Chamikara et al., Privacy Preserving Face Recognition Utilizing Differential Privacy, 2020"
    fidelity = "reconstruction"
    weakened: ClassVar[Mapping[str, Any]] = {"epsilon": 1e6}
    hidden = "noise: drawn for every coefficient of every face; nothing is secret"
    learns = "mean and eigenfaces of the provider's faces, and how far their coefficients reach"
    trainable = True
    Options = PeepOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {"faces": 500}}
    options: PeepOptions

    mean: Tensor
    basis: Tensor
    reach: Tensor
    deviation: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        shape, count = (3, image_size, image_size), self.options.components
        self.register_buffer("mean", torch.full(shape, 0.5))
        self.register_buffer("basis", torch.zeros(count, *shape))
        self.register_buffer("reach", torch.zeros(count))
        self.register_buffer("deviation", torch.zeros(count))

    def fit(self, training: DefenseTraining) -> None:
        """Principal components of the provider's faces (Turk and Pentland 1991), and what their coefficients are."""
        parts: list[Tensor] = []
        for faces, _ in training.batches(_BATCH, training.generator):
            parts.append(faces)
            if (count := sum(map(len, parts))) >= self.options.faces:
                break
            training.report(count, min(self.options.faces, training.images))
        faces = torch.cat(parts)[: self.options.faces].float()
        mean = faces.mean(dim=0)
        centred = (faces - mean).flatten(1)
        sought = min(self.options.components + _OVERSAMPLING, *centred.shape)
        _, values, vectors = torch.pca_lowrank(centred, q=sought, center=False, niter=4)
        rank = min(self.options.components, int((values > _NEGLIGIBLE * values[0]).sum()))
        basis = torch.zeros_like(self.basis)
        basis[:rank] = vectors[:, :rank].T.unflatten(1, mean.shape)
        coefficients = _coefficients(faces - mean, basis)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.reach.copy_(coefficients.amax(dim=0) - coefficients.amin(dim=0))
        self.deviation.copy_(coefficients.std(dim=0))

    @property
    def epsilon(self) -> Mapping[str, float]:
        """Of a coefficient and of a face; empty with ``std``, which claims none."""
        epsilon, sensitivity = self.options.epsilon, self.options.sensitivity
        if sensitivity == "std":
            return {}
        return {"element": epsilon, "image": epsilon if sensitivity == "l1" else epsilon * self.options.components}

    @property
    def scale(self) -> Tensor:
        """b, the scale of the Laplace noise of each coefficient, (r,)."""
        sensitivity = {
            "range": self.reach,
            "bound": self.basis.flatten(1).abs().sum(dim=1),  # pixels lie in [0, 1]
            "l1": self.reach.sum().expand_as(self.reach),
            "std": self.deviation,
        }
        return sensitivity[self.options.sensitivity] / self.options.epsilon

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """The noise is drawn in float32."""
        noise = laplace((len(faces), len(self.basis)), generator, faces.device).to(faces) * self.scale.to(faces)
        return _combined(_coefficients(faces - self.mean.to(faces), self.basis) + noise, self.basis) + self.mean.to(
            faces
        )

    def linear_operator(self, state: Tensor | None) -> _Projection:
        basis, mean = self.basis.double(), self.mean.double()
        return _Projection(basis, mean - _combined(_coefficients(mean[None], basis), basis)[0])
