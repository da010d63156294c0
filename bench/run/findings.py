"""What a run found out about an attack, whichever kind it is: the attack's side of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.results import (
    AttackInfo,
    AttackResult,
    EvaluatorInfo,
    Measure,
    Recovery,
    StrengthCurve,
    StrengthPoint,
    Throughput,
)
from bench.run.attack_config import AttackConfig, check_coverage
from bench.run.attacker import AttackStages
from bench.run.config import DATA, DOUBLING, Budget
from defenses.base import Defense

UNSATURATED = "unsaturated: the attack was still improving when its budget ended; its figure is a lower bound"


@dataclass(frozen=True)
class Findings:
    """What a run found out about its attacks of one kind.

    Attributes:
        results: by the attack's name.
        worst_case: of several recovery attacks, per victim and figure the value under the one from which most leaks.
        evaluator: the recogniser that scored identities, if one did.
        warnings: for the result, each naming the attack that it is about where there are several.
        throughput: operation -> speed.
    """

    results: dict[str, AttackResult]
    worst_case: Recovery | None = None
    evaluator: EvaluatorInfo | None = None
    warnings: list[str] = field(default_factory=list)
    throughput: dict[str, Throughput] = field(default_factory=dict)


def attack_info(attacks: AttackStages, attack_config: AttackConfig, defense: Defense, **details: Any) -> AttackInfo:
    """What a fitted attack says of itself.

    Args:
        attacks: fits it, or reads the fit.
        attack_config: the attack.
        defense: the one attacked.
        details: more to keep; None is left out.

    Raises:
        BenchError: the states it was trained on do not cover those of the defence.
    """
    attack, report = attacks.fitted(attack_config, defense)
    knowledge = attacks.config.knowledge
    return AttackInfo(
        name=attack_config.name,
        options=attack.options.model_dump(mode="json"),
        knowledge=knowledge,
        saturated=report.saturated,
        states_covered=check_coverage(report, defense, knowledge),
        curve=list(report.curve),
        details={**report.details, **{name: value for name, value in details.items() if value is not None}},
    )


def mark_unsaturated(info: AttackInfo, strength: StrengthCurve | None) -> tuple[AttackInfo, list[str]]:
    """Mark an attack as unsaturated where its own report or its strength curve says so, with the warnings."""
    warnings = [UNSATURATED] if info.saturated is False else []
    if strength is not None and strength.unsaturated:
        gains = ", ".join(
            f"{name} {measure.value:+.3f}"
            for name, measure in strength.gain_of_last_doubling.items()
            if measure.value is not None
        )
        warnings.append(f"unsaturated in {strength.axis}: the last doubling still gained ({gains}); a lower bound")
        info = info.model_copy(update={"saturated": False})
    return info, warnings


def about(name: str, several: bool, warnings: Iterable[str]) -> list[str]:
    """Warnings about one attack of a run, which name it where there are several."""
    return [f"{name}: {warning}" if several else warning for warning in warnings]


#: What the lower end of the interval of a gain must exceed. Below this nobody would call one attack stronger than
#: another: published tables differ by ten times as much between two runs of one attack.
RECOVERY_TOLERANCE: Mapping[str, float] = {"ssim": 0.005, "cosine": 0.01}
LINKAGE_TOLERANCE: Mapping[str, float] = {"linkage": 0.005}


def spent(attacks: AttackStages, attack_configs: Sequence[AttackConfig], budget: Budget) -> list[float]:
    """What each configuration really spent: of ``data`` the number of faces, which whole identities make up."""
    if budget.axis == DATA:
        return [float(len(attacks.public(attack_config))) for attack_config in attack_configs]
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
        gains = {name: Measure(value=None, direction="leakage", reason=reason) for name in tolerance}
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
