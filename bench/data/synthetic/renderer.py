"""From identities and conditions to pictures: rays, paint, light, layers, camera."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.data.synthetic.geometry import Camera, Surface, intersect
from bench.data.synthetic.paint import (
    CLOUD,
    MOTTLE,
    STRAND,
    TEXELS_PER_UNIT,
    Coat,
    bank,
    cover,
    crop_grain,
    hair_tone,
    paint_head,
    rgb,
    sample,
    swatch,
)
from bench.data.synthetic.parameters import Conditions, Identities
from bench.data.synthetic.shading import grid, illuminate, key_direction, shade, warmth
from bench.progress import Report, no_report

MIN_SIZE = 16
_PIXELS_AT_ONCE = 1 << 17  # supersampled pixels per chunk: bounds memory, keeps the caches warm


def _oversampled(image_size: int) -> int:
    return image_size + image_size // 2


def _background(c: Conditions, x: Tensor, y: Tensor) -> Tensor:
    zoom = c["back_zoom"]
    cloud = sample(bank(x.device)[:, CLOUD : CLOUD + 1], x * zoom + c["back_u"], y * zoom + c["back_v"])[:, 0]
    slope = 1 + c["back_slope_x"] * x + c["back_slope_y"] * y
    tone = (slope * (1 + 0.45 * c["back_texture"] * cloud)).clamp(min=0.02)
    return rgb(c, "back") * tone[:, None]


def _behind(p: Identities, c: Conditions, camera: Camera, px: Tensor, py: Tensor, back: Tensor, pixel: float) -> Tensor:
    """Neck, hair that falls behind the face, and ears, over the background (linear radiance)."""
    light = (c["ambient"] + 0.45 * c["key"])[:, None] * warmth(0.5 * (c["key_warmth"] + c["ambient_warmth"]), c["tint"])
    cx, cy = camera.project(torch.zeros_like(c["yaw"]), torch.full_like(c["yaw"], 0.2), torch.full_like(c["yaw"], -0.1))
    (r00, r01, _), *_ = camera.rotation
    norm = torch.hypot(r00, r01)
    # Upright coordinates of the head's middle plane.
    dx, dy = px - cx, py - cy
    x = (r00 * dx - r01 * -dy) / norm
    y = (r00 * dy + r01 * dx) / norm + 0.2
    mottle, strand = sample(
        bank(px.device)[:, MOTTLE : STRAND + 1 : STRAND - MOTTLE],
        x * 1.5 * TEXELS_PER_UNIT + p["hair_u"],
        y * 0.6 * TEXELS_PER_UNIT + p["hair_v"],
    ).unbind(1)
    coat = Coat(back, torch.zeros_like(x), torch.ones_like(x))
    width = p["cheek_width"]
    neck = cover(0.60 * width + 0.10 * (y - 0.9) + 0.5 * (y - 1.15).clamp(min=0) - x.abs(), pixel) * cover(
        y - 0.4, pixel
    )
    shadow = 0.30 + 0.35 * ((y - p["chin_y"]) / 0.5).clamp(0, 1) + 0.15 * (x.abs() / 0.6).clamp(0, 1)
    coat.over(neck, rgb(p, "skin") * light * shadow[:, None])
    wide = width + p["hair_volume"] + 0.012 * strand
    rise = ((-0.1 - y) / 1.35).clamp(0, 1)
    # Short hair lies close to the head where it ends; long hair keeps its volume.
    wide = wide - p["hair_volume"] * ((y - p["hair_length"]) / 0.5 + 1).clamp(0, 1) * (p["hair_length"] < 0.1)
    falls = torch.minimum(
        wide * (1 - rise.square() * rise.sqrt()).clamp(min=0).sqrt()
        + 0.25 * p["hair_volume"] * y.clamp(0, 0.6)
        - x.abs(),
        p["hair_length"] - y + 0.03 * strand,
    )
    tone = hair_tone(p, strand, mottle)
    deep = 0.35 + 0.45 * ((x.abs() - 0.45 * width) / (0.55 * width)).clamp(0, 1)
    coat.over(cover(falls, pixel + 0.01), tone * light * deep[:, None])
    # Ears stand beside the middle plane and come forward or hide with yaw; long hair covers them.
    for sign in (-1.0, 1.0):
        at = camera.project(
            sign * (width * 0.985 + p["ear_out"]), torch.full_like(width, 0.06), torch.full_like(width, 0.02)
        )
        ex, ey = (px - at[0]), (py - at[1])
        tall, broad = 0.19 * p["ear_size"], 0.085 + 0.6 * p["ear_out"]
        r = torch.hypot(ex / broad, ey / tall)
        ear = cover((1 - r) * broad, pixel) * cover(0.2 - p["hair_length"], 0.1)
        rim = 0.42 + 0.35 * (r * 1.1).clamp(max=1).square()
        reddish = rgb(p, "skin") * swatch(px, 1.0, 0.84, 0.80)
        coat.over(ear, reddish * light * rim[:, None])
    return coat.colour


def _develop(c: Conditions, radiance: Tensor, size: int) -> Tensor:
    """Camera: average over the pixel, expose, tone curve, blur, noise; sRGB in [0, 1]."""
    image = F.interpolate(radiance, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    image = image.clamp_(min=0) * (0.95 * torch.exp(c["exposure"])[:, None])
    grey = image.mean(dim=1, keepdim=True)
    image = torch.lerp(grey, image, c["saturation"][:, None]).clamp_(min=0)
    image = 1 - torch.exp(-1.35 * image)  # soft shoulder: highlights compress and do not clip
    image = (image * 1.12 + 1e-4).clamp_(max=1).pow(1 / 2.2)
    image = (0.46 + (image - 0.46) * c["contrast"][:, None]).clamp_(0, 1)
    # Separable three-tap blur; the weight of the neighbours gives the wanted deviation in pixels.
    side = (c["blur"] * size / 112).square()[:, None] / 2
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, 1:-1] * (1 - 2 * side) + (padded[:, :, 2:] + padded[:, :, :-2]) * side
    image = rows[..., 1:-1] * (1 - 2 * side) + (rows[..., 2:] + rows[..., :-2]) * side
    noise = crop_grain(c["noise_x"][:, 0, 0], c["noise_y"][:, 0, 0], size, image.device)
    return (image + noise * c["noise"][:, None]).clamp_(0, 1)


def _distance(inside: Tensor) -> Tensor:
    """Implicit function to approximate signed distance: divide by the length of its gradient."""
    level = inside.clamp(-2, 2)
    step = 2.0 / inside.shape[-1]
    gy, gx = torch.gradient(level, spacing=step, dim=(1, 2))
    return (level / torch.hypot(gx, gy).clamp(min=0.5)).clamp_(-0.5, 0.5)


def _render_chunk(p: Identities, c: Conditions, size: int) -> Tensor:
    device = p.values.device
    fine = _oversampled(size)
    camera, pixel = Camera.of(c), 1.6 / size
    # Relief and light are smooth: half the resolution does for them, and costs a quarter.
    coarse = intersect(p, c, camera, *camera.plane(*grid(len(p), fine // 2, device)))
    light = illuminate(c, coarse.depth)  # 3 + 1 maps
    shape = torch.stack((*coarse[:4], _distance(coarse.inside)), dim=1)
    maps = torch.cat((shape, *light), dim=1)
    maps = F.interpolate(maps, size=(fine, fine), mode="bilinear", align_corners=False)
    surface = Surface(*maps[:, :5].unbind(1))
    x, y = grid(len(p), fine, device)
    coat = paint_head(p, c, surface, key_direction(c)[:2], pixel)
    head = shade(c, coat, maps[:, 5:8], maps[:, 8:9])
    behind = _behind(p, c, camera, *camera.plane(x, y), _background(c, x, y), pixel)
    return _develop(c, behind.lerp_(head, cover(surface.inside, pixel)[:, None]), size)


@torch.no_grad()
def render(
    identities: Identities, conditions: Conditions, image_size: int = 112, *, report: Report = no_report
) -> Tensor:
    """Render one picture per row: float32 (N, 3, image_size, image_size), sRGB in [0, 1], on the tables' device.

    ``report`` is called after every chunk.

    Raises:
        ValueError: row counts differ or the size is too small.
    """
    if len(identities) != len(conditions):
        raise ValueError(f"identities and conditions must pair up, got {len(identities)} and {len(conditions)} rows")
    if image_size < MIN_SIZE:
        raise ValueError(f"image_size must be at least {MIN_SIZE}, got {image_size}")
    chunk = max(1, _PIXELS_AT_ONCE // _oversampled(image_size) ** 2)
    images = torch.empty((len(identities), 3, image_size, image_size), device=identities.values.device)
    for start in range(0, len(identities), chunk):
        rows = slice(start, min(start + chunk, len(identities)))
        images[rows] = _render_chunk(identities.rows(rows), conditions.rows(rows), image_size)
        report(rows.stop, len(identities))
    return images
