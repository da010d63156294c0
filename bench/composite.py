"""What a composite attack consists of: each member is run as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from attacks.base import CompositeAttack, RecoveryAttack
from bench.attempt import Attempt
from bench.checks import check_judge, check_needs
from bench.errors import UsageError


def members(attempt: Attempt) -> dict[str, Attempt]:
    """The attempts, by name, that ``attempt`` consists of: of a composite attack one per member, else itself alone.

    A member has the preset, the public faces and the interceptions of the whole.

    Raises:
        UsageError: unknown names, unknown or invalid options, or a member that recovers no faces.
    """
    attack = attempt.make()
    if not isinstance(attack, CompositeAttack):
        return {attempt.name: attempt}
    found = {name: replace(attempt, name=name, options=options) for name, options in attack.members()}
    for name, member in found.items():
        if not isinstance(member.make(), RecoveryAttack):
            raise UsageError(f"-a of {attempt.name}: {name} is no recovery attack, it cannot be compared face by face")
    return found


def check_attempt(attempt: Attempt, knowledge: str, evaluator: Path | None = None) -> None:
    """Refuse an attempt of which any part asks for what is not there, or for the file that is to judge it.

    Raises:
        UsageError: as :func:`members`, :func:`bench.checks.check_needs` and :func:`bench.checks.check_judge`.
    """
    for member in members(attempt).values():
        attack = member.make()
        check_needs(attack, knowledge)
        check_judge(attack, evaluator)
