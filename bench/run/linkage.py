"""A run of a linkage attack: whether it tells who is who, beside what it can tell from plain faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from bench.data.faces import PairProtocol
from bench.errors import DataError
from bench.measures import KINDS
from bench.metrics.bootstrap import REPLICATES, mean_estimate, verification_differences
from bench.metrics.identity import Probes, identity_leakage
from bench.metrics.unlinkability import chance_level, choose_bins, unlinkability_estimate
from bench.metrics.verification import pair_scores
from bench.results import AttackResult, Linkage, Measure, StrengthCurve, Throughput
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages, Linked
from bench.run.config import Budget
from bench.run.findings import LINKAGE_TOLERANCE, Findings, about, attack_info, mark_unsaturated, spent, strength_curve
from bench.run.pictures import write_sheet
from bench.run.speed import linkage_speed
from bench.run.store import RunStore
from bench.run.verification import FARS, score_table, verification
from defenses.base import Defense


def linkage_scores(first: Tensor, second: Tensor, plain: Tensor, pairs: PairProtocol) -> dict[str, Tensor]:
    """Cosines of the pairs of a protocol, by what is compared; both sides of a pair never share a draw of the defence.

    Args:
        first: float (N, D), embeddings of every image as intercepted once.
        second: float (N, D), as intercepted once more, under states drawn anew.
        plain: float (N, D), of the plain images.
        pairs: P pairs over the N images.

    Returns:
        Of each pair (i, j), float32 (P,): ``protected_plain`` the first interception of i against the plain image j,
        ``protected_protected`` the first of i against the second of j, ``plain`` both as they are.

    Raises:
        DataError: shapes differ, or the protocol indexes images that have no embedding.
    """
    if first.ndim != 2 or not first.shape == second.shape == plain.shape:
        raise DataError(
            "a linkage attack embeds every image twice protected and once plain, (N, D) each, got "
            f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(plain.shape)}"
        )
    return {
        "protected_plain": _across(first, plain, pairs),
        "protected_protected": _across(first, second, pairs),
        "plain": pair_scores(plain, pairs),
    }


def assess_linkage(
    first: Tensor,
    second: Tensor,
    plain: Tensor,
    *,
    labels: Tensor,
    pairs: PairProtocol,
    probes: Probes,
    seed: int,
    replicates: int = REPLICATES,
    fars: Mapping[str, float] = FARS,
) -> Linkage:
    """How well an attack links, from its embeddings of all N victim images.

    Every figure starts its bootstrap at ``seed``: intervals rest on the same resampled people, so that conditions
    compare.

    Args:
        first, second, plain: float (N, D), as :func:`linkage_scores`.
        labels: int64 (N,), the person on each image.
        pairs: the victims' protocol.
        probes: the intercepted images that look for their person, and the plain images that stand for the people.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        fars: name in the result -> false acceptance rate.

    Raises:
        DataError: shapes differ, embeddings are not finite, or the protocol does not suit the labels.
    """
    scores = linkage_scores(first, second, plain, pairs)
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    verified = {
        name: verification(values, pairs, labels, draws(), replicates=replicates, fars=fars, linking=True)
        for name, values in scores.items()
    }
    d_sys = {
        name: KINDS["d_sys"].measure(
            unlinkability_estimate(scores[name], pairs.same, people, draws(), replicates=replicates)
        )
        for name in ("protected_protected", "protected_plain")
    }
    mated, non_mated = int(pairs.same.sum()), int((~pairs.same).sum())
    return Linkage(
        **verified,
        rank1=_rank1(first, plain, labels, probes, draws(), replicates),
        d_sys=d_sys,
        d_sys_chance=chance_level(choose_bins(mated, non_mated), mated, non_mated),
    )


def _across(one: Tensor, other: Tensor, pairs: PairProtocol) -> Tensor:
    """Cosines of ``one[pairs.first]`` and ``other[pairs.second]``."""
    shifted = PairProtocol(pairs.first, pairs.second + len(one), pairs.same, pairs.fold)
    if len(pairs) and int(pairs.first.max()) >= len(one):
        raise DataError(f"the verification pairs index beyond the {len(one)} embeddings")
    return pair_scores(torch.cat([one, other]), shifted)


def _rank1(
    first: Tensor, plain: Tensor, labels: Tensor, probes: Probes, generator: torch.Generator, replicates: int
) -> Measure:
    """Share of intercepted probes whose own person is the nearest in the plain gallery, among one image a person."""
    identities = labels[probes.attacked]
    leakage = identity_leakage(
        first[probes.attacked],
        plain[probes.attacked],
        identities,
        plain[probes.gallery],
        labels[probes.gallery],
        threshold=0.0,  # of acceptance, which is no part of a rank
    )
    return KINDS["linkage_rank1"].measure(mean_estimate(leakage.rank1, identities, generator, replicates=replicates))


#: Accuracy of guessing.
_CHANCE = 0.5


def run_linkage(
    attacks: AttackStages,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    defense: Defense,
    store: RunStore,
    *,
    several: bool,
    sheet: bool,
) -> Findings:
    """Let linkage attacks embed what was intercepted of the victims, and measure how well they tell them apart.

    The ceiling of such an attack is itself on plain faces: no other run is needed.

    Args:
        attacks: hands attacks what they may have, and runs them.
        attack_configs: by the attack's name, a configuration per budget; the last is the run's own.
        defense: the one attacked.
        store: takes the scores and the contact sheet.
        several: whether the run has other attacks, of any kind.
        sheet: whether to write the contact sheet.

    Raises:
        BenchError: an attack gave up, or was trained on less than what the defence emits.
    """
    stages, probes = attacks.stages, attacks.selection.attacked
    results: dict[str, AttackResult] = {}
    warnings: list[str] = []
    throughput: dict[str, Throughput] = {}
    tables: list[pd.DataFrame] = []
    for name, configs in attack_configs.items():
        info = attack_info(attacks, configs[-1], defense)
        linked = [attacks.linked(attack_config, defense) for attack_config in configs]
        with stages.timed("measure"):
            assessed = [_assess(attacks, embeddings) for embeddings in linked]
            strength = _strength(attacks, configs, linked, assessed) if attacks.config.budget else None
        info, unsaturated = mark_unsaturated(info, strength)
        results[name] = AttackResult(attack=info, linkage=assessed[-1], strength=strength)
        warnings += about(name, several, [*unsaturated, *_broken(assessed[-1])])
        pairs, last = stages.splits.pairs, linked[-1]
        scores = linkage_scores(last.first, last.second, last.plain, pairs)
        tables.append(score_table(pairs, scores).assign(attack=name))
        with stages.timed("throughput"):
            operation = f"link {name}" if several else "link"
            throughput[operation] = linkage_speed(attacks, configs[-1], defense, probes)
    store.write_table("linkage", pd.concat(tables, ignore_index=True))
    if sheet:
        sent = next(iter(attacks.interceptions(defense, probes, 2)))[1]
        write_sheet(attacks, defense, probes, {"sent again": sent[:, 1].float().cpu()}, (), store)
    return Findings(results, warnings=warnings, throughput=throughput)


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
    attacks: AttackStages, attack_configs: Sequence[AttackConfig], linked: Sequence[Linked], assessed: Sequence[Linkage]
) -> StrengthCurve:
    splits = attacks.stages.splits
    pairs, labels = splits.pairs, splits.victims.labels

    def gain(name: str) -> Measure:
        after, before = (
            linkage_scores(point.first, point.second, point.plain, pairs)["protected_plain"]
            for point in (linked[-1], linked[-2])
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
        return KINDS[name].measure({"linkage": differences.accuracy, "linkage_auc": differences.auc}[name])

    budget = Budget.parse(attacks.config.budget or "")
    leakage: list[Mapping[str, Measure]] = [
        {
            "linkage": point.protected_plain.accuracy,
            "linkage_auc": point.protected_plain.auc,
            "linkage_rank1": point.rank1,
        }
        for point in assessed
    ]
    return strength_curve(budget.axis, spent(attacks, attack_configs, budget), leakage, gain, LINKAGE_TOLERANCE)


def _broken(linkage: Linkage) -> list[str]:
    """A warning where the attack cannot even tell plain faces apart."""
    accuracy = linkage.plain.accuracy
    least = accuracy.ci95[0] if accuracy.ci95 else accuracy.value
    if least is not None and least > _CHANCE:
        return []
    return ["the attack cannot be told from guessing on plain faces: it is broken"]
