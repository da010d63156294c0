"""What changes between two pictures of one person: pose, light, expression, camera, background."""

from __future__ import annotations

import torch

from bench.data.synthetic.columns import Law, Table, bell, coin, draw, stack, uniform

_LAWS: dict[str, Law] = {
    # Pose in radians and alignment error in half image widths.
    "yaw": bell(0.0, 0.26),
    "pitch": bell(0.0, 0.12),
    "roll": bell(0.0, 0.045),
    "shift_x": bell(0.0, 0.018),
    "shift_y": bell(0.0, 0.018),
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
    "key_warmth": bell(0.0, 0.16),
    "ambient_warmth": bell(0.0, 0.16),
    "tint": bell(0.0, 0.05),
    "exposure": bell(0.0, 0.24),
    # Camera.
    "blur": uniform(0.0, 0.55),
    "noise": uniform(0.002, 0.014),
    "noise_x": uniform(0, 1),
    "noise_y": uniform(0, 1),
    "saturation": uniform(0.7, 1.15),
    "contrast": uniform(0.85, 1.2),
    # Background.
    "back_r": uniform(0.02, 0.8),
    "back_g": uniform(0.02, 0.8),
    "back_b": uniform(0.02, 0.8),
    "back_grey": uniform(0, 1),
    "back_slope_x": uniform(-0.5, 0.5),
    "back_slope_y": uniform(-0.5, 0.5),
    "back_texture": uniform(0.0, 0.9),
    "back_zoom": uniform(0.15, 0.6),
    "back_u": uniform(-0.45, 0.45),
    "back_v": uniform(-0.45, 0.45),
}


class Conditions(Table):
    """One row of nuisance parameters per picture; see :func:`draw_conditions`."""


def draw_conditions(n: int, generator: torch.Generator) -> Conditions:
    """Draw the circumstances of ``n`` pictures; the first k of n are the same whatever n is.

    Args:
        n: how many, >= 1.
        generator: CPU generator.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    p = draw(_LAWS, n, generator)
    p["mouth_open"] = p["mouth_open"].clamp(min=0)  # closed in most pictures
    p["smile"] = p["smile"].clamp(min=-0.25)
    grey = (p["back_r"] + p["back_g"] + p["back_b"]) / 3
    for channel in "rgb":
        p[f"back_{channel}"] = torch.lerp(p[f"back_{channel}"], grey, 0.9 * p["back_grey"].sqrt()).square()
    return Conditions(*stack(p))
