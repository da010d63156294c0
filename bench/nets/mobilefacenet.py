"""MobileFaceNet: a recogniser of about a million parameters.

Source: Chen et al., *MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices*,
CCBR 2018, section 3.2 and table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.nets.iresnet import PReLU, halved, initialise, strides_of

#: (expansion t, channels c, repetitions n, stride s of the first) of the bottlenecks, table 1.
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class DepthwiseConvolution(nn.Conv2d):
    """Every channel on its own, (N, C, h, w) to (N, C, h', w'), trained on a CPU by what is fast there.

    oneDNN has no fast gradient of two of them, which takes more than all the rest of the network then: with a stride,
    which is taken behind the convolution instead (the same values at four times the work, and still ten to thirty times
    as fast), and over a whole map, which is a sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As of ``nn.Conv2d``."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        if x.shape[2:] == self.weight.shape[2:] and self.padding == (0, 0):
            return (x * self.weight[:, 0].to(x.dtype)).sum((2, 3), keepdim=True)
        every: Tensor = nn.functional.conv2d(x, self.weight, padding=self.padding, groups=self.groups)
        # Every other pixel, in dense maps: a strided view would slow down whatever comes next, and its own gradient.
        return nn.functional.avg_pool2d(every, 1, self.stride)


def convolution(
    in_channels: int,
    channels: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    linear: bool = False,
    leaky: bool = False,
) -> nn.Sequential:
    """Convolution - BN - PReLU, or a ``leaky`` ReLU of the slope where PReLU starts; without either if ``linear``."""
    layers: list[nn.Module] = [
        (nn.Conv2d if groups == 1 else DepthwiseConvolution)(
            in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels),
    ]
    if not linear:
        layers.append(nn.LeakyReLU(0.25, inplace=True) if leaky else PReLU(channels))
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """Inverted residual: expand (1x1) - depthwise 3x3 of the given stride - project (1x1, linear)."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, leaky: bool = False) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = nn.Sequential(
            convolution(in_channels, hidden, 1, leaky=leaky),
            convolution(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, leaky=leaky),
            convolution(hidden, channels, 1, linear=True),
        )
        self.connected = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, h, w) to (N, C, ceil(h / stride), ceil(w / stride))."""
        output: Tensor = self.residual(x)
        return x + output if self.connected else output


class MobileFaceNet(nn.Module):
    """MobileFaceNet for any number of input channels and any input size.

    The global depthwise convolution, which weighs every place of the last feature map on its own instead
    of averaging them, gets a kernel of that map's size (7x7 at the published input of 112x112).

    A face is reduced 16 times, rounding up at each of four halvings; of maps that are ``reduced`` times half as large
    as a face the first of them halve none. Published: 128 dimensions, no dropout.

    ``tiny`` is one that two CPU cores train in half a minute: channels are half as many, and the slopes below zero are
    fixed (as in :class:`~bench.nets.iresnet.TinyUnit`).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        input_size: tuple[int, int],
        embedding_size: int,
        dropout: float = 0.0,
        reduced: int = 0,
        tiny: bool = False,
    ) -> None:
        super().__init__()
        part = 2 if tiny else 1
        strides = strides_of(1 + sum(stride == 2 for *_, stride in BOTTLENECKS), reduced)
        size = halved(input_size, strides.count(2))
        width, last = 64 // part, 512 // part
        layers: list[nn.Module] = [
            convolution(in_channels, width, 3, stride=strides.pop(0), padding=1, leaky=tiny),
            convolution(width, width, 3, padding=1, groups=width, leaky=tiny),
        ]
        for expansion, published, repetitions, first_stride in BOTTLENECKS:
            stride, channels = strides.pop(0) if first_stride == 2 else 1, published // part
            for repetition in range(repetitions):
                layers.append(Bottleneck(width, channels, stride if repetition == 0 else 1, expansion, leaky=tiny))
                width = channels
        layers.append(convolution(width, last, 1, leaky=tiny))
        self.features = nn.Sequential(*layers)
        self.global_depthwise = convolution(last, last, size, groups=last, linear=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(last, embedding_size, bias=False)
        self.embedding_norm = nn.BatchNorm1d(embedding_size)
        initialise(self)

    def maps(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the last feature map, (N, 512 or 256, ceil(h / 16), ceil(w / 16)) unless reduced before."""
        maps: Tensor = self.features(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, D), not normalised."""
        pooled = torch.flatten(self.global_depthwise(self.maps(x)), 1)
        embedding = self.linear(self.dropout(pooled))
        normed: Tensor = self.embedding_norm(embedding.to(self.embedding_norm.weight.dtype))
        return normed
