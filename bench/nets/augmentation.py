"""Random augmentation of faces before protection, vectorised over the batch and driven by a generator.

Small training sets teach a recogniser the crop, the exposure and the haircut along with the face; these transforms take
such shortcuts away. They act on what the camera saw, before the defence, as they would on a client.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.nets.options import AugmentationOptions

#: ITU-R BT.601 luma weights of R, G, B.
LUMA = (0.299, 0.587, 0.114)


def augment(faces: Tensor, options: AugmentationOptions, generator: torch.Generator) -> Tensor:
    """Vary every face of a batch independently.

    Args:
        faces: float (N, 3, H, W) in [0, 1], any device.
        options: what to vary, and how much.
        generator: a CPU generator, so that every device sees the same draws. What it consumes depends on N
            alone, not on the options: switching one transform off leaves the others' draws as they were.

    Returns:
        float (N, 3, H, W) in [0, 1]; ``faces`` itself is left alone.
    """
    count = len(faces)
    # One draw for everything: (N,) columns, uniform in [0, 1).
    columns = torch.rand(15, count, generator=generator).to(faces.device, faces.dtype)
    flip, across, down, zoom, angle, brightness, contrast, saturation, grey, erase, area, aspect, top, left, moved = (
        columns
    )
    faces = _place(
        faces,
        flip=flip < options.flip,
        shift=torch.stack((_signed(across), _signed(down)), 1) * options.shift,
        scale=torch.exp(_signed(zoom) * math.log1p(options.zoom)),
        angle=_signed(angle) * math.radians(options.rotation),
        moved=moved < options.moved if options.shift or options.zoom or options.rotation else None,
    )
    if options.brightness or options.contrast or options.saturation or options.grey:
        faces = _recolour(
            faces,
            brightness=_signed(brightness) * options.brightness,
            contrast=1 + _signed(contrast) * options.contrast,
            saturation=torch.where(grey < options.grey, 0.0, 1 + _signed(saturation) * options.saturation),
        )
    if options.erase:
        faces = _erase(faces, erase < options.erase, area * options.erase_area, aspect, top, left)
    return faces


def _signed(uniform: Tensor) -> Tensor:
    """[0, 1) to [-1, 1)."""
    return 2 * uniform - 1


def _place(faces: Tensor, *, flip: Tensor, shift: Tensor, scale: Tensor, angle: Tensor, moved: Tensor | None) -> Tensor:
    """Flip, and shift, scale and rotate those that are ``moved``; pixels from outside repeat the border."""
    flipped = torch.where(flip.view(-1, 1, 1, 1), faces.flip(-1), faces)
    if moved is None:
        return flipped
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    mirror = torch.where(flip, -1.0, 1.0).to(faces.dtype)
    # Rows give the input position of an output position, in [-1, 1] coordinates: hence 1 / scale and the factor 2.
    rows = torch.stack(
        (
            torch.stack((mirror * cosine, -mirror * sine, 2 * shift[:, 0]), 1),
            torch.stack((sine, cosine, 2 * shift[:, 1]), 1),
        ),
        1,
    )
    grid = F.affine_grid(rows, list(faces.shape), align_corners=False)
    resampled = F.grid_sample(faces, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(moved.view(-1, 1, 1, 1), resampled, flipped)


def _recolour(faces: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Contrast around the image's mean luma, saturation around each pixel's luma, then brightness; clipped."""
    luma = (faces * faces.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean = luma.mean((2, 3), keepdim=True)
    saturation, contrast, brightness = (t.view(-1, 1, 1, 1) for t in (saturation, contrast, brightness))
    # mean + contrast * (luma + saturation * (faces - luma) - mean) + brightness, with the fewest passes over the batch.
    grey_part = (contrast * (1 - saturation)) * luma + ((1 - contrast) * mean + brightness)
    return torch.addcmul(grey_part, faces, contrast * saturation).clamp_(0, 1)


def _erase(faces: Tensor, chosen: Tensor, area: Tensor, aspect: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Cover one rectangle of a share ``area``, sides 1:2 to 2:1, wholly inside the image."""
    stretch = torch.exp(_signed(aspect) * math.log(2) / 2)
    height, width = ((area.sqrt() * side).clamp(max=1) for side in (stretch, 1 / stretch))
    mask = _inside(faces.shape[2], top, height).unsqueeze(2) & _inside(faces.shape[3], left, width).unsqueeze(1)
    return faces.masked_fill((mask & chosen.view(-1, 1, 1)).unsqueeze(1), 0.5)


def _inside(pixels: int, place: Tensor, extent: Tensor) -> Tensor:
    """bool (N, pixels): pixel centres in [start, start + extent), start = place * (1 - extent), image side 1."""
    centres = (torch.arange(pixels, device=place.device, dtype=place.dtype) + 0.5) / pixels
    start = (place * (1 - extent)).unsqueeze(1)
    return (centres >= start) & (centres < start + extent.unsqueeze(1))
