"""Reflectance of the head: skin, brows, eyes, lips, hair, beard and glasses, in face coordinates.

Every feature is a signed distance (positive inside) turned into coverage over one pixel, so that
edges stay sharp at any image size and do not alias.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.data.synthetic.geometry import Surface, bell, spot
from bench.data.synthetic.parameters import MOLES, Conditions, Identities

SIZE = 512
MOTTLE, SPECKLE, STRAND, CLOUD = range(4)
#: Face units to bank coordinates: a texel is about a pixel (2 x 56 / 512 units) of a 112-pixel face.
TEXELS_PER_UNIT = 1 / 4.4


def _filtered(generator: torch.Generator, gain: Tensor) -> Tensor:
    """White noise (SIZE, SIZE) shaped by ``gain`` over frequency, zero mean and unit deviation."""
    white = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    field: Tensor = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return (field - field.mean()) / field.std()


@functools.lru_cache(maxsize=4)
def bank(device: torch.device) -> Tensor:
    """float32 (1, 4, SIZE, SIZE): skin mottle, freckle-sized speckle, hair strands, soft clouds."""
    generator = torch.Generator().manual_seed(0x5EED)
    frequency = torch.fft.fftfreq(SIZE, dtype=torch.float64) * SIZE
    fy, fx = frequency[:, None], frequency[None, :]
    radius = torch.hypot(fx, fy).clamp(min=1)
    mottle = radius.pow(-1.0) * (radius > 6) * torch.exp(-((radius / 110) ** 2))
    speckle = torch.exp(-((radius / 105 - 1) ** 2) / 0.18)
    strand = torch.exp(-((fx.abs() / 55 - 1) ** 2) / 0.5) * torch.exp(-((fy / 5) ** 2))
    cloud = radius.pow(-1.6) * torch.exp(-((radius / 60) ** 2))
    fields = [_filtered(generator, gain) for gain in (mottle, speckle, strand, cloud)]
    return torch.stack(fields).to(torch.float32)[None].to(device)


@functools.lru_cache(maxsize=4)
def grain(device: torch.device) -> Tensor:
    """float32 (3, SIZE, SIZE): white Gaussian sensor noise of unit deviation."""
    generator = torch.Generator().manual_seed(0x6EA1)
    return torch.randn(3, SIZE, SIZE, generator=generator).to(device)


def points(x: Tensor, y: Tensor) -> Tensor:
    """(..., 2): x beside y, as :func:`torch.stack` would put them, in an eighth of its time."""
    return torch.view_as_real(torch.complex(x, y))


def sample(fields: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(N, C, H, W): fields (1, C, S, S) at u, v (N, H, W); they span [-1, 1] and repeat by reflection."""
    n, height, width = u.shape
    grid = points(u, v).reshape(1, n * height, width, 2)
    read = F.grid_sample(fields, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return read.view(fields.shape[1], n, height, width).transpose(0, 1)


def crop_grain(left: Tensor, top: Tensor, size: int, device: torch.device) -> Tensor:
    """Windows (N, 3, size, size) of :func:`grain`, wrapped; left, top float (N,) in [0, 1)."""
    steps = torch.arange(size, device=device)
    rows = ((top * SIZE).long()[:, None] + steps) % SIZE
    columns = ((left * SIZE).long()[:, None] + steps) % SIZE
    return grain(device)[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


class Patch(NamedTuple):
    """Pixels to paint, all (N, H, W): object coordinates x, y, z and the textures read there."""

    x: Tensor
    y: Tensor
    z: Tensor
    mottle: Tensor
    speckle: Tensor
    strand: Tensor


@dataclass(slots=True)
class Coat:
    """Material of each pixel, built up by painting over.

    Attributes:
        colour: linear reflectance (N, 3, H, W).
        gloss: strength of the specular reflection (N, H, W).
        shade: multiplies all light, for occlusion that the relief does not resolve (N, H, W).
    """

    colour: Tensor
    gloss: Tensor
    shade: Tensor

    def over(self, mask: Tensor, colour: Tensor) -> None:
        """Lay ``colour`` ((N, 3, 1, 1) or (N, 3, H, W)) over the pixels by ``mask`` (N, H, W)."""
        self.colour.lerp_(colour.expand_as(self.colour), mask[:, None])


def rgb(p: Identities | Conditions, name: str) -> Tensor:
    """Columns name_r, name_g, name_b as (N, 3, 1, 1)."""
    return torch.stack([p[f"{name}_{channel}"] for channel in "rgb"], dim=1)


def swatch(like: Tensor, *rgb: float) -> Tensor:
    """A colour (1, 3, 1, 1) on the device of ``like``."""
    return torch.tensor(rgb, device=like.device).view(1, 3, 1, 1)


def cover(distance: Tensor, pixel: float | Tensor) -> Tensor:
    """Coverage in [0, 1] of a pixel whose centre lies ``distance`` inside an edge."""
    return (distance / pixel + 0.5).clamp_(0, 1)


def _skin(p: Identities, s: Patch) -> Coat:
    x, y = s.x, s.y
    ax = x.abs()
    skin = rgb(p, "skin")
    colour = skin * (1 + 0.045 * p["mottle"] * s.mottle)[:, None]
    # Blood near the surface: cheeks and the tip of the nose.
    flush = spot((ax - 0.47) / 0.20, (y - 0.25) / 0.18) + 0.8 * spot(x / 0.13, (y - p["nose_tip_y"]) / 0.10)
    flush = flush * (0.05 + 0.16 * p["flush"]) + 0.02 * p["flush"] * s.mottle
    colour = colour * (1 + flush[:, None] * swatch(x, 0.10, -0.9, -0.75))
    # Thin, darker skin around the eyes; bags.
    around = spot((ax - p["eye_x"]) / 0.17, (y - p["eye_y"] - 0.03) / 0.11) * (0.10 + 0.20 * p["eye_bags"])
    colour = colour * (1 - around[:, None] * swatch(x, 0.75, 1.0, 0.85))
    # Freckles: the peaks of the speckle, mostly over nose and cheeks.
    zone = 0.15 + spot(ax / 0.62, (y - 0.16) / 0.26)
    freckle = ((s.speckle - 0.85).clamp(0, 1.2) * zone * p["freckles"]).clamp(max=0.6)
    coat = Coat(colour, 0.35 + 0.65 * p["gloss"] * (0.55 + 0.45 * spot(x / 0.35, (y - 0.0) / 0.55)), torch.ones_like(x))
    coat.over(freckle, skin * swatch(x, 0.55, 0.36, 0.26))
    return coat


def _moles(p: Identities, s: Patch, coat: Coat, pixel: float) -> None:
    for i in range(MOLES):
        radius = p[f"mole{i}_radius"]
        distance = torch.hypot(s.x - p[f"mole{i}_x"], s.y - p[f"mole{i}_y"])
        coat.over(
            cover(radius - distance, pixel) * p[f"mole{i}_dark"].clamp(min=0),
            rgb(p, "skin") * swatch(s.x, 0.34, 0.19, 0.12),
        )


def _wrinkles(p: Identities, s: Patch, coat: Coat) -> None:
    """Forehead lines, crow's feet and the folds beside the mouth, as shading."""
    x, y = s.x, s.y
    ax = x.abs()
    bend = y + 0.10 * x.square() + 0.012 * (7 * x + 9 * p["skin_u"]).sin()
    lines = (bend * (46 + 20 * p["skin_v"])).sin().clamp(min=0).square().square()
    forehead = lines * spot(x / 0.42, (y + 0.46) / 0.11)
    out = ax - p["eye_x"] - 0.20
    angle = (y - p["eye_y"]) / (out + 0.12)
    feet = (angle * 11 + 1).cos().clamp(min=0).square() * spot(out / 0.055, (y - p["eye_y"]) / 0.075)
    coat.shade *= 1 - p["wrinkles"] * (0.34 * forehead + 0.36 * feet)


def _brows(p: Identities, c: Conditions, s: Patch, coat: Coat, pixel: float) -> None:
    speckle = s.speckle
    side = s.x.sign()
    ax = s.x.abs()
    span = p["brow_outer"] - p["brow_inner"]
    along = (ax - p["brow_inner"]) / span
    base = p["eye_y"] - p["brow_gap"] - c["brow_raise"] + side * p["brow_shift"] + p["brow_tilt"] * (along - 0.4)
    peak = p["brow_peak"]
    rise = torch.where(along < peak, along / peak, (1 - along) / (1 - peak)).clamp(min=-0.3)
    arch = base - p["brow_arch"] * (rise * (2 - rise))
    taper = (0.72 + 0.5 * along).clamp(max=1.0) * ((1.06 - along) * 2.6).clamp(0, 1)
    half = p["brow_thickness"] * taper
    ragged = 0.004 * speckle
    body = torch.minimum(half + ragged - (s.y - arch).abs(), torch.minimum(along, 1.05 - along) * span + 0.5 * ragged)
    density = p["brow_density"] * (0.88 + 0.12 * speckle).clamp(0.3, 1)
    coat.over(cover(body, pixel + 0.014) * density, rgb(p, "brow"))


def _eyes(p: Identities, c: Conditions, s: Patch, coat: Coat, light: tuple[Tensor, Tensor], pixel: float) -> None:
    side = s.x.sign()
    dx = s.x.abs() - p["eye_x"]
    dy = s.y - p["eye_y"] - side * p["eye_shift"]
    tilt = p["eye_tilt"]
    u = (dx + tilt * dy) / p["eye_width"]
    v = dy - tilt * dx
    bow = (1 - u.square()).clamp(min=-0.6)
    squint = 0.10 * c["smile"].clamp(min=0)
    opening = (c["eye_open"] - squint).clamp(0.25, 1.25)
    upper = -p["eye_upper"] * opening * bow * (1 + 0.35 * p["eye_skew"] * u)
    lower = p["eye_lower"] * (1 - 0.8 * squint) * bow * (1 + 0.25 * u)
    # Crease of the lid, with the shadow above it, and make-up.
    lid = upper - p["lid_gap"] * (0.35 + 0.65 * bow.clamp(min=0).sqrt())
    crease = bell((v - lid) / 0.011) * bell(u / 1.05).square()
    coat.shade *= 1 - 0.50 * p["lid_crease"] * crease
    on_lid = cover(upper - v, 0.02) * cover(v - lid, 0.03) * (bow > 0)
    coat.shade *= 1 - on_lid * (0.10 + 0.30 * p["eye_shadow"])
    fold = bell((v - lower - 0.045 - 0.02 * bow) / 0.016) * bell((u + 0.1) / 0.8)
    coat.shade *= 1 - (0.22 * p["eye_bags"] + 0.12 * squint) * fold
    # Eyeball.
    inside = torch.minimum(v - upper, lower - v)
    white = cover(inside, pixel)
    shadow = (0.50 + 0.50 * ((v - upper) / 0.035).clamp(0, 1)) * (1 - 0.30 * u.square().clamp(max=1))
    coat.over(white, swatch(u, 0.70, 0.64, 0.60))
    corner = white * cover(-u - 0.82, 0.10)
    coat.over(corner * 0.7, rgb(p, "skin") * swatch(u, 0.8, 0.45, 0.42))
    gx = dx - side * c["gaze_x"]
    gy = v + 0.010 - c["gaze_y"]
    r = torch.hypot(gx, gy)
    radius = p["iris_radius"]
    iris = white * cover(radius - r, pixel)
    ring = 1 - 0.65 * cover(r - 0.80 * radius, 0.02) + 0.25 * (torch.atan2(gy, gx) * 9).cos() * (r / radius)
    coat.over(iris, rgb(p, "iris") * ring[:, None])
    coat.over(white * cover(0.40 * radius - r, pixel), swatch(u, 0.008, 0.008, 0.008))
    coat.shade *= 1 - white * (1 - shadow)
    coat.gloss *= 1 - white
    lx, ly = light
    glint = white * spot((side * gx - 0.024 * lx) / 0.012, (gy - 0.022 * ly) / 0.012)
    coat.over((glint * 0.9).clamp(max=1), swatch(u, 1.3, 1.3, 1.3))
    # Lashes: a dark edge on the upper lid that thickens outwards, a faint one below.
    lash = 0.010 + 0.012 * p["lash"] * (1 + 0.5 * u)
    outline = cover(lash - (v - upper + 0.3 * lash).abs(), pixel + 0.004) * cover(
        1.10 + 0.12 * p["lash"] - u.abs(), 0.12
    )
    outline = outline * (bow > -0.45)
    coat.over(outline * (0.55 + 0.40 * p["lash"]), rgb(p, "brow") * 0.35)
    below = cover(0.006 - (v - lower).abs(), pixel + 0.006) * cover(1.0 - u.abs(), 0.1)
    coat.over(below * (0.25 + 0.25 * p["lash"]), rgb(p, "skin") * 0.22)


def _nose(p: Identities, s: Patch, coat: Coat, pixel: float) -> None:
    x = s.x - p["nose_skew"]
    y = s.y - p["nose_tip_y"]
    hole = spot((x.abs() - 0.62 * p["nose_wing_x"]) / 0.036, (y - 0.052 - 0.10 * (x.abs() - 0.08)) / 0.020)
    coat.shade *= 1 - 0.88 * p["nostril"] * hole.clamp(max=1)
    coat.shade *= 1 - 0.12 * spot(x / 0.13, (y - 0.075) / 0.022)
    coat.shade *= 1 - 0.34 * spot((x.abs() - p["nose_wing_x"] - 0.045) / 0.014, (y - 0.02) / 0.045)


def _mouth(p: Identities, c: Conditions, s: Patch, coat: Coat, pixel: float) -> None:
    speckle = s.speckle
    smile, opening = c["smile"], c["mouth_open"]
    x = s.x - p["mouth_shift"]
    half = p["mouth_width"] * (1 + 0.16 * smile) - 0.03 * opening
    u = x / half
    bow = (1 - u.square()).clamp(min=-0.3)
    y0 = p["mouth_y"] + 0.02 * opening
    # The line of the lips: corners rise with a smile; the seam has a little wave.
    corners = p["mouth_curve"] - 0.045 * smile
    seam = y0 + corners * u.square() + p["mouth_slant"] * x + 0.008 * (1 - 2 * u.square()) * bow.clamp(min=0)
    gap = 0.10 * opening * bow.clamp(min=0).sqrt()
    v = s.y - seam
    cupid = 1 - p["cupid"] * 9 * bell(x / 0.045) * 0.5
    thin = 1 - 0.15 * smile.clamp(min=0)
    top = -p["upper_lip"] * thin * bow.clamp(min=-0.3) * cupid
    bottom = gap + p["lower_lip"] * thin * (1 - u.square() * (0.6 + 0.4 * u.abs())).clamp(min=-0.3)
    lips = cover(torch.minimum(v - top, bottom - v), pixel + 0.008)
    coat.over(lips * 0.92, rgb(p, "lips"))
    coat.shade *= 1 - lips * (0.20 * cover(-v, 0.03) + 0.05 * speckle)
    coat.gloss += lips * (0.35 + 0.5 * p["lip_dark"])
    # Inside of an open mouth: dark, with a row of teeth under the upper lip.
    hollow = cover(torch.minimum(v, gap - v), pixel) * (gap > 0.004)
    coat.over(hollow, swatch(x, 0.045, 0.012, 0.012))
    teeth = hollow * cover(torch.minimum(0.055 + 0.01 * smile - v, 0.80 - u.abs() + 0 * v), pixel + 0.01)
    arc = 0.80 - 0.45 * u.square()
    coat.over(teeth * 0.92, swatch(x, 0.66, 0.60, 0.52) * arc[:, None])
    line = bell(v / 0.013) * cover(1.05 - u.abs(), 0.1) * (1 - cover(gap, 0.03))
    coat.shade *= 1 - 0.68 * line
    coat.shade *= 1 - 0.42 * spot((u.abs() - 1.0) * half / 0.022, v / 0.022)
    coat.shade *= 1 - 0.20 * spot(x / 0.15, (v - bottom - 0.03) / 0.026)


def _hairline(p: Identities, s: Patch) -> Tensor:
    """Signed distance into the region where hair grows on the scalp (N, H, W)."""
    x, y, strand = s.x, s.y, s.strand
    part = x - p["hair_part"]
    front = p["hairline"] + p["hair_peak"] * bell(x / 0.14)
    front = front - p["hair_recession"] * bell((x.abs() - 0.36) / 0.16)
    front = front + 0.55 * p["hair_sweep"] * part * bell(part / 0.5) * (0.25 + 0.4 * p["fringe"])
    front = front + 0.42 * (x.abs() - 0.42).clamp(min=0)
    ragged = strand * (0.009 + 0.030 * p["fringe"])
    top = front + ragged - y
    side = torch.minimum(p["temple_z"] + 0.35 * (-y - 0.3).clamp(min=-0.5) - s.z, p["sideburn"] - y) + 0.012 * strand
    return torch.maximum(top, side) - 4.0 * p["bald"]


def hair_tone(p: Identities, strand: Tensor, mottle: Tensor) -> Tensor:
    """Reflectance of hair (N, 3, H, W) with its strands."""
    return rgb(p, "hair") * (1 + 0.34 * strand + 0.16 * mottle).clamp(0.25, 2.2)[:, None]


def _hair(p: Identities, s: Patch, coat: Coat, pixel: float) -> None:
    inside = _hairline(p, s)
    mask = cover(inside - 0.01, pixel + 0.022)
    # Hair shades the skin under its edge, a fringe more than a combed-back line.
    coat.shade *= 1 - (0.12 + 0.30 * p["fringe"]) * bell(inside.clamp(max=0) / 0.05) * (1 - p["bald"])
    coat.over(mask, hair_tone(p, s.strand, s.mottle))
    coat.shade += mask * (1.0 - 0.25 * bell(inside / 0.05) - coat.shade)
    coat.gloss += mask * (0.45 - coat.gloss)


def _beard(p: Identities, c: Conditions, s: Patch, coat: Coat, pixel: float) -> None:
    x, y, speckle = s.x, s.y, s.speckle
    ax = x.abs()
    opening = c["mouth_open"]
    mouth = p["mouth_y"] + 0.02 * opening
    half = p["mouth_width"] * (1 + 0.16 * c["smile"])
    # Cheeks below a line that runs from the sideburn to the corner of the mouth; bare around the lips.
    line = p["beard_line"] + 0.22 * bell((ax - 0.30) / 0.2) - 0.5 * (ax - 0.6).clamp(min=0)
    lips = torch.hypot(x / (half * 1.05), (y - mouth - 0.05 * opening) / (0.115 + 0.06 * opening)) - 1
    region = torch.minimum(torch.minimum(y - line, lips * 0.12), y - mouth + 0.4 * (ax - 0.2))
    lip = torch.minimum(
        0.052 - (y - (p["nose_tip_y"] + mouth) / 2 - 0.035 - 0.28 * ax.square()).abs(), half * 1.12 - ax
    )
    grain = 0.012 * speckle
    full = cover(region + grain, 0.05 + pixel) * p["beard"]
    upper = cover(lip + grain, 0.03 + pixel) * p["moustache"]
    shadow = (
        cover(torch.maximum(region, lip) + 0.03 + grain, 0.16) * p["stubble"] * (0.75 + 0.25 * speckle).clamp(0.2, 1)
    )
    ink = torch.lerp(rgb(p, "brow"), rgb(p, "hair"), 0.5)
    coat.over((0.55 * shadow).clamp(0, 1), ink * 1.15)
    mask = torch.maximum(full, upper).clamp(0, 1) * (0.90 + 0.10 * speckle).clamp(0.55, 1)
    coat.over(mask, ink * (1 + 0.22 * speckle).clamp(0.3, 2)[:, None])
    coat.gloss *= 1 - 0.8 * mask


def _glasses(p: Identities, c: Conditions, s: Patch, coat: Coat, pixel: float) -> None:
    worn = p["glasses"] * c["glasses_on"]
    if not bool(worn.any()):
        return
    dx = s.x.abs() - p["eye_x"] - 0.012
    dy = s.y - p["eye_y"] - 0.03
    width, height, power = p["glasses_width"], p["glasses_height"], p["glasses_power"]
    norm = ((dx.abs() / width).pow(power) + (dy.abs() / height).pow(power)).clamp(min=1e-6).pow(1 / power)
    edge = (norm - 1) * height
    rim = cover(p["glasses_rim"] - edge.abs(), pixel)
    bridge = cover(p["glasses_rim"] - (s.y - p["eye_y"] + 0.03 - 0.4 * s.x.square()).abs(), pixel)
    bridge = bridge * cover(p["eye_x"] - width - s.x.abs() + 0.02, pixel)
    temple = cover(p["glasses_rim"] - (s.y - p["eye_y"] + 0.02).abs(), pixel) * cover(dx - width, pixel)
    frame = torch.maximum(torch.maximum(rim, bridge), temple) * worn
    hue, dark = p["glasses_hue"], p["glasses_hue"].square().square()
    tint = torch.stack([0.02 + 0.25 * dark, 0.02 + 0.12 * dark, 0.02 + 0.04 * hue], dim=1)
    shadow = bell((edge - 0.01) / 0.035) * cover(dy, 0.1) * worn
    coat.shade *= 1 - 0.25 * shadow
    coat.over(frame, tint)
    coat.shade += frame * (1 - coat.shade)
    coat.gloss += frame * (1.2 - coat.gloss)


def _band(s: Patch, coat: Coat, low: float | Tensor, high: float | Tensor) -> tuple[Patch, Coat]:
    """The image rows (views) that show some of low < y < high for some face of the batch.

    Only what a feature cannot reach is left out, so the result does not depend on the batch.
    """
    seen = ((s.y > low) & (s.y < high)).any(dim=2).any(dim=0).nonzero()
    rows = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
    patch = Patch(*(values[:, rows] for values in s))
    return patch, Coat(coat.colour[:, :, rows], coat.gloss[:, rows], coat.shade[:, rows])


def _textured(p: Identities, s: Surface) -> Patch:
    turn = torch.atan2(s.x, s.z + 0.25)  # unrolls the sides, so that texture does not stretch there
    k, textures = TEXELS_PER_UNIT, bank(s.x.device)
    skin = sample(textures[:, MOTTLE : SPECKLE + 1], turn * k + p["skin_u"], s.y * k + p["skin_v"])
    wave = 0.05 * p["hair_wave"] * (9 * s.y + 30 * p["hair_v"]).sin()
    lean = 0.5 * p["hair_sweep"] * (s.y + 0.6) * (s.y < 0)
    u, v = (turn + wave + lean) * k * 1.5 + p["hair_u"], s.y * k + p["hair_v"]
    return Patch(s.x, s.y, s.z, skin[:, 0], skin[:, 1], sample(textures[:, STRAND : STRAND + 1], u, v)[:, 0])


def paint_head(p: Identities, c: Conditions, surface: Surface, light: tuple[Tensor, Tensor], pixel: float) -> Coat:
    """Material of the head's surface.

    ``light`` is the direction of the key light in the image, (N, 1, 1) each, for the glint in the eyes; ``pixel`` is
    the size of a pixel in face units.
    """
    s = _textured(p, surface)
    coat = _skin(p, s)
    _moles(p, s, coat, pixel)
    _wrinkles(p, *_band(s, coat, -9.0, 0.25))
    _nose(p, *_band(s, coat, p["nose_tip_y"].min() - 0.16, p["nose_tip_y"].max() + 0.18), pixel)
    _beard(p, c, *_band(s, coat, 0.0, 9.0), pixel)
    _mouth(p, c, *_band(s, coat, p["mouth_y"].min() - 0.26, p["mouth_y"].max() + 0.42), pixel)
    _eyes(p, c, *_band(s, coat, p["eye_y"].min() - 0.32, p["eye_y"].max() + 0.26), light, pixel)
    _brows(p, c, *_band(s, coat, p["eye_y"].min() - 0.52, p["eye_y"].max() + 0.06), pixel)
    _hair(p, *_band(s, coat, -9.0, 0.6), pixel)
    _glasses(p, c, *_band(s, coat, -0.5, 0.45), pixel)
    return coat
