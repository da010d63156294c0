"""Face encoders for attacks, one to train and published ones, and what training on few identities takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Maps of at least this side are halved by the first convolution: what a face needs, at a quarter of the cost.
_STRIDED_FROM = 32
_SLOPE = 0.25


class MapNormalisation(nn.Module):
    """Brings what a defence sends to one scale: channels to mean 0 and variance 1, then each map to mean square 1.

    The channels' statistics are measured once (:meth:`measure`) and kept. A random defence sends, in one channel, maps
    whose energies differ by orders of magnitude from face to face; the second step lets the faint ones be seen as well.
    It costs a picture its contrast, which says nothing of a person. Maps too small to have a contrast of their own
    (templates) keep their size.

    Attributes:
        mean, std: float32 (C,), or one value per place (see :class:`Encoder`).
    """

    #: Values in a map from which on it is divided by its own root mean square.
    smallest_map = 64
    #: Root mean square, relative to the channel's, below which a map counts as empty and is not blown up.
    faintest = 1e-3

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Set the statistics from representations (n, C, h, w), each batch with the places int64 (n, C) of its maps."""
        count, total, squares = (torch.zeros(len(self.mean), dtype=torch.float64) for _ in range(3))
        for representation, places in batches:
            if places is None:
                places = torch.arange(representation.shape[1]).expand(len(representation), -1)
            at, maps = places.flatten().cpu(), representation.flatten(2).flatten(0, 1).double().cpu()
            count.index_add_(0, at, torch.full_like(at, maps.shape[1], dtype=torch.float64))
            total.index_add_(0, at, maps.sum(dim=1))
            squares.index_add_(0, at, maps.square().sum(dim=1))
        count.clamp_(min=1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A channel that never varies carries nothing; divided by its rounding error it would look as if it did.
        varies = std > 1e-6 * torch.maximum(mean.abs(), std.max())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, torch.ones_like(std)))

    def forward(self, representation: Tensor, places: Tensor | None = None) -> Tensor:
        """(N, C, h, w) of any scale, and int64 (N, C) where places vary, to float32 (N, C, h, w)."""
        mean, std = (self.mean, self.std) if places is None else (self.mean[places], self.std[places])
        x = (representation.float() - mean[..., None, None]) / std[..., None, None]
        if x.shape[2] * x.shape[3] < self.smallest_map:
            return x
        power = x.square().mean(dim=(2, 3), keepdim=True)
        return x * torch.rsqrt(power.clamp_min(self.faintest**2))


class PlacedConvolution(nn.Module):
    """A 3x3 convolution whose filters follow the places of the channels, sample by sample.

    Where a defence sends, in one channel, a map of this meaning for one face and of that for the next, each map is met
    by the filters of its meaning. That equals spreading the maps over all places, zero elsewhere, and an ordinary
    convolution, at the cost of the maps that are there.

    Args:
        places: how many there are.
        channels: maps of a sample.
        outputs: channels out.
        stride: of the convolution.
    """

    def __init__(self, places: int, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        bound = (2 / channels) ** 0.5 / 3
        self.weight = nn.Parameter(torch.empty(places, 9 * outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """float (N, C, h, w) and int64 (N, C) to (N, outputs, ceil(h / stride), ceil(w / stride))."""
        n, channels, height, width = x.shape
        columns = functional.unfold(x, 3, padding=1, stride=self.stride)
        weight = self.weight[places].view(n, channels * 9, -1)
        out = torch.bmm(weight.transpose(1, 2), columns)
        return out.view(n, -1, math.ceil(height / self.stride), math.ceil(width / self.stride))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input (He et al., CVPR 2016, figure 5, left).

    The shortcut is a 1x1 convolution where shapes change; the activation is leaky, as face recognisers have it.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and the shortcut.
        kernel: side of the two convolutions, odd.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, outputs, ceil(h / stride), ceil(w / stride))."""
        return functional.leaky_relu(self.residual(x) + self.shortcut(x), _SLOPE)


class Encoder(nn.Module):
    """A face or a protected representation, (N, C, h, w), to an embedding.

    A residual network whose stages halve the maps, read out by a fully connected layer that keeps the place of every
    feature: faces are aligned, and averaging over them would throw that away. What has too few places to be a picture
    (a template) meets the width of the last stage from the start: the narrow layers that suffice for the many places
    of a picture would squeeze it.

    Args:
        shape: (C, h, w) of the input; any sizes, a template (D, 1, 1) too.
        widths: channels of the first convolution and of each stage.
        blocks: residual blocks a stage.
        embedding_size: D.
        places: how many meanings a channel may have from sample to sample; None where it is always the same.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        widths: Sequence[int],
        blocks: int,
        embedding_size: int,
        places: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        stride = 2 if min(height, width) >= _STRIDED_FROM else 1
        kernel = 1 if height == width == 1 else 3
        if height * width < MapNormalisation.smallest_map:
            widths = [widths[-1]] * len(widths)
        self.normalisation = MapNormalisation(places or channels)
        self.first: nn.Module = (
            nn.Conv2d(channels, widths[0], kernel, stride=stride, padding=kernel // 2, bias=False)
            if places is None
            else PlacedConvolution(places, channels, widths[0], stride)
        )
        self.stem = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.LeakyReLU(_SLOPE, inplace=True))
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        self.stages = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(widths):
            more = (ResidualBlock(outputs, outputs, 1, kernel) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(ResidualBlock(inputs, outputs, 2, kernel), *more))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        self.linear = nn.Linear(widths[-1] * height * width, embedding_size, bias=False)
        # Its shift lets a student give what all faces have in common to a teacher.
        self.embedding_norm = nn.BatchNorm1d(embedding_size)

    def forward(self, representation: Tensor, places: Tensor | None = None) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of (N, C, h, w), with int64 (N, C) where places vary.

        Raises:
            ValueError: another shape than it was built for.
        """
        return self.read_out(self.stage_outputs(representation, places)[-1])

    def stage_outputs(self, representation: Tensor, places: Tensor | None = None) -> list[Tensor]:
        """The maps (N, width, h / 2^i, w / 2^i) behind each stage, the stem's too; arguments as :meth:`forward`."""
        if tuple(representation.shape[1:]) != tuple(self.shape):
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"the encoder takes representations (N, {sizes}), got {tuple(representation.shape)}")
        x = self.normalisation(representation, places)
        x = self.first(x.contiguous(memory_format=torch.channels_last)) if places is None else self.first(x, places)
        outputs = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs

    def read_out(self, features: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, from the last of :meth:`stage_outputs`."""
        embedding: Tensor = self.embedding_norm(self.linear(features.flatten(1)).float())
        return embedding

    @torch.no_grad()
    def aim_at(self, embeddings: Tensor) -> None:
        """Start with the mean and the spread of embeddings (N, D) that are to be imitated."""
        self.embedding_norm.bias.copy_(embeddings.mean(dim=0))
        self.embedding_norm.weight.copy_(embeddings.std(dim=0, correction=0))

    @torch.no_grad()
    def start_from(self, other: Encoder) -> int:
        """Take over the learned values of ``other`` wherever the shapes agree; returns how many values that were.

        Of an encoder of another kind of input that is all but the first convolution. Input statistics stay.
        """
        own, taken = self.state_dict(), 0
        for name, value in other.state_dict().items():
            if not name.startswith("normalisation.") and name in own and own[name].shape == value.shape:
                own[name].copy_(value)
                taken += value.numel()
        return taken


class MarginSoftmax(nn.Module):
    """CosFace: softmax over cosines to one centre per identity, a margin on the right one.

    Wang et al., CVPR 2018, equation 4: the logits are s (cos t_y - m) for the identity y and s cos t_j for the others.
    """

    def __init__(self, embedding_size: int, identities: int, *, scale: float, margin: float) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(torch.randn(identities, embedding_size))

    def forward(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings (N, D), any scale, of the identities int64 (N,) in 0..K-1."""
        # float32 under autocast too: s times a cosine of 8 bits is too coarse for a softmax.
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = functional.normalize(embeddings.float(), dim=1) @ functional.normalize(self.centres, dim=1).T
            margins = self.margin * functional.one_hot(identities, len(self.centres))
            return functional.cross_entropy(self.scale * (cosine - margins), identities)
