"""Linear defences whose noise is not the same everywhere, or not drawn for each face by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from defenses.base import Defense


class Windows(Defense):
    """Five channels of 3x3 windows over all colours, in one place otherwise than in the other, under Laplace noise."""

    name = "windows"
    kind = "element"

    def __init__(self, options=None, *, image_size=112):
        super().__init__(options, image_size=image_size)
        drawn = torch.Generator().manual_seed(5)
        self.register_buffer("kernels", torch.randn(5, 3, 3, 3, generator=drawn, dtype=torch.float64) / 4)
        ramp = torch.linspace(-2, 2, image_size, dtype=torch.float64)
        levels = {
            "equal": torch.zeros(5, 1, 1, dtype=torch.float64),
            "channel": torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None],
            "element": torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None, None] + (ramp[:, None] + ramp) / 2,
        }[self.kind]
        self.register_buffer("scale", 0.1 * levels.exp().expand(5, image_size, image_size).clone())

    @property
    def representation_shape(self):
        return (5, self.image_size, self.image_size)

    def law(self, shape, generator: torch.Generator) -> Tensor:
        """Laplace noise of variance 1."""
        u = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 1e-12)) / 2**0.5

    def transform(self, faces, state, generator):
        drawn = self.law((len(faces), *self.representation_shape), generator).to(faces.device)
        sent = self.linear_operator(state)(faces.double()) + 0.25
        return (sent + self.scale * drawn).to(faces)

    def linear_operator(self, state):
        return _Windows(self.kernels)


class Shared(Windows):
    """The same, with noise that is drawn once for a batch."""

    name = "shared"
    shares = True

    @property
    def shares_noise(self):
        return self.shares

    def law(self, shape, generator):
        return super().law((1, *shape[1:]), generator).expand(shape)


class _Windows:
    offset = torch.full((1, 1, 1), 0.25, dtype=torch.float64)

    def __init__(self, kernels: Tensor) -> None:
        self.kernels = kernels

    def __call__(self, faces: Tensor) -> Tensor:
        return functional.conv2d(faces, self.kernels.to(faces), padding=1)

    def adjoint(self, representation: Tensor) -> Tensor:
        return functional.conv_transpose2d(representation, self.kernels.to(representation), padding=1)


class Partly(Windows):
    """Two of the windows, and between them features of a network."""

    name = "partly"
    kind = "equal"
    declares = False

    @property
    def representation_shape(self):
        return (4, self.image_size, self.image_size)

    @property
    def linear_channels(self):
        return torch.tensor([0, 3]) if self.declares else None

    def transform(self, faces, state, generator):
        windows = _Windows(self.kernels)(faces)
        sent = torch.stack((windows[:, 0], windows[:, 2].tanh(), windows[:, 3].square(), windows[:, 1]), dim=1)
        return sent + 0.02 * torch.randn(sent.shape, generator=generator).to(sent)

    def linear_operator(self, state):
        return _Level(self.kernels[:2]) if self.declares else None


class _Level(_Windows):
    offset = torch.zeros(1, 1, 1, dtype=torch.float64)


class Reassembled(Defense):
    """Twelve sums of pixels under Laplace noise of scales of their own, put together to a picture again."""

    name = "reassembled"

    def __init__(self, options=None, *, image_size=112):
        super().__init__(options, image_size=image_size)
        drawn = torch.Generator().manual_seed(6)
        smooth = torch.randn(12, 3, 4, 4, generator=drawn, dtype=torch.float64)
        patterns = functional.interpolate(smooth, (image_size, image_size), mode="bicubic").flatten(1)
        self.register_buffer("basis", torch.linalg.qr(patterns.T).Q.T.contiguous())
        self.register_buffer("scale", torch.linspace(-2, 1, 12, dtype=torch.float64).exp())

    def coefficients(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1).double() @ self.basis.T

    def transform(self, faces, state, generator):
        noise = Windows.law(self, (len(faces), 12), generator).to(faces.device) * self.scale
        return ((self.coefficients(faces) + noise) @ self.basis).view_as(faces).to(faces)

    def linear_operator(self, state):
        return _Projection(self.basis)


class Weighed(Defense):
    """Three colours through three windows each, any of which is a product; noise of its own in each of the channels.

    ``off``: how far its logarithm is from that of one for the colour times one for the window.
    """

    name = "weighed"
    off = 0.0

    def __init__(self, options=None, *, image_size=112):
        super().__init__(options, image_size=image_size)
        self.operator = _Sum(image_size)
        drawn = torch.Generator().manual_seed(8)
        colours, windows = torch.tensor([1.0, -0.5, -0.5]), torch.tensor([0.8, 0.0, -0.8])
        rest = self.off * torch.randn(3, 3, generator=drawn)
        scale = 0.1 * (colours[:, None] + windows + rest).double().exp()
        self.register_buffer("scale", scale.view(9, 1, 1))

    @property
    def representation_shape(self):
        return (9, self.image_size, self.image_size)

    def transform(self, faces, state, generator):
        drawn = torch.randn(len(faces), *self.representation_shape, generator=generator, dtype=torch.float64)
        return (self.operator(faces.double()) + self.scale * drawn.to(faces.device)).to(faces)

    def linear_operator(self, state):
        return self.operator


class _Sum:
    offset = torch.zeros(1, 1, 1, dtype=torch.float64)
    colour = torch.tensor([[0.3, 0.6, 0.1], [-0.2, -0.3, 0.5], [0.5, -0.4, -0.1]], dtype=torch.float64)

    def __init__(self, size: int) -> None:
        near = (torch.arange(size)[:, None] - torch.arange(size)).abs() <= 1
        drawn = torch.randn(6, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.row_factors, self.column_factors = (drawn * near).split(3)

    def __call__(self, faces: Tensor) -> Tensor:
        planes = torch.einsum("pc,nchw->nphw", self.colour, faces)
        return torch.einsum("kih,nphw,kjw->npkij", self.row_factors, planes, self.column_factors).flatten(1, 2)

    def adjoint(self, representation: Tensor) -> Tensor:
        maps = representation.unflatten(1, (3, 3))
        planes = torch.einsum("kih,npkij,kjw->nphw", self.row_factors, maps, self.column_factors)
        return torch.einsum("pc,nphw->nchw", self.colour, planes)


class _Projection:
    offset = torch.zeros(1, 1, 1, dtype=torch.float64)

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def __call__(self, faces: Tensor) -> Tensor:
        basis = self.basis.to(faces)
        return (faces.flatten(1) @ basis.T @ basis).view_as(faces)

    adjoint = __call__
