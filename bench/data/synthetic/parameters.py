"""What a synthetic face is drawn from: who somebody is, and what changes between two pictures of one person.

Lengths are in half image widths of the ArcFace 112x112 template (1 = 56 pixels), x to the right, y
down, z towards the viewer, origin in the middle of the crop. In these units the template of the
five landmarks (Deng et al., ArcFace, CVPR 2019, reference alignment) puts the eyes at
(+-.31, -.08), the tip of the nose at y = .28 and the corners of the mouth at (+-.26, .65).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Law = Callable[[Tensor], Tensor]
"""Maps uniform numbers in [0, 1) to the values of one column (an inverse distribution function)."""


def uniform(low: float, high: float) -> Law:
    """Uniform in [low, high)."""
    return lambda u: low + (high - low) * u


def bell(mean: float, deviation: float) -> Law:
    """Normal, cut at two deviations (the tails are what makes a face implausible)."""
    return lambda u: mean + deviation * torch.special.ndtri(0.02275 + 0.9545 * u)


def each(law: Law, *names: str) -> dict[str, Law]:
    """The same law for several columns."""
    return dict.fromkeys(names, law)


def coin(probability: float) -> Law:
    """1 with the given probability, else 0."""
    return lambda u: (u < probability).to(u.dtype)


@dataclass(frozen=True, slots=True)
class Table:
    """N rows of named scalar parameters: ``values`` float32 (N, D), and the position of each name in D ``columns``."""

    values: Tensor
    columns: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.columns):
            raise ValueError(f"values must be (N, {len(self.columns)}), got {tuple(self.values.shape)}")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> Tensor:
        """Column ``name`` as (N, 1, 1), ready to broadcast over pixels."""
        return self.values[:, self.columns[name], None, None]

    def rows(self, index: Tensor | slice) -> Self:
        """The rows at ``index``."""
        return type(self)(self.values[index], self.columns)

    def to(self, device: torch.device | str) -> Self:
        """The table on ``device``."""
        return type(self)(self.values.to(device), self.columns)


def draw(laws: Mapping[str, Law], n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``n`` draws of every law, float64 (n,) each, from a CPU generator.

    One uniform (n, D) matrix is filled row by row, so that the first rows do not depend on ``n``.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    u = torch.rand((n, len(laws)), generator=generator, dtype=torch.float64)
    return {name: law(u[:, i]) for i, (name, law) in enumerate(laws.items())}


def stack(values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
    """Columns (N,) to one float32 (N, D) matrix and the position of each name."""
    matrix = torch.stack(list(values.values()), dim=1).to(torch.float32)
    return matrix, {name: i for i, name in enumerate(values)}


MOLES = 5

_PERSON: dict[str, Law] = {
    # Latent factors that several features share.
    **each(uniform(0, 1), "masculine", "age"),
    # Head.
    "cheek_width": bell(0.79, 0.04),
    "jaw_taper": bell(0.23, 0.12),
    "jaw_power": bell(2.75, 0.55),
    "chin_y": bell(1.07, 0.05),
    "head_depth": bell(0.98, 0.05),
    # Relief.
    "brow_ridge": uniform(0.0, 0.07),
    "socket_depth": bell(0.085, 0.025),
    "cheekbone": bell(0.055, 0.03),
    "cheekbone_y": bell(0.14, 0.05),
    "cheek_hollow": bell(0.03, 0.03),
    "chin_size": bell(0.09, 0.035),
    "chin_cleft": uniform(-0.03, 0.03),
    "nose_tip_y": bell(0.285, 0.045),
    "nose_bridge": bell(0.085, 0.03),
    "nose_height": bell(0.215, 0.04),
    "nose_ball": bell(0.06, 0.018),
    "nose_bridge_width": bell(0.075, 0.014),
    "nose_tip_width": bell(0.092, 0.018),
    "nose_wing_x": bell(0.125, 0.022),
    "nose_wing": bell(0.085, 0.025),
    "nose_bump": bell(0.0, 0.022),
    "nose_skew": bell(0.0, 0.012),
    "nostril": uniform(0.55, 1.0),
    "philtrum": uniform(0.0, 0.016),
    # Eyes.
    "eye_x": bell(0.312, 0.017),
    "eye_y": bell(-0.08, 0.02),
    "eye_width": bell(0.136, 0.013),
    "eye_upper": bell(0.061, 0.012),
    "eye_lower": bell(0.030, 0.007),
    "eye_tilt": bell(-0.06, 0.09),
    "eye_skew": bell(0.0, 0.25),
    "lid_gap": uniform(0.018, 0.06),
    "lid_crease": uniform(0.0, 1.0),
    "lash": uniform(0.25, 1.0),
    "iris_radius": bell(0.060, 0.004),
    **each(uniform(0, 1), "iris_hue", "iris_value"),
    **each(uniform(0.0, 1.0), "eye_bags", "eye_shadow"),
    # Brows.
    "brow_gap": bell(0.165, 0.028),
    "brow_inner": bell(0.115, 0.035),
    "brow_outer": bell(0.50, 0.03),
    "brow_thickness": bell(0.034, 0.012),
    "brow_arch": bell(0.045, 0.03),
    "brow_peak": bell(0.62, 0.1),
    "brow_tilt": bell(0.0, 0.06),
    "brow_density": uniform(0.35, 1.0),
    # Mouth.
    "mouth_y": bell(0.635, 0.03),
    "mouth_width": bell(0.262, 0.03),
    "upper_lip": bell(0.060, 0.02),
    "lower_lip": bell(0.080, 0.022),
    "cupid": uniform(0.0, 0.035),
    "mouth_curve": bell(-0.006, 0.018),
    **each(uniform(0, 1), "lip_colour", "lip_dark"),
    # Skin.
    **each(uniform(0, 1), "melanin", "redness", "yellow"),
    "flush": uniform(0.0, 1.0),
    "freckle_draw": uniform(0, 1),
    **each(uniform(0.3, 1.0), "mottle", "gloss"),
    **each(uniform(-0.45, 0.45), "skin_u", "skin_v"),
    # Hair.
    **each(uniform(0, 1), "hair_melanin", "hair_red", "hair_grey"),
    "hairline": bell(-0.68, 0.07),
    "hair_peak": bell(0.03, 0.04),
    "hair_recession": uniform(0, 1),
    "hair_part": bell(0.0, 0.14),
    "hair_sweep": uniform(-1.0, 1.0),
    "fringe_draw": uniform(0, 1),
    "fringe_y": uniform(-0.5, -0.30),
    "hair_volume": uniform(0.02, 0.22),
    "length_draw": uniform(0, 1),
    "bald_draw": uniform(0, 1),
    **each(uniform(0, 1), "hair_wave", "hair_extent"),
    **each(uniform(-0.45, 0.45), "hair_u", "hair_v"),
    "sideburn": uniform(-0.05, 0.35),
    "temple_z": bell(0.50, 0.05),
    # Beard.
    **each(uniform(0, 1), "beard_draw", "stubble_draw", "moustache_draw"),
    "beard_line": uniform(0.30, 0.62),
    "beard_density": uniform(0.45, 1.0),
    # Glasses.
    "glasses": coin(0.22),
    "glasses_width": uniform(0.19, 0.25),
    "glasses_height": uniform(0.11, 0.19),
    "glasses_power": uniform(2.0, 5.0),
    "glasses_rim": uniform(0.008, 0.024),
    "glasses_hue": uniform(0, 1),
    # Ears and asymmetry.
    "ear_size": uniform(0.7, 1.2),
    "ear_out": uniform(0.0, 0.09),
    "eye_shift": bell(0.0, 0.009),
    "brow_shift": bell(0.0, 0.013),
    "mouth_shift": bell(0.0, 0.014),
    "mouth_slant": bell(0.0, 0.03),
}
for _i in range(MOLES):
    _PERSON |= {
        f"mole{_i}_x": uniform(-0.6, 0.6),
        f"mole{_i}_y": uniform(-0.5, 0.95),
        f"mole{_i}_radius": uniform(0.012, 0.032),
        f"mole{_i}_dark": uniform(-1.2, 0.95),
    }

# sRGB ramps, from light to dark; values read between neighbours.
_SKIN = (
    (0.96, 0.83, 0.76),
    (0.92, 0.75, 0.65),
    (0.85, 0.66, 0.54),
    (0.72, 0.52, 0.40),
    (0.54, 0.36, 0.27),
    (0.36, 0.23, 0.17),
)
_HAIR = (
    (0.80, 0.68, 0.46),
    (0.62, 0.46, 0.28),
    (0.42, 0.28, 0.17),
    (0.25, 0.16, 0.11),
    (0.12, 0.09, 0.08),
    (0.06, 0.05, 0.05),
)
_IRIS_LIGHT = (
    (0.38, 0.55, 0.70),
    (0.42, 0.55, 0.52),
    (0.45, 0.52, 0.32),
    (0.50, 0.42, 0.22),
    (0.45, 0.28, 0.14),
    (0.30, 0.18, 0.10),
)
_IRIS_DARK = ((0.30, 0.18, 0.10), (0.22, 0.13, 0.08), (0.16, 0.09, 0.06))


class Identities(Table):
    """One row of anatomical parameters per person; see :func:`draw_identities`."""


def _ramp(stops: tuple[tuple[float, float, float], ...], position: Tensor) -> Tensor:
    """Piecewise-linear colour ramp: position (N,) in [0, 1] to sRGB (N, 3)."""
    table = torch.tensor(stops, dtype=position.dtype)
    at = position.clamp(0, 1) * (len(stops) - 1)
    low = at.floor().clamp(max=len(stops) - 2).long()
    return torch.lerp(table[low], table[low + 1], (at - low)[:, None])


def _towards(colour: Tensor, rgb: tuple[float, float, float], weight: Tensor | float) -> Tensor:
    """Colours (N, 3) mixed with one of them."""
    return torch.lerp(colour, torch.tensor(rgb, dtype=colour.dtype).expand_as(colour), weight)


def _pick(condition: Tensor, yes: Tensor, no: Tensor | float) -> Tensor:
    return torch.where(condition, yes, torch.as_tensor(no, dtype=yes.dtype))


def _correlate(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn independent draws into a plausible person: what goes with sex, age and complexion."""
    man, age = (p["masculine"] - 0.5).mul(8).sigmoid(), p["age"]
    old = ((age - 0.45) / 0.55).clamp(0, 1)
    child_free = 1 - old
    p["jaw_taper"] = p["jaw_taper"] - 0.07 * (man - 0.5)
    p["jaw_power"] = p["jaw_power"] + 0.5 * (man - 0.5)
    p["brow_ridge"] = p["brow_ridge"] * (0.4 + 0.8 * man)
    p["brow_gap"] = p["brow_gap"] - 0.03 * (man - 0.5)
    p["brow_thickness"] = (p["brow_thickness"] + 0.012 * (man - 0.5)).clamp(min=0.012)
    p["upper_lip"] = (p["upper_lip"] * (1.12 - 0.24 * man) * (1 - 0.3 * old)).clamp(min=0.016)
    p["lower_lip"] = (p["lower_lip"] * (1.08 - 0.16 * man) * (1 - 0.2 * old)).clamp(min=0.028)
    p["lash"] = p["lash"] * (1.15 - 0.6 * man)
    p["eye_shadow"] = p["eye_shadow"] * (1 - man)
    p["lip_dark"] = p["lip_dark"] * (1.1 - 0.7 * man)
    p["wrinkles"] = old.square() * 0.9 + 0.15 * age
    p["eye_bags"] = p["eye_bags"] * (0.35 + 0.65 * age)
    p["eye_upper"] = p["eye_upper"] * (1 - 0.12 * old)
    # Hair: length, fringe, baldness, grey.
    bald = (p["bald_draw"] < 0.22 * man * (0.4 + age)).to(age.dtype)
    long_hair = p["length_draw"] > 0.1 + 0.82 * man
    p["bald"] = bald
    p["hair_length"] = _pick(long_hair, 0.15 + 1.6 * p["hair_extent"], -0.4)
    p["hair_length"] = _pick(bald > 0, torch.full_like(age, -2.0), p["hair_length"])
    fringe = (p["fringe_draw"] < 0.26) & (bald == 0) & (old < 0.8)
    recession = p["hair_recession"].square() * (0.03 + 0.25 * man * (0.3 + old))
    p["hairline"] = _pick(fringe, p["fringe_y"], p["hairline"] - 0.35 * recession)
    p["hair_recession"] = _pick(fringe, 0.1 * recession, recession)
    p["fringe"] = fringe.to(age.dtype)
    p["hair_volume"] = p["hair_volume"] * (1 - 0.5 * man) * (1 - bald) + 0.01
    p["sideburn"] = p["sideburn"] * (0.5 + 0.5 * man)
    dark = (p["melanin"] * 1.6).clamp(0, 1)
    hair_melanin = 1 - (1 - p["hair_melanin"]) * (1 - dark)
    grey = (p["hair_grey"] * 1.5 * old.sqrt() - 0.25).clamp(0, 1)
    hair = _ramp(_HAIR, hair_melanin)
    red = (p["hair_red"] < 0.12).to(age.dtype)[:, None] * (1 - dark)[:, None]
    hair = _towards(hair, (0.56, 0.25, 0.11), 0.8 * red)
    hair = _towards(hair, (0.66, 0.65, 0.64), grey[:, None])
    brow = _towards(hair * 0.72, (0.10, 0.07, 0.06), 0.3)
    # Skin.
    skin = _ramp(_SKIN, p["melanin"].pow(0.9))
    warm = torch.stack(
        [1 + 0.05 * p["redness"], 1 - 0.035 * p["redness"], 1 - 0.03 * p["redness"] - 0.09 * p["yellow"]], 1
    )
    skin = (skin * warm).clamp(0, 0.97)
    p["freckles"] = (1 - 3.0 * p["freckle_draw"]).clamp(min=0) * (1 - dark) + 0.04
    p["flush"] = p["flush"] * (1 - 0.6 * dark)
    light_eyes = (p["melanin"] < 0.45) & (p["iris_hue"] > 0.35)
    iris = torch.where(light_eyes[:, None], _ramp(_IRIS_LIGHT, p["iris_value"]), _ramp(_IRIS_DARK, p["iris_value"]))
    natural = skin * torch.tensor([0.86, 0.60, 0.60], dtype=skin.dtype)
    painted = _ramp(((0.78, 0.36, 0.38), (0.66, 0.14, 0.20), (0.50, 0.14, 0.24)), p["lip_colour"])
    make_up = ((p["lip_dark"] - 0.45) * 1.5).clamp(0, 0.8) * child_free.sqrt()
    lips = torch.lerp(natural, painted, make_up[:, None])
    for name, colour in (("skin", skin), ("hair", hair), ("brow", brow), ("iris", iris), ("lips", lips)):
        for i, channel in enumerate("rgb"):
            # Shading is linear in light, so colours are stored as linear reflectance.
            p[f"{name}_{channel}"] = colour[:, i].clamp(0, 1).pow(2.2)
    # Beard.
    hairy = man > 0.6
    p["beard"] = ((p["beard_draw"] < 0.22) & hairy).to(age.dtype) * p["beard_density"]
    p["stubble"] = (hairy.to(age.dtype) * (p["stubble_draw"] * 1.3 - 0.3)).clamp(0, 1) * 0.55
    p["moustache"] = (((p["moustache_draw"] < 0.12) & hairy) | (p["beard"] > 0)).to(age.dtype) * p["beard_density"]
    return p


def draw_identities(n: int, generator: torch.Generator) -> Identities:
    """Draw ``n`` people; the first k of them are the same whatever n is.

    Feature measures vary independently, so that identity is carried by many of them; only sex, age and complexion tie
    some together.
    """
    return Identities(*stack(_correlate(draw(_PERSON, n, generator))))


_PICTURE: dict[str, Law] = {
    # Pose in radians and alignment error in half image widths.
    "yaw": bell(0.0, 0.26),
    "pitch": bell(0.0, 0.12),
    "roll": bell(0.0, 0.045),
    **each(bell(0.0, 0.018), "shift_x", "shift_y"),
    "scale": bell(1.0, 0.022),
    # Expression.
    "smile": bell(0.35, 0.42),
    "mouth_open": uniform(-1.0, 0.7),
    "brow_raise": bell(0.0, 0.018),
    "eye_open": bell(0.95, 0.14),
    "gaze_x": bell(0.0, 0.018),
    "gaze_y": bell(0.0, 0.007),
    "glasses_on": coin(0.85),
    # Light: a key light over a first-order spherical-harmonics ambient.
    "light_azimuth": bell(0.0, 0.8),
    "light_elevation": bell(0.45, 0.4),
    "key": uniform(0.35, 1.25),
    "ambient": uniform(0.18, 0.62),
    "ambient_x": uniform(-0.6, 0.6),
    "ambient_y": uniform(-0.7, 0.2),
    **each(bell(0.0, 0.16), "key_warmth", "ambient_warmth"),
    "tint": bell(0.0, 0.05),
    "exposure": bell(0.0, 0.24),
    # Camera.
    "blur": uniform(0.0, 0.55),
    "noise": uniform(0.002, 0.014),
    **each(uniform(0, 1), "noise_x", "noise_y"),
    "saturation": uniform(0.7, 1.15),
    "contrast": uniform(0.85, 1.2),
    # Background.
    **each(uniform(0.02, 0.8), "back_r", "back_g", "back_b"),
    "back_grey": uniform(0, 1),
    **each(uniform(-0.5, 0.5), "back_slope_x", "back_slope_y"),
    "back_texture": uniform(0.0, 0.9),
    "back_zoom": uniform(0.15, 0.6),
    **each(uniform(-0.45, 0.45), "back_u", "back_v"),
}


class Conditions(Table):
    """One row of nuisance parameters per picture; see :func:`draw_conditions`."""


def draw_conditions(n: int, generator: torch.Generator) -> Conditions:
    """Draw the circumstances of ``n`` pictures; the first k of them are the same whatever n is."""
    p = draw(_PICTURE, n, generator)
    p["mouth_open"] = p["mouth_open"].clamp(min=0)  # closed in most pictures
    p["smile"] = p["smile"].clamp(min=-0.25)
    grey = (p["back_r"] + p["back_g"] + p["back_b"]) / 3
    for channel in "rgb":
        p[f"back_{channel}"] = torch.lerp(p[f"back_{channel}"], grey, 0.9 * p["back_grey"].sqrt()).square()
    return Conditions(*stack(p))
