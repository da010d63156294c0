"""The figures that the gate guards, and what it tolerates of each where nobody says otherwise.

A figure is named by its place in ``metrics.json``. One figure stands for each way a face or a person can leak; near
copies of it (MS-SSIM beside SSIM, rank-5 beside rank-1) would only add tests and cost power.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from bench.results import Direction

Role = Literal["privacy", "utility", "canary"]


@dataclass(frozen=True, slots=True)
class Figure:
    """How one figure is guarded by default.

    Attributes:
        role: ``canary`` is what the attack gets out of unprotected faces: where that falls, the attack broke.
        tolerance: change in the harmful direction that nobody minds, in the figure's own unit.
        seed_sd: standard deviation between runs of other seeds beyond the choice of victims, assumed as far as the
            baseline's own runs do not tell (:func:`bench.gate.comparison.moderated`).
        repeat_sd: the same between runs of one seed that were trained anew: other threads, another machine.
        rate: whether it is a share of trials, whose resampled error is too small near 0 and 1.
        limit: the value at which everything is lost; None where there is none.
    """

    role: Role
    tolerance: float
    seed_sd: float
    repeat_sd: float
    rate: bool = False
    limit: float | None = None


def _rate(role: Role, limit: float, *, tolerance: float = 0.03) -> Figure:
    return Figure(role, tolerance, seed_sd=0.05, repeat_sd=0.03, rate=True, limit=limit)


#: Place in the result -> how it is guarded.
FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "recovery.ssim": Figure("privacy", 0.01, 0.01, 0.004, limit=1.0),
        "recovery.psnr_aligned": Figure("privacy", 0.25, 0.4, 0.15),
        "recovery.lpips": Figure("privacy", 0.01, 0.01, 0.004, limit=0.0),
        "recovery.identity.cosine": Figure("privacy", 0.02, 0.05, 0.04, limit=1.0),
        "recovery.identity.type1_tar": _rate("privacy", 1.0),
        "recovery.identity.type2_tar": _rate("privacy", 1.0),
        "recovery.identity.rank1": _rate("privacy", 1.0),
        "state_inference.faces": _rate("privacy", 1.0),
        # Declared, not measured: how much an attacker has to guess. Exact, so the slightest loss counts.
        "defense.entropy_bits": Figure("privacy", 0.01, 0.0, 0.0, limit=0.0),
        "linkage.protected_plain.accuracy": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_plain.auc": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_protected.accuracy": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_protected.auc": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.rank1": _rate("privacy", 1.0),
        "utility.accuracy": _rate("utility", 0.5, tolerance=0.02),
        "utility.auc": _rate("utility", 0.5, tolerance=0.02),
        "recovery.ceiling.ssim": Figure("canary", 0.03, 0.01, 0.004, limit=0.0),
        "recovery.ceiling.identity.cosine": Figure("canary", 0.05, 0.03, 0.02),
        "linkage.plain.auc": _rate("canary", 0.5, tolerance=0.03),
    }
)


def harm_sign(role: Role, higher_is_better_for: Direction) -> int:
    """+1 where a rise of the figure does harm, -1 where a fall does.

    Leaking more harms privacy; recognising less harms utility; and a canary is harmed when its attack gets less.

    Example:
        >>> harm_sign("privacy", "utility"), harm_sign("canary", "utility")
        (1, -1)
    """
    rise = higher_is_better_for == "utility"
    return 1 if rise == (role == "privacy") else -1
