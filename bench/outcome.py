"""What one attempt gets out of one defence; of a composite attack, victim by victim, the worst of its members."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.attack_stages import AttackStages, Recovered
from bench.attempt import Attempt
from bench.composite import members
from bench.judge import Assessment, Judge
from defenses.base import Defense


@dataclass(frozen=True)
class Outcome:
    """Recovered faces, judged.

    Attributes:
        assessment: of a composite attack the pointwise worst case.
        faces: float32 (V, 3, H, W), for looking at; of a composite attack each victim's under ``best``.
        recovered: all that the attack gave back; None of a composite one.
        members: name -> outcome, of a composite attack.
        best: of a composite attack, per victim, the member with the highest SSIM.
    """

    assessment: Assessment
    faces: Tensor
    recovered: Recovered | None = None
    members: dict[str, Outcome] = field(default_factory=dict)
    best: tuple[str, ...] = ()

    @property
    def right(self) -> list[Tensor]:
        """The channels put in their place, bool (V, k, C), of every attack that inferred places."""
        found = [self.recovered, *(member.recovered for member in self.members.values())]
        return [one.right for one in found if one is not None and one.right is not None]


def outcome(attacks: AttackStages, judge: Judge, attempt: Attempt, defense: Defense, probes: Tensor) -> Outcome:
    """Recover the victim images ``probes`` from ``defense`` and judge the faces."""
    found = {}
    for name, member in members(attempt).items():
        recovered = attacks.recovered(member, defense, probes)
        found[name] = Outcome(judge.assess(recovered.faces), recovered.faces, recovered)
    if set(found) == {attempt.name}:
        return found[attempt.name]
    names = tuple(found)
    best = torch.stack([one.assessment.values["ssim"] for one in found.values()]).argmax(dim=0)
    faces = torch.stack([one.faces for one in found.values()])[best, torch.arange(len(probes))]
    worst = judge.worst([one.assessment for one in found.values()])
    return Outcome(worst, faces, members=found, best=tuple(names[i] for i in best.tolist()))
