"""PartialFace's transform and the U-Net the long way round, as published: the fast ones are held against them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.parts.unet_network import UNetNetwork


def _dct(dtype: torch.dtype) -> Tensor:
    rows = [
        [(math.sqrt(1 / 8) if u == 0 else 0.5) * math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)]
        for u in range(8)
    ]
    return torch.tensor(rows, dtype=dtype)


def textbook_spectrum(faces: Tensor, factor: int = 8) -> Tensor:
    """All 64 channels of the up-sampled YCbCr image: (N, 3, H, H) to (N, 3, 64, h, h), h = ceil(factor H / 8).

    Where 8 does not divide it, the last row and column of the up-sampled image are repeated. dtype kept.
    """
    count = len(faces)
    image = F.interpolate(faces, scale_factor=factor, mode="bilinear", align_corners=True) * 255
    image = F.pad(image, (0, -image.shape[3] % 8, 0, -image.shape[2] % 8), mode="replicate")
    height, width = image.shape[2] // 8, image.shape[3] // 8
    red, green, blue = image.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    cb = -0.168736 * red - 0.331264 * green + 0.5 * blue + 128
    cr = 0.5 * red - 0.418688 * green - 0.081312 * blue + 128
    image = torch.stack([luma, cb, cr], 1) - 128
    blocks = F.unfold(image.view(count * 3, 1, 8 * height, 8 * width), kernel_size=8, stride=8)
    blocks = blocks.transpose(1, 2).reshape(count, 3, height * width, 8, 8)
    dct = _dct(faces.dtype).to(faces.device)
    coefficients = dct @ blocks @ dct.T
    return coefficients.view(count, 3, height, width, 64).permute(0, 1, 4, 2, 3)


def textbook(faces: Tensor, channels: Tensor, factor: int = 8) -> Tensor:
    """Channels (N, K) of each face out of the whole spectrum: (N, 3K, h, h), colour-major."""
    spectrum = textbook_spectrum(faces, factor)
    index = channels[:, None, :, None, None].expand(-1, 3, -1, *spectrum.shape[3:])
    return spectrum.gather(2, index).flatten(1, 2)


def _convolved(layer: nn.Module, x: Tensor) -> Tensor:
    """By its weights alone: ``layer`` may have a forward of its own."""
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def textbook_unet(network: UNetNetwork, sent: Tensor) -> Tensor:
    """What ``network`` makes of maps as large as the face, (N, C, H, H), whose layouts do not vary: (N, 3, H, H).

    H is what its levels divide, and no face of a scale that would be tamed.
    """
    x = (sent - network.mean[:, None, None]) / network.std[:, None, None]
    if network.project is not None:
        x = F.conv2d(x, network.project.weight.T[:, :, None, None], network.project.bias)
    face = network.mean_face if network.bypass is None else network.mean_face + network.bypass(x)
    ramp = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    ramps = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).expand(len(x), -1, -1, -1)
    x = F.pixel_unshuffle(torch.cat((x, ramps), dim=1), network.stride)
    skips: list[Tensor] = []
    for block in network.down:
        first, *rest = block.children()
        x = _convolved(first, F.max_pool2d(x, 2) if skips else x)
        for layer in rest:
            x = layer(x)
        skips.append(x)
    for up, merge, skip in zip(reversed(network.up), reversed(network.merge), reversed(skips[:-1]), strict=True):
        x = merge(torch.cat((skip, F.pixel_shuffle(_convolved(up, x), 2)), dim=1))
    return face + F.pixel_shuffle(_convolved(network.head, x), network.stride)
