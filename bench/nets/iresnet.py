"""Improved residual networks as ArcFace uses them (IR-18/34/50/100), and a tiny one for two cores.

Source: Deng et al., *ArcFace: Additive Angular Margin Loss for Deep Face Recognition*, CVPR 2019, section 3.1
(the BN-Conv-BN-PReLU-Conv-BN unit, output option E: BN-Dropout-FC-BN), on the residual units of Han et al.,
*Deep Pyramidal Residual Networks*, CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after ``times`` 3x3 convolutions of stride 2 and padding 1: rounded up each time."""
    height, width = size
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions, unit batch norms and small linear layers, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class _PReLU(torch.autograd.Function):
    """PReLU of x (N, C, h, w) and slopes (C,), whose gradient is put together of vectorised operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(x, slopes)
        activated: Tensor = F.prelu(x, slopes)
        return activated

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        (gradient,), (x, slopes) = gradients, ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(gradient, x, 0)
        below = gradient - above
        slope = (below * x).sum((0, 2, 3))
        return torch.addcmul(above, below, slopes.view(1, -1, 1, 1)), slope


class PReLU(nn.PReLU):
    """As torch's; training on a CPU takes a fifth of the time, as torch's gradient goes value by value there."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the same shape."""
        if self.training and x.device.type == "cpu":
            applied: Tensor = _PReLU.apply(x, self.weight.to(x.dtype))
            return applied
        return super().forward(x)


class EmbeddingOutput(nn.Module):
    """ArcFace's output option E: BN - dropout - fully connected - BN, from a feature map of a known size.

    The fully connected layer keeps the position of every feature (pooling would average it away), so it is
    built for one input size: ``features`` is (C, h, w).
    """

    def __init__(self, features: tuple[int, int, int], embedding_size: int, dropout: float) -> None:
        super().__init__()
        channels, height, width = features
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels * height * width, embedding_size)
        self.embedding_norm = nn.BatchNorm1d(embedding_size)
        # The margin head normalises embeddings, so a free scale per dimension would only be a second, unbounded
        # parametrisation of the linear layer.
        nn.init.ones_(self.embedding_norm.weight)
        self.embedding_norm.weight.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, embedding_size), not normalised."""
        embedding = self.linear(torch.flatten(self.dropout(self.norm(features)), 1))
        # In full precision: the batch variance of an embedding dimension decides its scale against all the others.
        normed: Tensor = self.embedding_norm(embedding.to(self.embedding_norm.weight.dtype))
        return normed


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Nothing where shapes agree, else 1x1 convolution of the given stride - BN."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class ResidualUnit(nn.Module):
    """BN - 3x3 conv - BN - PReLU - 3x3 conv of the given stride - BN, plus a shortcut (1x1 conv - BN where needed)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, h, w) to (N, C, ceil(h / stride), ceil(w / stride))."""
        output: Tensor = self.residual(x) + self.shortcut(x)
        return output


class TinyUnit(nn.Module):
    """3x3 conv of the given stride - BN - leaky ReLU - 3x3 conv - BN, plus a shortcut, then leaky ReLU.

    Departures from :class:`ResidualUnit`, all for the processor: the first convolution already strides, which halves
    the work of a stage's first unit; and the slope is fixed at the value where PReLU starts, because on a
    CPU the gradient of PReLU's slopes costs as much as a convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.25, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = shortcut(in_channels, channels, stride)
        self.activation = nn.LeakyReLU(0.25, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, h, w) to (N, C, ceil(h / stride), ceil(w / stride))."""
        output: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return output


class ResidualNet(nn.Module):
    """A stem, stages of residual units whose first one strides, and :class:`EmbeddingOutput`.

    Args:
        stem: the input to ``widths[0]`` channels.
        unit: (channels in, channels out, stride) to a residual unit.
        widths: channels of the stem and of each stage.
        units: residual units of each stage.
        strides: of the first unit of each stage.
        features: (h, w) after the last stage.
        embedding_size: D, dimensions of the embedding.
        dropout: before the fully connected layer.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        unit: Callable[[int, int, int], nn.Module],
        widths: Sequence[int],
        units: Sequence[int],
        strides: Sequence[int],
        features: tuple[int, int],
        embedding_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = stem
        stages, width = [], widths[0]
        for channels, count, stride in zip(widths[1:], units, strides, strict=True):
            for number in range(count):
                stages.append(unit(width, channels, 1 if number else stride))
                width = channels
        self.stages = nn.Sequential(*stages)
        self.output = EmbeddingOutput((width, *features), embedding_size, dropout)
        initialise(self)

    def maps(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the last feature map, (N, widths[-1], *features)."""
        maps: Tensor = self.stages(self.stem(x))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, D), not normalised."""
        embedding: Tensor = self.output(self.maps(x))
        return embedding


def strides_of(halvings: int, reduced: int) -> list[int]:
    """Strides of layers of which each halves a face, for maps that are ``reduced`` times half as large as it."""
    return [1 if number < reduced else 2 for number in range(halvings)]


def iresnet(
    layers: Sequence[int],
    *,
    in_channels: int,
    input_size: tuple[int, int],
    embedding_size: int,
    dropout: float = 0.0,
    reduced: int = 0,
) -> ResidualNet:
    """ArcFace's IResNet, for any number of input channels and any input size; each stage halves it, rounding up.

    Of maps that are ``reduced`` times half as large as a face the first stages halve none.

    ``layers`` are the residual units of the four stages: (2, 2, 2, 2) is IR-18, (3, 4, 6, 3) IR-34, (3, 4, 14, 3)
    IR-50, (3, 13, 30, 3) IR-100. ArcFace's dropout is 0.4 in the paper, 0 in the released PyTorch code.
    """
    stem = nn.Sequential(nn.Conv2d(in_channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), PReLU(64))
    widths = (64, *(64 * 2**stage for stage in range(len(layers))))
    strides = strides_of(len(layers), reduced)
    features = halved(input_size, strides.count(2))
    return ResidualNet(stem, ResidualUnit, widths, layers, strides, features, embedding_size, dropout)


def tiny_iresnet(
    *,
    in_channels: int,
    input_size: tuple[int, int],
    embedding_size: int,
    dropout: float = 0.0,
    reduced: int = 0,
) -> ResidualNet:
    """A residual network that two CPU cores train in minutes; the stem and each of three stages halve the input.

    Of maps that are ``reduced`` times half as large as a face the first of these halve none.
    """
    widths = (32, 64, 128, 256)
    first, *strides = strides_of(len(widths), reduced)
    stem = nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 3, stride=first, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.LeakyReLU(0.25, inplace=True),
    )
    features = halved(input_size, [first, *strides].count(2))
    return ResidualNet(stem, TinyUnit, widths, (1, 1, 1), strides, features, embedding_size, dropout)
