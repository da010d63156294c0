"""What each figure of a result is called, in which unit it is shown, which way it reads, and how it is rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench.results import Measure


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure, or the reason why there is none.

    Attributes:
        value: the figure; None where it cannot be measured.
        ci95: lower and upper end of its 95 % confidence interval; None where there is none to give.
        n: how many images, pairs or probes the value was computed from.
        reason: why ``value`` or ``ci95`` is None; None where both are given.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None or self.ci95 is None) and not self.reason:
            raise ValueError("an estimate without a value or an interval must say why")
        if self.value is None and self.ci95 is not None:
            raise ValueError("an interval needs a value")


@dataclass(frozen=True, slots=True)
class Kind:
    """One figure as reports show it.

    Attributes:
        heading: of its column.
        unit: after the heading; empty for a figure without one.
        decimals: shown at most; fewer where the interval is wide.
        meaning: one sentence for people who see it for the first time.
        scale: what a stored value is multiplied with.
        leaks: +1 where a higher value leaks more, -1 where a lower one does, 0 where it tells of utility or cost.
    """

    heading: str
    unit: str
    decimals: int
    meaning: str
    scale: float = 1.0
    leaks: int = 1

    @property
    def label(self) -> str:
        """Heading and unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "accuracy": Kind(
            "accuracy", "%", 1, "Recognition behind the defence: share of face pairs told apart right.", 100, 0
        ),
        "ssim": Kind("SSIM", "", 3, "Structural similarity of recovered and original face; 1 is the original."),
        "psnr": Kind("PSNR", "dB", 2, "Peak signal-to-noise ratio of the recovered face; punishes brightness shifts."),
        "psnr_aligned": Kind(
            "PSNR aligned", "dB", 2, "PSNR after the best affine fit of each colour: what a person would still see."
        ),
        "ms_ssim": Kind("MS-SSIM", "", 3, "Structural similarity over several scales."),
        "lpips": Kind("LPIPS", "", 3, "Perceptual distance to the original; 0 is the original.", leaks=-1),
        "type1_tar": Kind(
            "type I", "%", 1, "Recovered faces that the evaluator accepts as the same image's person.", 100
        ),
        "type2_tar": Kind(
            "type II", "%", 1, "Recovered faces that the evaluator accepts against another image of the person.", 100
        ),
        "rank1": Kind(
            "rank-1", "%", 1, "Recovered faces whose nearest face in the gallery is of the right person.", 100
        ),
        "rank5": Kind("rank-5", "%", 1, "As rank-1, among the five nearest.", 100),
        "cosine": Kind("cosine", "", 3, "Cosine of the evaluator's embeddings of recovered and original face."),
        "knn_distance": Kind("distance", "", 3, "Distance to the nearest plain face of the same person.", leaks=-1),
        "linkage": Kind(
            "linkage", "%", 1, "Pairs of a protected and a plain face told apart right; 50 % is guessing.", 100
        ),
        "d_sys": Kind("D_sys", "", 3, "Global unlinkability measure: 0 unlinkable, 1 fully linkable."),
        "bytes": Kind("sent", "bytes", 0, "Bytes that leave the client per face.", leaks=0),
        "protect": Kind("protect", "faces/s", 0, "Faces that a client protects in a second, batched.", leaks=0),
        "recover": Kind(
            "attack", "faces/s", 0, "Faces that the fitted attack processes in a second, batched.", leaks=0
        ),
    }
)

#: Shown where there is no figure.
MISSING = "–"


def decimals(kind: Kind, measure: Measure) -> int:
    """Decimals worth showing: the wider half of the interval keeps two significant digits, no more.

    Example:
        >>> wide = Measure(value=0.478, ci95=(0.331, 0.6), higher_is_better_for="utility")
        >>> decimals(KINDS["type1_tar"], wide)
        0
    """
    if measure.value is None or measure.ci95 is None:
        return kind.decimals
    half = kind.scale * max(measure.ci95[1] - measure.value, measure.value - measure.ci95[0])
    if half <= 0:
        return kind.decimals
    return min(kind.decimals, max(0, 1 - math.floor(math.log10(half))))


def shown(name: str, measure: Measure | None) -> str:
    """The value of ``measure`` in the unit of the figure ``name``; a dash where there is none."""
    if measure is None or measure.value is None:
        return MISSING
    kind = KINDS[name]
    return f"{kind.scale * measure.value:.{decimals(kind, measure)}f}"


def interval(name: str, measure: Measure | None) -> str:
    """The interval as ``[low, high]``, rounded as the value is; empty where there is none."""
    if measure is None or measure.value is None or measure.ci95 is None:
        return ""
    kind = KINDS[name]
    digits = decimals(kind, measure)
    low, high = (f"{kind.scale * end:.{digits}f}" for end in measure.ci95)
    return f"[{low}, {high}]"


def leak(name: str, measure: Measure | None) -> float:
    """How much leaks by this figure, on a scale where more is worse; minus infinity where it was not measured."""
    if measure is None or measure.value is None:
        return -math.inf
    return KINDS[name].leaks * measure.value
