"""A run of a linkage attack: whether it tells who is who, beside what it can tell from plain faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bench.attack_stages import AttackStages, Linked
from bench.attempt import Attempt
from bench.budget import Budget
from bench.findings import Findings, attack_info, weigh
from bench.judge import LEAKAGE, to_measure
from bench.linkage import assess_linkage, linkage_scores
from bench.metrics.bootstrap import verification_differences
from bench.results import Linkage, Measure, StrengthCurve
from bench.samples import write_sheet
from bench.speed import linkage_speed
from bench.store import RunStore
from bench.strength import LINKAGE_TOLERANCE, spent, strength_curve
from bench.utility import score_table
from defenses.base import Defense

#: Accuracy of guessing.
_CHANCE = 0.5


def run_linkage(
    attacks: AttackStages, attempts: Sequence[Attempt], defense: Defense, plain: Defense, store: RunStore
) -> Findings:
    """Let a linkage attack embed what was intercepted of the victims, and measure how well it tells them apart.

    Its ceiling is itself on plain faces: no other run is needed, and ``plain`` is not used.

    Args:
        attacks: hands the attack what it may have, and runs it.
        attempts: one per budget; the last is the run's own.
        defense: the one attacked.
        plain: the defence that does nothing.
        store: takes the contact sheet.

    Raises:
        BenchError: the attack gave up, or was trained on less than what the defence emits.
    """
    stages, own = attacks.stages, attempts[-1]
    probes = attacks.selection.attacked
    info = attack_info(attacks, own, defense)
    found = [attacks.linked(attempt, defense) for attempt in attempts]
    with stages.timed("measure"):
        assessed = [_assess(attacks, linked) for linked in found]
        strength = _strength(attacks, attempts, found, assessed) if attacks.config.budget else None
    info, warnings = weigh(info, strength)
    pairs = stages.splits.pairs
    scores = linkage_scores(found[-1].first, found[-1].second, found[-1].plain, pairs)
    store.write_table("linkage", score_table(pairs, scores))
    _, representations, _ = next(iter(attacks.interceptions(defense, probes, 2)))
    write_sheet(attacks, defense, probes, {"sent again": representations[:, 1].float().cpu()}, (), store)
    with stages.timed("throughput"):
        throughput = {"link": linkage_speed(attacks, own, defense, probes)}
    return Findings(
        attack=info,
        warnings=[*warnings, *_broken(assessed[-1])],
        linkage=assessed[-1],
        strength=strength,
        throughput=throughput,
    )


def _assess(attacks: AttackStages, linked: Linked) -> Linkage:
    splits = attacks.stages.splits
    return assess_linkage(
        linked.first,
        linked.second,
        linked.plain,
        labels=splits.victims.labels,
        pairs=splits.pairs,
        probes=attacks.selection,
        seed=attacks.streams.seed_for("bootstrap"),
        replicates=attacks.config.bootstrap,
    )


def _strength(
    attacks: AttackStages, attempts: Sequence[Attempt], found: Sequence[Linked], assessed: Sequence[Linkage]
) -> StrengthCurve:
    splits = attacks.stages.splits
    pairs, labels = splits.pairs, splits.victims.labels

    def gain(name: str) -> Measure:
        after, before = (
            linkage_scores(linked.first, linked.second, linked.plain, pairs)["protected_plain"]
            for linked in (found[-1], found[-2])
        )
        differences = verification_differences(
            after,
            before,
            pairs.same,
            pairs.fold,
            torch.stack([labels[pairs.first], labels[pairs.second]], dim=1),
            attacks.streams.generator("bootstrap"),
            replicates=attacks.config.bootstrap,
        )
        return to_measure(getattr(differences, name), LEAKAGE)

    budget = Budget.parse(attacks.config.budget or "")
    leakage: list[Mapping[str, Measure]] = [
        {"accuracy": one.protected_plain.accuracy, "auc": one.protected_plain.auc, "rank1": one.rank1}
        for one in assessed
    ]
    return strength_curve(budget.axis, spent(attacks, attempts, budget), leakage, gain, LINKAGE_TOLERANCE)


def _broken(linkage: Linkage) -> list[str]:
    """A warning where the attack cannot even tell plain faces apart."""
    accuracy = linkage.plain.accuracy
    least = accuracy.ci95[0] if accuracy.ci95 else accuracy.value
    if least is not None and least > _CHANCE:
        return []
    return ["the attack cannot be told from guessing on plain faces: it is broken"]
