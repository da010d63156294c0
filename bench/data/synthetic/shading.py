"""Light on the head: key light with soft cast shadows, ambient light, occlusion, highlights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.data.synthetic.paint import Coat, points, swatch
from bench.data.synthetic.parameters import Conditions

_SHADOW_STEPS = 6
_SHADOW_REACH = 0.42


def grid(n: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres x, y (n, size, size) in [-1, 1]."""
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2 - 1
    return axis[None, None, :].expand(n, size, size), axis[None, :, None].expand(n, size, size)


def key_direction(c: Conditions) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vector towards the key light in camera coordinates, (N, 1, 1) each."""
    azimuth, elevation = c["light_azimuth"].clamp(-1.45, 1.45), c["light_elevation"]
    return azimuth.sin() * elevation.cos(), -elevation.sin(), azimuth.cos() * elevation.cos()


def warmth(value: Tensor, tint: Tensor) -> Tensor:
    """Colour of a light (N, 3, 1, 1) from warmth (positive: yellow, negative: blue) and green tint."""
    return torch.stack([1 + value, 1 + tint, 1 - value - 0.5 * tint], dim=1).clamp(min=0.35)


def key_colour(c: Conditions) -> Tensor:
    """Intensity of the key light (N, 3, 1, 1)."""
    return c["key"][:, None] * warmth(c["key_warmth"], c["tint"])


def normals(depth: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normals in camera coordinates by central differences of depth (N, H, W); step: pixel size."""
    padded = F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    gx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]).div_(-2 * step)
    gy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]).div_(-2 * step)
    norm = torch.rsqrt(gx.square() + gy.square() + 1)
    return gx.mul_(norm), gy.mul_(norm), norm


def _coarse(depth: Tensor) -> tuple[int, Tensor]:
    """A side of two thirds, and the depth (N, 1, side, side): shadows are soft."""
    side = max(depth.shape[1] * 2 // 3, 16)
    return side, F.interpolate(depth[:, None], size=(side, side), mode="bilinear", align_corners=False)


def _cast_shadow(depth: Tensor, light: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Share of the key light that reaches each point, by marching towards it over the depth map."""
    n, height, width = depth.shape
    size, coarse = _coarse(depth)
    x, y = grid(n, size, depth.device)
    lx, ly, lz = light
    shadow = torch.zeros_like(coarse[:, 0])
    for k in range(1, _SHADOW_STEPS + 1):
        reach = _SHADOW_REACH * (k / _SHADOW_STEPS) ** 1.4
        towards = points(x + lx * reach, y + ly * reach)
        there = F.grid_sample(coarse, towards, mode="bilinear", padding_mode="border", align_corners=False)
        above = (there - coarse)[:, 0] - lz.clamp(min=0.1) * reach
        shadow = torch.maximum(shadow, (above / (0.02 + 0.13 * reach)).clamp(0, 1))
    shadow = F.avg_pool2d(F.pad(shadow[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)
    return 1 - F.interpolate(shadow, size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def _occlusion(depth: Tensor) -> Tensor:
    """Ambient light that a point gets, from how far it lies below its surroundings."""
    height, width = depth.shape[1:]
    size, coarse = _coarse(depth)
    radius = max(1, round(0.07 * size))
    around = F.avg_pool2d(F.pad(coarse, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    below = F.interpolate(
        (around - coarse).clamp(-0.05, 0.2), size=(height, width), mode="bilinear", align_corners=False
    )
    return (1 - 6.0 * below[:, 0]).clamp_(0.35, 1.1)


def illuminate(c: Conditions, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Light on a surface given by its depth towards the camera, (N, H, W) over an image 2 units wide.

    Irradiance (N, 3, H, W), and the specular reflection of the key light (N, 1, H, W) for a gloss of 1.
    """
    nx, ny, nz = normals(depth, 2.0 / depth.shape[-1])
    lx, ly, lz = light = key_direction(c)
    cosine = nx * lx + ny * ly + nz * lz
    lit = _cast_shadow(depth, light)
    # Light scatters under the skin: wrap the terminator a little, more for red.
    hard = ((cosine + 0.12) / 1.12).clamp_(min=0) * lit
    soft = ((cosine + 0.30) / 1.30).clamp_(min=0) * (0.3 + 0.7 * lit)
    direct = torch.lerp(hard[:, None], soft[:, None], swatch(depth, 0.35, 0.08, 0.04))
    ambient = c["ambient"] * (1 + c["ambient_x"] * nx + c["ambient_y"] * ny) * _occlusion(depth)
    diffuse = key_colour(c) * direct + warmth(c["ambient_warmth"], c["tint"]) * ambient[:, None]
    half = torch.rsqrt(lx.square() + ly.square() + (lz + 1).square())
    gleam = ((nx * lx + ny * ly + nz * (lz + 1)) * half).clamp_(min=0)
    gleam = gleam.square_().square_().square_()
    # A broad lobe and a narrow one; none at grazing angles, where the relief is too coarse for it.
    gleam = gleam * (0.35 * gleam + 0.65 * gleam.square().square()) * lit * (2.2 * nz).clamp_(max=1)
    return diffuse, gleam[:, None]


def shade(c: Conditions, coat: Coat, diffuse: Tensor, gleam: Tensor) -> Tensor:
    """Radiance (N, 3, H, W), linear, of a material under the light of :func:`illuminate`."""
    matt = coat.colour * diffuse
    shine = (0.16 * key_colour(c)) * (gleam * coat.gloss[:, None])
    return matt.add_(shine).mul_(coat.shade[:, None])
