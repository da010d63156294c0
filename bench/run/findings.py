"""What a run finds out about its attacks, whichever kind they are: the attacks' side of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

Point = TypeVar("Point")


@dataclass
class Findings:
    """What a run found out about its attacks.

    Attributes:
        several: whether there are several attacks: warnings and speeds then say which one they are about.
        results: by the attack's name.
        worst_case: of several recovery attacks, per victim and figure the value under the one from which most leaks.
        evaluator: the recogniser that scored identities, if one did.
        warnings: for the result.
        throughput: operation -> speed.
    """

    several: bool
    results: dict[str, AttackResult] = field(default_factory=dict)
    worst_case: Recovery | None = None
    evaluator: EvaluatorInfo | None = None
    warnings: list[str] = field(default_factory=list)
    throughput: dict[str, Throughput] = field(default_factory=dict)

    def add(
        self,
        info: AttackInfo,
        strength: StrengthCurve | None,
        warnings: Sequence[str],
        speed: Mapping[str, Throughput],
        **figures: Any,
    ) -> None:
        """Take in one attack, marked as unsaturated where its own report or its strength curve says so."""
        unsaturated = []
        if info.saturated is False:
            unsaturated.append(
                "unsaturated: the attack was still improving when its budget ended; its figure is a lower bound"
            )
        if strength is not None and strength.unsaturated:
            gains = ", ".join(
                f"{name} {measure.value:+.3f}"
                for name, measure in strength.gain_of_last_doubling.items()
                if measure.value is not None
            )
            unsaturated.append(
                f"unsaturated in {strength.axis}: the last doubling still gained ({gains}); a lower bound"
            )
            info = info.model_copy(update={"saturated": False})
        name = info.name
        self.results[name] = AttackResult(attack=info, strength=strength, **figures)
        self.warnings += [f"{name}: {warning}" if self.several else warning for warning in (*unsaturated, *warnings)]
        self.throughput |= {f"{operation} {name}" if self.several else operation: t for operation, t in speed.items()}


def attack_info(attacks: AttackStages, attack_config: AttackConfig, defense: Defense) -> AttackInfo:
    """What a fitted attack says of itself.

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
        details=dict(report.details),
    )


#: What the lower end of the interval of a gain must exceed. Below this nobody would call one attack stronger than
#: another: published tables differ by ten times as much between two runs of one attack.
RECOVERY_TOLERANCE: Mapping[str, float] = {"ssim": 0.005, "cosine": 0.01}
LINKAGE_TOLERANCE: Mapping[str, float] = {"linkage": 0.005}


def strength_curve(
    attacks: AttackStages,
    attack_configs: Sequence[AttackConfig],
    points: Sequence[Point],
    leakage: Callable[[Point], Mapping[str, Measure]],
    gain: Callable[[str, Point, Point], Measure],
    tolerance: Mapping[str, float],
) -> StrengthCurve | None:
    """The curve through the budgets of an attack; None of a run without budgets.

    Args:
        attacks: knows the run, and the faces that a budget pays for.
        attack_configs: one per budget, rising.
        points: what the attack got at each budget.
        leakage: metric -> leakage at a point.
        gain: the paired difference by one metric from its third argument to its second, higher for more leakage.
        tolerance: metric -> as :data:`RECOVERY_TOLERANCE`; its metrics are those that decide.
    """
    if attacks.config.budget is None:
        return None
    budget = Budget.parse(attacks.config.budget)
    spent: Sequence[float] = budget.values
    if budget.axis == DATA:  # the number of faces, which whole identities make up
        spent = [float(len(attacks.public(attack_config))) for attack_config in attack_configs]
    before, last = spent[-2:]
    if last < DOUBLING * before:
        reason = f"the last two budgets, {before:g} and {last:g}, are less than a factor {DOUBLING:g} apart"
        gains = {name: Measure(value=None, direction="leakage", reason=reason) for name in tolerance}
    else:
        gains = {name: gain(name, points[-1], points[-2]) for name in tolerance}
    # Without an interval (every victim gains the same, or there is one victim) the value has to do.
    least = {name: measure.ci95[0] if measure.ci95 else measure.value for name, measure in gains.items()}
    sure = {name: value for name, value in least.items() if value is not None}
    return StrengthCurve(
        axis=budget.axis,
        points=[StrengthPoint(budget=s, values=dict(leakage(point))) for s, point in zip(spent, points, strict=True)],
        gain_of_last_doubling=gains,
        tolerance=dict(tolerance),
        unsaturated=any(value > tolerance[name] for name, value in sure.items()) if sure else None,
    )
