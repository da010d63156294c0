"""What every figure of the suite is made of: a value, its interval, and why either may be missing."""

from __future__ import annotations

from dataclasses import dataclass


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
