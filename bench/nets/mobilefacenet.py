"""MobileFaceNet: a recogniser of about a million parameters.

Source: Chen et al., *MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices*,
CCBR 2018, section 3.2 and table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.nets.iresnet import halved, initialise, strides_of

#: (expansion t, channels c, repetitions n, stride s of the first) of the bottlenecks, table 1.
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def convolution(
    in_channels: int,
    channels: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    linear: bool = False,
) -> nn.Sequential:
    """Convolution - BN - PReLU; without the PReLU if ``linear``."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]
    if not linear:
        layers.append(nn.PReLU(channels))
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """Inverted residual: expand (1x1) - depthwise 3x3 of the given stride - project (1x1, linear)."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = nn.Sequential(
            convolution(in_channels, hidden, 1),
            convolution(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
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
    """

    def __init__(
        self,
        *,
        in_channels: int,
        input_size: tuple[int, int],
        embedding_size: int,
        dropout: float = 0.0,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        strides = strides_of(1 + sum(stride == 2 for *_, stride in BOTTLENECKS), reduced)
        size = halved(input_size, strides.count(2))
        layers: list[nn.Module] = [
            convolution(in_channels, 64, 3, stride=strides.pop(0), padding=1),
            convolution(64, 64, 3, padding=1, groups=64),
        ]
        width = 64
        for expansion, channels, repetitions, first_stride in BOTTLENECKS:
            stride = strides.pop(0) if first_stride == 2 else 1
            for repetition in range(repetitions):
                layers.append(Bottleneck(width, channels, stride if repetition == 0 else 1, expansion))
                width = channels
        layers.append(convolution(width, 512, 1))
        self.features = nn.Sequential(*layers)
        self.global_depthwise = convolution(512, 512, size, groups=512, linear=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(512, embedding_size, bias=False)
        self.embedding_norm = nn.BatchNorm1d(embedding_size)
        initialise(self)

    def maps(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the last feature map, (N, 512, ceil(h / 16), ceil(w / 16)) unless the input is reduced."""
        maps: Tensor = self.features(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to float32 embeddings (N, D), not normalised."""
        pooled = torch.flatten(self.global_depthwise(self.maps(x)), 1)
        embedding = self.linear(self.dropout(pooled))
        normed: Tensor = self.embedding_norm(embedding.to(self.embedding_norm.weight.dtype))
        return normed
