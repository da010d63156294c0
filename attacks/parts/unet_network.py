"""The U-Net of the inversion attacks, and its options."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import AttackOptions, Widths

#: A Literal of integers takes no strings, which is what the command line passes.
_WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.strip().isdigit() else value)


class NetworkOptions(AttackOptions):
    """Options of :class:`UNetNetwork`; the defaults are the published ones where there are any."""

    widths: Widths = Field(
        default=(64, 128, 256, 512, 1024), description="Channels per level, from the finest to the bottleneck."
    )
    stem_stride: Annotated[Literal[1, 2, 4], _WHOLE] = Field(
        1,
        description="The finest level works on pixels gathered in squares of this side (lossless space-to-depth); 1 is "
        "the published network, 2 is several times cheaper.",
    )
    bypass: Annotated[Literal[0, 1, 3, 5, 7], _WHOLE] = Field(
        default=3, description="Side of a linear convolution from the input straight to the output; 0 for none."
    )
    norm: Literal["batch", "none"] = Field("batch", description="Normalisation after each convolution.")


def gathered(maps: Tensor, side: int) -> Tensor:
    """Maps (N, C, H, W) to (N, side^2 C, H/side, W/side): squares of pixels gathered, as pixel_unshuffle does.

    Channels run within the places of a square, (dy, dx, c), and not places within channels: of maps in channels-last
    layout whole runs of values stay together, which on a CPU takes a quarter of the time.
    """
    n, channels, height, width = maps.shape
    runs = maps.permute(0, 2, 3, 1).reshape(n, height // side, side, width // side, side * channels)
    squares = runs.transpose(2, 3).reshape(n, height // side, width // side, side * side * channels)
    return squares.permute(0, 3, 1, 2)


def spread(maps: Tensor, side: int) -> Tensor:
    """The inverse of :func:`gathered`."""
    n, channels, height, width = maps.shape
    squares = maps.permute(0, 2, 3, 1).reshape(n, height, width, side, channels // side)
    runs = squares.transpose(2, 3).reshape(n, height * side, width * side, channels // side**2)
    return runs.permute(0, 3, 1, 2)


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """The convolution with zero weights and bias, so that what it is added to is untouched before training."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


class _Entrance(nn.Conv2d):
    """A 3x3 convolution of maps (N, C, H, W) and two ramps, gathered in squares, to (N, outputs, H/side, W/side).

    The ramps are the same in all faces: their share is worked out once.
    """

    def __init__(self, channels: int, outputs: int, side: int, *, bias: bool) -> None:
        super().__init__((channels + 2) * side**2, outputs, 3, padding=1, bias=bias)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        ramps = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"))[None]
        by_places = self.weight.unflatten(1, (-1, self.side**2)).transpose(1, 2)  # channels (c, dy, dx)

        def convolved(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            weight = weight.flatten(1, 2).contiguous(memory_format=torch.channels_last)
            return functional.conv2d(gathered(maps, self.side), weight, bias, padding=1)

        return convolved(x, by_places[:, :, :-2]) + convolved(ramps, by_places[:, :, -2:], self.bias)


class _SpreadConvolution(nn.Conv2d):
    """A 1x1 convolution and its pixel shuffle, (N, inputs, h, w) to (N, outputs, side h, side w).

    It is a transposed convolution without overlaps, and faster on a CPU.
    """

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__(inputs, outputs * side**2, 1)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows = (-1, self.side**2)  # channels (c, dy, dx)
        weight, bias = (p.unflatten(0, rows).transpose(0, 1).flatten(0, 1) for p in self.parameters())
        return spread(functional.conv2d(x, weight, bias), self.side)


def _double_convolution(first: nn.Conv2d) -> nn.Sequential:
    """It and another 3x3 one, with ReLU, and normalisation for want of a bias (Ronneberger et al. 2015, padded)."""
    width, bias = first.out_channels, first.bias is not None
    layers: list[nn.Module] = []
    for convolution in (first, nn.Conv2d(width, width, 3, padding=1, bias=bias)):
        layers += [convolution, *([] if bias else [nn.BatchNorm2d(width)]), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class _Projection(nn.Module):
    """A 1x1 convolution whose weights, of ``width`` canonical channels, follow the layout of each sample."""

    def __init__(self, width: int, channels: int, outputs: int) -> None:
        super().__init__()
        bound = (3 / channels) ** 0.5
        self.weight = nn.Parameter(torch.empty(width, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, layout: Tensor | None) -> Tensor:
        """float (N, C, h, w) and int64 (N, C) to (N, outputs, h, w), channels last."""
        n, _, height, width = x.shape
        weight = self.weight.expand(n, -1, -1) if layout is None else self.weight[layout]
        flat = x.flatten(2).transpose(1, 2)
        out = torch.bmm(flat, weight)
        # Added to a row of pixels at once: a few channels at a time would be no work for vectors.
        out = out.view(n, height, -1) + self.bias.to(out.dtype).repeat(width)
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)


#: Root mean square of a whole face, in standard deviations of its channels, above which it is scaled down.
_MOST = 4.0


class UNetNetwork(nn.Module):
    """Representation (N, C, h, w) to face (N, 3, H, W): mean face + linear bypass + U-Net.

    The output is linear, not squashed. Both trained terms start at zero, so that an untrained network
    returns the mean public face. Two ramps with the pixel's row and column join the input: faces are
    aligned, so position says what to expect, and where a defence has lost the low frequencies they
    must be put back by position. Where layouts vary from sample to sample there are ``width`` canonical channels.

    Of maps of ``side`` pixels, at most half those of the face, each value becomes a square of them, by weights of its
    channel (sub-pixel convolution; Shi et al., CVPR 2016): many small channels then say what goes on within the square.
    """

    mean: Tensor
    std: Tensor
    mean_face: Tensor

    def __init__(
        self,
        channels: int,
        image_size: int,
        options: NetworkOptions,
        *,
        width: int | None = None,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.stride = image_size, options.stem_stride
        widths = options.widths
        self.register_buffer("mean", torch.zeros(width or channels))
        self.register_buffer("std", torch.ones(width or channels))
        self.register_buffer("mean_face", torch.full((3, image_size, image_size), 0.5))
        # Gathering s x s pixels multiplies the input channels by s^2; a projection first keeps a wide
        # representation from costing more than all the rest.
        self.project: _Projection | None = None
        self.lift = max(1, image_size // (side or image_size))
        if width is not None or self.lift > 1 or (self.stride > 1 and channels > widths[0]):
            self.project = _Projection(width or channels, channels, min(channels, widths[0]) * self.lift**2)
            channels = min(channels, widths[0])
        self.bypass: nn.Module | None = None
        if options.bypass:
            self.bypass = zeroed(nn.Conv2d(channels, 3, options.bypass, padding=options.bypass // 2))
        bias = options.norm == "none"
        convolution = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=bias)
        self.down = nn.ModuleList([_double_convolution(_Entrance(channels, widths[0], self.stride, bias=bias))])
        self.down.extend(_double_convolution(convolution(a, b)) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(_SpreadConvolution(b, a, 2) for a, b in itertools.pairwise(widths))
        self.merge = nn.ModuleList(_double_convolution(convolution(2 * a, a)) for a in widths[:-1])
        self.head = zeroed(_SpreadConvolution(widths[0], 3, self.stride))

    def _standardise(self, x: Tensor, layout: Tensor | None) -> Tensor:
        mean, std = (self.mean, self.std) if layout is None else (self.mean[layout], self.std[layout])
        x = (x - mean[..., None, None]) / std[..., None, None]
        # A face of a wild scale would drown its batch.
        norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
        size = norm / math.sqrt(x[0].numel())
        return x * (_MOST / size.clamp(min=_MOST)).to(x.dtype)

    def _fit_to_face(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, H, W) by interpolation, then padded to what the levels divide."""
        size = self.image_size
        if x.shape[-2:] != (size, size):
            shrinks = x.shape[-2] > size or x.shape[-1] > size
            x = functional.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
        extra = -size % (self.stride * 2 ** (len(self.down) - 1))
        return functional.pad(x, (0, extra, 0, extra), mode="replicate") if extra else x

    def forward(self, representation: Tensor, layout: Tensor | None = None) -> Tensor:
        """float (N, C, h, w), and int64 (N, C) where layouts vary, to float32 (N, 3, H, W), not clipped."""
        x = self._standardise(representation, layout)
        if self.project is not None and self.lift > 1:
            x = self._fit_to_face(functional.pixel_shuffle(self.project(x, layout), self.lift))
        else:
            x = self._fit_to_face(x)
            x = x if self.project is None else self.project(x, layout)
        x = x.contiguous(memory_format=torch.channels_last)
        size = self.image_size
        linear = 0.0 if self.bypass is None else self.bypass(x)[..., :size, :size].float()

        skips: list[Tensor] = []
        for block in self.down:
            x = block(functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        rest: Tensor = self.head(x)[..., :size, :size].float()
        return self.mean_face + linear + rest
