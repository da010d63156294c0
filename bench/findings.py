"""What a run found out about an attack, whichever kind it is: the attack's side of the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.attack_stages import AttackStages
from bench.attempt import Attempt
from bench.checks import check_coverage
from bench.results import (
    AttackInfo,
    EvaluatorInfo,
    Linkage,
    Recovery,
    StateInference,
    StrengthCurve,
    Throughput,
)
from defenses.base import Defense

UNSATURATED = "unsaturated: the attack was still improving when its budget ended; its figure is a lower bound"


@dataclass(frozen=True)
class Findings:
    """See the fields of :class:`bench.results.RunResult` of the same names."""

    attack: AttackInfo
    warnings: list[str] = field(default_factory=list)
    evaluator: EvaluatorInfo | None = None
    recovery: Recovery | None = None
    linkage: Linkage | None = None
    state_inference: StateInference | None = None
    strength: StrengthCurve | None = None
    throughput: dict[str, Throughput] = field(default_factory=dict)


def attack_info(attacks: AttackStages, attempt: Attempt, defense: Defense, **details: Any) -> AttackInfo:
    """What a fitted attack says of itself.

    Args:
        attacks: fits it, or reads the fit.
        attempt: of one attack, not a composite one.
        defense: the one attacked.
        details: more to keep; None is left out.

    Raises:
        BenchError: the states it was trained on do not cover those of the defence.
    """
    attack, report = attacks.fitted(attempt, defense)
    knowledge = attacks.config.knowledge
    return AttackInfo(
        name=attempt.name,
        options=attack.options.model_dump(mode="json"),
        knowledge=knowledge,
        saturated=report.saturated,
        states_covered=check_coverage(report, defense, knowledge),
        curve=list(report.curve),
        details={**report.details, **{name: value for name, value in details.items() if value is not None}},
    )


def composite_info(attempt: Attempt, knowledge: str, members: dict[str, AttackInfo]) -> AttackInfo:
    """What a composite attack is: no better trained than the least of its members."""
    return AttackInfo(
        name=attempt.name,
        options=attempt.make().options.model_dump(mode="json"),
        knowledge=knowledge,
        saturated=_all(info.saturated for info in members.values()),
        states_covered=_all(info.states_covered for info in members.values()),
        members=members,
    )


def weigh(info: AttackInfo, strength: StrengthCurve | None) -> tuple[AttackInfo, list[str]]:
    """Mark an attack as unsaturated where its own report or its strength curve says so, with the warnings."""
    warnings = []
    if info.saturated is False:
        late = [name for name, member in info.members.items() if member.saturated is False]
        warnings.append(f"{UNSATURATED} ({', '.join(late)})" if late else UNSATURATED)
    if strength is not None and strength.unsaturated:
        gains = ", ".join(
            f"{name} {measure.value:+.3f}"
            for name, measure in strength.gain_of_last_doubling.items()
            if measure.value is not None
        )
        warnings.append(f"unsaturated in {strength.axis}: the last doubling still gained ({gains}); a lower bound")
        info = info.model_copy(update={"saturated": False})
    return info, warnings


def _all(values: Iterable[bool | None]) -> bool | None:
    found = set(values)
    return False if False in found else None if None in found else True
