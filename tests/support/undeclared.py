"""Linear defences that say little or nothing of what they are, and pictures whose colours go together as skin's do."""

from __future__ import annotations

import torch
from pictures import smooth
from torch import Tensor

from defenses.base import Defense
from defenses.partialface import PartialFace


def tinted(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): smooth pictures, mostly grey, redder than blue."""
    pictures = smooth(count, size, seed).float()
    mixed = 0.8 * pictures.mean(dim=1, keepdim=True) + 0.2 * pictures
    return (mixed * torch.tensor([1.0, 0.75, 0.6])[:, None, None]).to(torch.uint8)


class Silent(PartialFace):
    """PartialFace that lists no states, and declares neither layout nor operator."""

    name = "silent"

    def states(self):
        return None

    def canonical(self, representation, state):
        return representation

    def linear_operator(self, state):
        return None


class Hidden(Silent):
    """The same, drawn where nobody sees it."""

    name = "hidden"

    def draw(self, count, generator, labels=None):
        return None

    def transform(self, faces, state, generator):
        return super().transform(faces, PartialFace.draw(self, len(faces), generator), generator)


class Swapped(Defense):
    """Colours in any order, each inverted or not, and the face mirrored or not: 6 x 8 x 2 states, undeclared."""

    name = "swapped"

    def transform(self, faces, state, generator):
        count = len(faces)
        order = torch.rand(count, 3, generator=generator).argsort(1).to(faces.device)
        inverted = torch.randint(2, (count, 3, 1, 1), generator=generator).to(faces)
        mirrored = torch.randint(2, (count, 1, 1, 1), generator=generator).to(faces.device).bool()
        swapped = faces.gather(1, order[:, :, None, None].expand_as(faces))
        swapped = inverted * (1 - swapped) + (1 - inverted) * swapped
        return torch.where(mirrored, swapped.flip(-1), swapped)


class Biased(Defense):
    """x + u, u uniform in +-1000 for each face and colour."""

    name = "biased"

    def transform(self, faces, state, generator):
        return faces + (torch.rand(len(faces), 3, 1, 1, generator=generator) * 2000 - 1000).to(faces)


class Affine(Defense):
    """a x + b, drawn for each face."""

    name = "affine"
    colours = 1

    def transform(self, faces, state, generator):
        gain = torch.rand(len(faces), self.colours, 1, 1, generator=generator) * 1.5 + 0.5
        offset = torch.rand(len(faces), self.colours, 1, 1, generator=generator) * 4 - 2
        return faces * gain.to(faces) + offset.to(faces)


class AffineColours(Affine):
    """The same, drawn for each face and colour."""

    name = "affine-colours"
    colours = 3


class Noisy(Defense):
    """White noise, undeclared."""

    name = "noisy"

    def transform(self, faces, state, generator):
        return faces + 0.05 * torch.randn(faces.shape, generator=generator, dtype=faces.dtype).to(faces.device)


class OneByOne(Defense):
    """Pixels in one of four orders, which is drawn in a loop over the faces."""

    name = "one-by-one"

    def transform(self, faces, state, generator):
        sent = []
        for face in faces.flatten(2):
            order = torch.randint(4, (1,), generator=generator)
            fixed = torch.Generator().manual_seed(int(order))
            sent.append(face[:, torch.randperm(face.shape[1], generator=fixed)])
        return torch.stack(sent).view_as(faces)


class Lifted(Defense):
    """Colours in any of six orders, on a level of a million."""

    name = "lifted"

    def transform(self, faces, state, generator):
        order = torch.rand(len(faces), 3, generator=generator).argsort(1).to(faces.device)
        return faces.gather(1, order[:, :, None, None].expand_as(faces)) + 1e6


class Projected(Defense):
    """Sixteen random sums of pixels, drawn from eight seeds for a whole batch at once."""

    name = "projected"

    @property
    def representation_shape(self):
        return (16, 1, 1)

    def transform(self, faces, state, generator):
        seed = int(torch.randint(8, (1,), generator=generator))
        sums = torch.randn(16, faces[0].numel(), generator=torch.Generator().manual_seed(seed))
        return (faces.flatten(1) @ sums.to(faces).T)[:, :, None, None]


class Detached(Defense):
    """A blur of neighbouring rows that leaves torch, and has no derivative."""

    name = "detached"
    differentiable = False

    def transform(self, faces, state, generator):
        values = faces.detach().cpu().numpy()
        return torch.from_numpy(0.7 * values + 0.3 * values[:, :, ::-1].copy()).to(faces)


class _Mixture:
    """The linear map of one colour matrix."""

    offset = torch.zeros(1, 1, 1)

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, faces: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.matrix.to(faces), faces)

    def adjoint(self, representation: Tensor) -> Tensor:
        return torch.einsum("ij,nihw->njhw", self.matrix.to(representation), representation)


class Colours(Defense):
    """One of eight colour matrices, declared as states and linear, but with no layout."""

    name = "colours"

    def __init__(self, options=None, *, image_size=112):
        super().__init__(options, image_size=image_size)
        matrices = torch.randn(8, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.register_buffer("table", self.matrices(matrices))

    @staticmethod
    def matrices(drawn: Tensor) -> Tensor:
        return torch.linalg.qr(drawn).Q.contiguous()

    def states(self):
        return torch.arange(8)[:, None]

    def draw(self, count, generator, labels=None):
        return torch.randint(8, (count, 1), generator=generator)

    def transform(self, faces, state, generator):
        return torch.einsum("nij,njhw->nihw", self.table[state[:, 0]].to(faces), faces)

    def linear_operator(self, state):
        return _Mixture(self.table[int(state[0])])


class Mixtures(Colours):
    """Colour matrices that are not orthogonal."""

    name = "mixtures"

    @staticmethod
    def matrices(drawn: Tensor) -> Tensor:
        return drawn
