"""An encoder of faces and of representations, whose channels may mean another thing from sample to sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.parts.exposure import tamed
from bench.images import channels_last
from bench.nets.iresnet import TinyUnit, halved

#: Maps of at least this side are halved by the first convolution: what a face needs, at a quarter of the cost.
_STRIDED_FROM = 32


def channel_statistics(batches: Iterable[tuple[Tensor, Tensor | None]], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each of P canonical ``channels``, float64 (P,) each, on the CPU.

    The batches are representations (n, C, h, w) with the layout, int64 (n, C), of their maps: the canonical channel of
    each; None where channels are canonical themselves. A face of a wild scale counts as one of the usual scale
    (:func:`~attacks.parts.exposure.tamed`).
    """
    layouts, sums, powers, places = [], [], [], 1
    for representation, layout in batches:
        if layout is None:
            layout = torch.arange(representation.shape[1]).expand(len(representation), -1)
        maps = representation.flatten(2).double().cpu()
        layouts.append(layout.cpu())
        sums.append(maps.sum(dim=2))
        powers.append(maps.square().sum(dim=2))
        places = maps.shape[2]
    at, power = torch.cat(layouts), torch.cat(powers)
    energy = power.mean(dim=1)
    share = (tamed(energy) / energy.clamp(min=1e-300))[:, None]
    count, total, squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    count.index_add_(0, at.flatten(), torch.full((at.numel(),), places, dtype=torch.float64))
    total.index_add_(0, at.flatten(), (share.sqrt() * torch.cat(sums)).flatten())
    squares.index_add_(0, at.flatten(), (share * power).flatten())
    count.clamp_(min=1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A channel that never varies carries nothing; divided by its rounding error it would look as if it did.
    varies = std > 1e-6 * torch.maximum(mean.abs(), std.max())
    return mean, torch.where(varies, std, torch.ones_like(std))


class MapNormalisation(nn.Module):
    """Brings what a defence sends to one scale: channels to mean 0 and variance 1, then each map to mean square 1.

    The channels' statistics are measured once (:meth:`measure`) and kept. A random defence sends, in one channel, maps
    whose energies differ by orders of magnitude from face to face; the second step lets the faint ones be seen as well.
    It costs a picture its contrast, which says nothing of a person. Maps too small to have a contrast of their own
    (templates) keep their size.

    Attributes:
        mean, std: float32 (C,), or one value per canonical channel.
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
        """Set the statistics from representations, as :func:`channel_statistics` takes them."""
        mean, std = channel_statistics(batches, len(self.mean))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, representation: Tensor, layout: Tensor | None = None) -> Tensor:
        """(N, C, h, w) of any scale, and int64 (N, C) where layouts vary, to float32 (N, C, h, w)."""
        mean, std = (self.mean, self.std) if layout is None else (self.mean[layout], self.std[layout])
        x = (representation.float() - mean[..., None, None]) / std[..., None, None]
        if x.shape[2] * x.shape[3] < self.smallest_map:
            return x
        power = x.square().mean(dim=(2, 3), keepdim=True)
        return x * torch.rsqrt(power.clamp_min(self.faintest**2))


class LayoutConvolution(nn.Module):
    """A 3x3 convolution whose filters follow the layout of the channels, sample by sample.

    Where a defence sends, in one channel, a map of this meaning for one face and of that for the next, each map is met
    by the filters of its meaning. That equals spreading the maps over all canonical channels, zero elsewhere, and an
    ordinary convolution, at the cost of the maps that are there. There are ``width`` canonical channels, and
    ``channels`` maps in a sample.
    """

    def __init__(self, width: int, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.outputs = stride, outputs
        bound = (2 / channels) ** 0.5 / 3
        self.weight = nn.Parameter(torch.empty(width, 9 * outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, layout: Tensor) -> Tensor:
        """float (N, C, h, w) and int64 (N, C) to (N, outputs, ceil(h / stride), ceil(w / stride))."""
        n, channels, height, width = x.shape
        columns = functional.unfold(x, 3, padding=1, stride=self.stride)
        weight = self.weight[layout].view(n, channels * 9, self.outputs)
        out = torch.bmm(weight.transpose(1, 2), columns)
        return out.view(n, self.outputs, math.ceil(height / self.stride), math.ceil(width / self.stride))


class Encoder(nn.Module):
    """A face or a protected representation, (N, C, h, w), to an embedding.

    A residual network whose stages halve the maps, read out by a fully connected layer that keeps the place of every
    feature: faces are aligned, and averaging over them would throw that away. What has too few places to be a picture
    (a template) meets the width of the last stage from the start: the narrow layers that suffice for the many places
    of a picture would squeeze it.

    ``shape`` is (C, h, w), of any sizes; ``widths`` are channels of the first convolution and of each stage, of so many
    residual ``blocks``. Where layouts vary from sample to sample there are ``width`` canonical channels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        widths: Sequence[int],
        blocks: int,
        embedding_size: int,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, *size = shape
        stride = 2 if min(size) >= _STRIDED_FROM else 1
        if size[0] * size[1] < MapNormalisation.smallest_map:
            widths = [widths[-1]] * len(widths)
        self.normalisation = MapNormalisation(width or channels)
        self.first: nn.Module = (
            nn.Conv2d(channels, widths[0], 3, stride=stride, padding=1, bias=False)
            if width is None
            else LayoutConvolution(width, channels, widths[0], stride)
        )
        self.stem = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.LeakyReLU(0.25, inplace=True))
        self.stages = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(widths):
            more = (TinyUnit(outputs, outputs, 1) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(TinyUnit(inputs, outputs, 2), *more))
        rows, columns = halved((size[0], size[1]), len(self.stages) + (stride == 2))
        self.linear = nn.Linear(widths[-1] * rows * columns, embedding_size, bias=False)
        # Its shift lets a student give what all faces have in common to a teacher.
        self.embedding_norm = nn.BatchNorm1d(embedding_size)

    def forward(self, representation: Tensor, layout: Tensor | None = None) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of (N, C, h, w), with int64 (N, C) where layouts vary.

        Raises:
            ValueError: another shape than it was built for.
        """
        return self.read_out(self.stage_outputs(representation, layout)[-1])

    def stage_outputs(self, representation: Tensor, layout: Tensor | None = None) -> list[Tensor]:
        """The maps (N, width, h / 2^i, w / 2^i) behind each stage, the stem's too; arguments as :meth:`forward`."""
        if tuple(representation.shape[1:]) != tuple(self.shape):
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"the encoder takes representations (N, {sizes}), got {tuple(representation.shape)}")
        if len(representation) == 1 and not self.training:
            # Of a single sample of 1 x 1 maps, oneDNN's strided convolutions read past the end and may give NaN.
            both = None if layout is None else layout.expand(2, -1)
            return [output[:1] for output in self.stage_outputs(representation.expand(2, -1, -1, -1), both)]
        x = self.normalisation(representation, layout)
        x = self.first(channels_last(x)) if layout is None else self.first(x, layout)
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
    def start_from(self, other: Encoder) -> None:
        """Take over the learned values of ``other`` wherever the shapes agree.

        Of an encoder of another kind of input that is all but the first convolution. Input statistics stay.
        """
        mine = self.state_dict()
        for name, value in other.state_dict().items():
            if not name.startswith("normalisation.") and name in mine and mine[name].shape == value.shape:
                mine[name].copy_(value)
