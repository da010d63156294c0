"""What must hold of an attack before any compute, and before its number is reported."""

from __future__ import annotations

from pathlib import Path

from attacks.base import GRANTS, Attack, FitReport, Knowledge
from bench.errors import BenchError, UsageError
from bench.files import sha256
from defenses.base import Defense


def check_needs(attack: Attack | type[Attack], knowledge: str) -> None:
    """Refuse an attack that needs what the chosen rung does not grant.

    Raises:
        UsageError: naming what is missing and the rungs that would do.
    """
    missing = attack.needs - GRANTS[Knowledge(knowledge)]
    if missing:
        enough = ", ".join(rung for rung, grants in GRANTS.items() if attack.needs <= grants)
        raise UsageError(
            f"attack {attack.name} needs {', '.join(sorted(missing))}, which --knowledge {knowledge} does not grant: "
            f"use --knowledge {enough or 'of another attack'}"
        )


def check_judge(attack: Attack, evaluator: Path | None) -> None:
    """Refuse an attack that was given the file of the recogniser which is to judge it, under whatever name.

    Raises:
        UsageError: naming the option.
    """
    if evaluator is None or not evaluator.is_file():
        return
    for option, value in attack.options:
        if isinstance(value, Path) and value.is_file() and sha256(value) == sha256(evaluator):
            raise UsageError(
                f"-a {option}={value} is the evaluator: the recogniser that judges leakage may not be one that the "
                f"attack has used; give the attack, or --evaluator, another one"
            )


def check_coverage(report: FitReport, defense: Defense, knowledge: str) -> bool | None:
    """Whether the states that the attack was trained on cover what the defence emits.

    None where there are no states to cover, or where the attacker guesses the secret: the states of a
    guessed table are not those of the real one.

    Raises:
        BenchError: they do not: the number would be that of an attacker who was mis-driven.
    """
    states = defense.states()
    if states is None or report.states_seen is None or knowledge == Knowledge.BLACKBOX:
        return None
    seen = {tuple(state) for state in report.states_seen.tolist()}
    unseen = [tuple(state) for state in states.tolist() if tuple(state) not in seen]
    if unseen:
        raise BenchError(
            f"the attack was trained on {len(seen)} of the {len(states)} states that {defense.name} emits "
            f"(never on {unseen[0]}): train it longer, its figure would be too kind to the defence"
        )
    return True
