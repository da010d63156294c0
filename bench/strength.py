"""Strength curves: what leaks as the attacker may spend more, and whether the last doubling still paid off.

One figure at one budget bounds leakage from below only if a stronger attacker would not have got more. The check is the
paired difference between the last two budgets on the same victims: where the lower end of its interval over
identities exceeds a small tolerance, more budget still helps, and the run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.attack_stages import AttackStages
from bench.attempt import Attempt
from bench.budget import DATA, DOUBLING, Budget
from bench.judge import LEAKAGE
from bench.results import Measure, StrengthCurve, StrengthPoint

#: What the lower end of the interval of a gain must exceed. Below this nobody would call one attack stronger than
#: another: published tables differ by ten times as much between two runs of one attack.
RECOVERY_TOLERANCE: Mapping[str, float] = {"ssim": 0.005, "cosine": 0.01}
LINKAGE_TOLERANCE: Mapping[str, float] = {"accuracy": 0.005}


def spent(attacks: AttackStages, attempts: Sequence[Attempt], budget: Budget) -> list[float]:
    """What each attempt really spent: of ``data`` the number of faces, which whole identities make up."""
    if budget.axis == DATA:
        return [float(len(attacks.public(attempt))) for attempt in attempts]
    return list(budget.values)


def strength_curve(
    axis: str,
    budgets: Sequence[float],
    values: Sequence[Mapping[str, Measure]],
    gain: Callable[[str], Measure],
    tolerance: Mapping[str, float],
) -> StrengthCurve:
    """The curve through at least two budgets.

    Args:
        axis: what the budget counts.
        budgets: what was spent, rising.
        values: metric -> leakage, at each budget.
        gain: the paired difference between the last two points by one metric, higher for more leakage.
        tolerance: metric -> as :data:`RECOVERY_TOLERANCE`; its metrics are those that decide.
    """
    points = [StrengthPoint(budget=budget, values=dict(found)) for budget, found in zip(budgets, values, strict=True)]
    before, last = budgets[-2:]
    if last < DOUBLING * before:
        reason = f"the last two budgets, {before:g} and {last:g}, are less than a factor {DOUBLING:g} apart"
        gains = {name: Measure(value=None, higher_is_better_for=LEAKAGE, reason=reason) for name in tolerance}
    else:
        gains = {name: gain(name) for name in tolerance}
    return StrengthCurve(
        axis=axis,
        points=points,
        gain_of_last_doubling=gains,
        tolerance=dict(tolerance),
        unsaturated=_still_gains(gains, tolerance),
    )


def _still_gains(gains: Mapping[str, Measure], tolerance: Mapping[str, float]) -> bool | None:
    """Whether any metric gains more than its tolerance; None where none could be measured."""
    # Without an interval (every victim gains the same, or there is one victim) the value has to do.
    least = {
        name: measure.ci95[0] if measure.ci95 is not None else measure.value
        for name, measure in gains.items()
        if measure.value is not None
    }
    if not least:
        return None
    return any(value is not None and value > tolerance[name] for name, value in least.items())
