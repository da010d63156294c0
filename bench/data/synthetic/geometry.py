"""Where the camera ray of each pixel meets the head: an egg-shaped cylinder plus facial relief.

The head is the implicit surface (X / w(Y))^2 + ((Z - h(X, Y)) / d(Y))^2 = 1 with half-width w, half-depth d
and relief h. For given w, d and h the ray meets it in closed form; as they depend on the meeting
point, the equation is solved by fixed-point iteration from h = 0, which keeps silhouettes exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.data.synthetic.parameters import Conditions, Identities

CROWN_Y = -1.42
WIDEST_Y = 0.02
PIVOT = (0.0, 0.2, 0.84)


def falloff(squared: Tensor) -> Tensor:
    """(1 - q/8)^8 for q < 8, else 0: within .05 of exp(-q), in place.

    The exponential would leave denormal numbers over most of a face, which slow a processor down several
    times; this is also exactly zero away from the spot, so that a feature can be left out there.
    """
    return squared.mul_(-0.125).add_(1).clamp_(min=0).square_().square_().square_()


def bell(q: Tensor) -> Tensor:
    """Approximately exp(-q^2)."""
    return falloff(q * q)


def spot(qx: Tensor, qy: Tensor) -> Tensor:
    """Approximately exp(-qx^2 - qy^2)."""
    return falloff((qx * qx).addcmul_(qy, qy))


@dataclass(frozen=True, slots=True)
class Camera:
    """Orthographic camera: rotation object -> camera as nine (N, 1, 1) entries, row-major."""

    rotation: tuple[tuple[Tensor, Tensor, Tensor], ...]
    shift_x: Tensor
    shift_y: Tensor
    scale: Tensor

    @classmethod
    def of(cls, conditions: Conditions) -> Camera:
        """The camera of each picture: yaw, then pitch, then roll about a point between the eyes and mouth."""
        (sy, cy), (sp, cp), (sr, cr) = ((conditions[k].sin(), conditions[k].cos()) for k in ("yaw", "pitch", "roll"))
        rows = (
            (cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy),
            (sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy),
            (-cp * sy, sp, cp * cy),
        )
        # Alignment by landmarks magnifies a face whose eyes come closer together.
        scale = conditions["scale"] / (0.45 + 0.55 * cy)
        return cls(rows, conditions["shift_x"], conditions["shift_y"], scale)

    def plane(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Image coordinates (in [-1, 1]) to the camera plane through the pivot, (N, H, W) each."""
        return (x - self.shift_x) / self.scale - PIVOT[0], (y - self.shift_y) / self.scale - PIVOT[1]

    def project(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Object points to the camera plane."""
        x, y, z = x - PIVOT[0], y - PIVOT[1], z - PIVOT[2]
        (a, b, c), (d, e, f), _ = self.rotation
        return a * x + b * y + c * z, d * x + e * y + f * z


class Surface(NamedTuple):
    """What each pixel sees of the head, all (N, H, W): a point in object coordinates, its depth towards the camera, and
    the approximate distance ``inside`` the silhouette, negative beside the head.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    depth: Tensor
    inside: Tensor


def _chin_y(p: Identities, c: Conditions) -> Tensor:
    """Lowest point of the chin, which drops as the mouth opens."""
    return p["chin_y"] + 0.10 * c["mouth_open"]


def relief(p: Identities, c: Conditions, x: Tensor, y: Tensor) -> Tensor:
    """Height h (N, H, W) of the facial relief at object coordinates x, y."""
    smile, opening = c["smile"], c["mouth_open"]
    ax = x.abs()
    ex, ey = p["eye_x"], p["eye_y"]
    nx = x - p["nose_skew"]
    # Brow ridge, eye sockets, lids over the eyeball.
    h = spot((ax - ex) / 0.21, (y - (ey - 0.17)) / 0.075).mul_(p["brow_ridge"])
    h -= spot((ax - ex * 0.93) / 0.165, (y - ey) / 0.115).mul_(p["socket_depth"])
    h += spot((ax - ex) / 0.115, (y - ey) / 0.062).mul_(0.055)
    h -= spot((ax - ex + 0.01) / 0.12, (y - (ey + 0.105)) / 0.028).mul_(0.014 * p["eye_bags"])
    # Cheeks.
    lift = 0.03 * smile.clamp(min=0)
    h += spot((ax - 0.50) / 0.19, (y - (p["cheekbone_y"] + 0.03 - lift)) / 0.15).mul_(p["cheekbone"] + 1.3 * lift)
    h -= spot((ax - 0.52) / 0.15, (y - 0.52) / 0.20).mul_(p["cheek_hollow"])
    # Nose: a wedge from the root to the tip, cut off below it, a ball on the tip and two wings.
    tip = p["nose_tip_y"]
    root = ey - 0.06
    along = ((y - root) / (tip - root)).clamp(0, 1.2)
    width = torch.lerp(p["nose_bridge_width"], p["nose_tip_width"], along.clamp(max=1).square())
    onset = (along / 0.4).clamp(max=1)
    ramp = along.square().mul_(1.6 - 0.6 * along).mul_(p["nose_height"] - p["nose_bridge"])
    ramp += p["nose_bridge"] * onset.square() * (3 - 2 * onset)
    hump = (along * (1 - along)).clamp(min=0).mul_(4 * p["nose_bump"])
    underside = torch.sigmoid((tip + 0.042 - y) / 0.030)
    q = (nx / width).square()
    h += (ramp + hump).mul_(underside).mul_(torch.reciprocal(1 + q * (0.6 + 0.9 * q)))
    h += spot(nx / 0.088, (y - (tip - 0.005)) / 0.068).mul_(p["nose_ball"])
    wing_x = p["nose_wing_x"] + 0.012 * smile.clamp(min=0)
    h += spot((nx.abs() - wing_x) / 0.052, (y - (tip + 0.018)) / 0.058).mul_(p["nose_wing"])
    # Folds from nose to mouth, deeper with age and smile.
    mouth_y = p["mouth_y"] + 0.02 * opening
    half = p["mouth_width"] * (1 + 0.16 * smile) - 0.03 * opening
    down = ((y - tip) / (mouth_y - tip)).clamp(0, 1.15)
    fold = ax - (p["nose_wing_x"] + 0.05 + (half * 1.12 - p["nose_wing_x"]) * down.sqrt())
    deep = 0.005 + 0.018 * p["wrinkles"] + 0.020 * smile.clamp(min=0)
    h -= spot(fold / 0.030, (y - 0.5 * (tip + mouth_y) - 0.02) / 0.16).mul_(deep)
    # Muzzle, lips, chin.
    h += spot(x / 0.30, (y - mouth_y) / 0.22).mul_(0.045)
    mid = (x / half).square()
    h += spot(mid, (y - (mouth_y - 0.52 * p["upper_lip"])) / (0.55 * p["upper_lip"] + 0.012)).mul_(
        0.030 + 0.25 * p["upper_lip"]
    )
    low_y = mouth_y + 0.09 * opening + 0.5 * p["lower_lip"]
    h += spot(mid, (y - low_y) / (0.50 * p["lower_lip"] + 0.014)).mul_(0.032 + 0.30 * p["lower_lip"])
    h -= spot(x / 0.030, (y - (tip + mouth_y) / 2 - 0.02) / 0.10).mul_(p["philtrum"])
    chin = _chin_y(p, c)
    h -= spot(x / 0.20, (y - (low_y + 0.6 * p["lower_lip"] + 0.035)) / 0.045).mul_(0.045)
    h += spot(x / 0.19, (y - (chin - 0.13)) / 0.10).mul_(p["chin_size"])
    h -= spot(x / 0.025, (y - (chin - 0.12)) / 0.07).mul_(p["chin_cleft"].clamp(min=0))
    return h


def _profile(p: Identities, c: Conditions, y: Tensor) -> tuple[Tensor, Tensor]:
    """Half-width and half-depth of the head at height y."""
    chin = _chin_y(p, c)
    down = ((y - WIDEST_Y) / (chin - WIDEST_Y)).clamp_(min=0, max=0.9999)
    up = ((WIDEST_Y - y) / (WIDEST_Y - CROWN_Y)).clamp_(min=0, max=0.9999)
    below = down.pow(p["jaw_power"])
    above = up * up * up
    width = (1 - below - above).sqrt_().mul_(1 - p["jaw_taper"] * down.square()).mul_(p["cheek_width"])
    fourth = down.square().square()
    depth = (1 - fourth * down - above).sqrt_().mul_(p["head_depth"])
    return width, depth


def intersect(p: Identities, c: Conditions, camera: Camera, px: Tensor, py: Tensor, steps: int = 4) -> Surface:
    """Meeting points of the rays through the camera-plane points px, py (N, H, W) with the head."""
    (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = camera.rotation
    ox = r00 * px + r10 * py + PIVOT[0]
    oy = r01 * px + r11 * py + PIVOT[1]
    oz = r02 * px + r12 * py + PIVOT[2]
    t = torch.zeros_like(ox)
    x, y = ox, oy
    for step in range(steps):
        w, d = _profile(p, c, y)
        z0 = oz - relief(p, c, x, y) if step else oz
        iw, id_ = w.square().reciprocal_(), d.square().reciprocal_()
        a = torch.addcmul(r20.square() * iw, r22.square(), id_)
        b = torch.addcmul(r20 * ox * iw, r22 * z0, id_)
        k = torch.addcmul(ox.square() * iw, z0.square(), id_).sub_(1)
        clearance = (b.square() - a * k) / a
        t = (clearance.clamp(min=0).mul(a).sqrt() - b) / a
        x, y = ox + r20 * t, oy + r21 * t
    # Below the chin the profile has closed: nothing is hit, however narrow the profile is there.
    above_chin = _chin_y(p, c) - y
    return Surface(x, y, oz + r22 * t, t, torch.minimum(clearance, 4 * above_chin))
