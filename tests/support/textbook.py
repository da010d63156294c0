"""The PartialFace transform the long way round, step by step as published: the oracle of the fast one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _dct(dtype: torch.dtype) -> Tensor:
    rows = [
        [(math.sqrt(1 / 8) if u == 0 else 0.5) * math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)]
        for u in range(8)
    ]
    return torch.tensor(rows, dtype=dtype)


def textbook_spectrum(faces: Tensor) -> Tensor:
    """All 64 channels of the x8 up-sampled YCbCr image: (N, 3, H, W) to (N, 3, 64, H, W), dtype kept."""
    count, _, height, width = faces.shape
    image = F.interpolate(faces, scale_factor=8, mode="bilinear", align_corners=True) * 255
    red, green, blue = image.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    cb = -0.168736 * red - 0.331264 * green + 0.5 * blue + 128
    cr = 0.5 * red - 0.418688 * green - 0.081312 * blue + 128
    image = torch.stack([luma, cb, cr], 1) - 128
    blocks = F.unfold(image.view(count * 3, 1, 8 * height, 8 * width), kernel_size=8, stride=8)
    blocks = blocks.transpose(1, 2).reshape(count, 3, height * width, 8, 8)
    dct = _dct(faces.dtype)
    coefficients = dct @ blocks @ dct.T
    return coefficients.view(count, 3, height, width, 64).permute(0, 1, 4, 2, 3)


def textbook(faces: Tensor, channels: Tensor) -> Tensor:
    """Channels (N, K) of each face out of the whole spectrum: (N, 3K, H, W), colour-major."""
    height, width = faces.shape[2:]
    index = channels[:, None, :, None, None].expand(-1, 3, -1, height, width)
    return textbook_spectrum(faces).gather(2, index).flatten(1, 2)
