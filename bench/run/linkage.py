"""Whether an attack tells who is who, beside what can be told from plain faces: by itself, or by what it recovers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from bench.data.faces import PairProtocol
from bench.errors import DataError
from bench.measures import KINDS, Estimate
from bench.metrics.bootstrap import REPLICATES, mean_estimate, verification_estimates
from bench.metrics.identity import Probes, identity_leakage
from bench.metrics.unlinkability import chance_level, choose_bins, unlinkability_estimate
from bench.metrics.verification import pair_scores
from bench.results import Linkage, Measure, Verification
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages
from bench.run.findings import LINKAGE_TOLERANCE, Findings, attack_info, chance_test, strength_curve
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
    if len(pairs) and int(pairs.first.max()) >= len(first):
        raise DataError(f"the verification pairs index beyond the {len(first)} embeddings")
    across = replace(pairs, second=pairs.second + len(first))
    return {
        "protected_plain": pair_scores(torch.cat([first, plain]), across),
        "protected_protected": pair_scores(torch.cat([first, second]), across),
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
    guessed: str | None = None,
) -> Linkage:
    """How well an attack links, from its embeddings of all N victim images.

    ``rank1`` is the share of intercepted probes whose own person is the nearest in the plain gallery, among
    one image a person.

    Args:
        first, second, plain: float (N, D), as :func:`linkage_scores`.
        labels: int64 (N,), the person on each image.
        pairs: the victims' protocol.
        probes: the intercepted images that look for their person, and the plain images that stand for the people.
        seed, replicates: of the bootstrap of ``rank1``.
        guessed: why nobody can be looked up (:attr:`bench.data.faces.Source.guessed`): ``rank1`` is null.

    Raises:
        DataError: shapes differ, embeddings are not finite, or the protocol does not suit the labels.
    """
    scores = linkage_scores(first, second, plain, pairs)
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
    verified = {name: verification(values, pairs, labels, linking=True) for name, values in scores.items()}
    d_sys = {
        name: KINDS["d_sys"].measure(unlinkability_estimate(scores[name], pairs.same, people))
        for name in ("protected_protected", "protected_plain")
    }
    identities = labels[probes.attacked]
    leakage = identity_leakage(
        first[probes.attacked],
        plain[probes.attacked],
        identities,
        plain[probes.gallery],
        labels[probes.gallery],
        threshold=0.0,  # of acceptance, which is no part of a rank
    )
    draws = torch.Generator().manual_seed(seed)
    rank1 = mean_estimate(leakage.rank1, identities, draws, replicates=replicates)
    if guessed is not None:
        rank1 = Estimate(None, None, 0, guessed)
    mated, non_mated = int(pairs.same.sum()), int((~pairs.same).sum())
    return Linkage(
        **verified,
        rank1=KINDS["linkage_rank1"].measure(rank1),
        d_sys=d_sys,
        d_sys_chance=chance_level(choose_bins(mated, non_mated), mated, non_mated),
    )


#: Pairs of recovered and plain faces at most: of one person for each recovered face, and of two people in all.
_GENUINE_PER_FACE = 10
_IMPOSTORS = 4_000
#: By their people, recovered faces are shared out to so many folds, as LFW's are.
_FOLDS = 10
_ONE_RECOVERY = "each face is recovered once, from all that was intercepted of it: use --attack linkage"


def recovered_pairs(
    probes: Probes,
    labels: Tensor,
    content: Tensor,
    protocol: PairProtocol,
    generator: torch.Generator,
    *,
    guessed: bool,
) -> PairProtocol:
    """Pairs of a recovered face and a plain image: ``first`` are attacked images, ``second`` others of the victims.

    Genuine pairs are with other images of the person, a copy of the attacked one not among them. Impostor pairs are
    with images of other people, drawn at random; where people are ``guessed`` one of them may stand there under two
    names, and only those count of which the protocol says so. An attacked person's pairs are all in one fold.

    Args:
        probes: which images are attacked.
        labels: int64 (N,), the person on each image.
        content: int64 (N,), equal where two images are equal.
        protocol: the victims' pairs.
        generator: draws the pairs.
        guessed: whether people are.
    """
    attacked = probes.attacked
    person = torch.unique(labels[attacked], return_inverse=True)[1]
    others = (labels[attacked, None] == labels) & (content[attacked, None] != content)
    first, second = [], []
    for place, row in enumerate(others):
        images = row.nonzero().flatten()
        second.append(images[torch.randperm(len(images), generator=generator)[:_GENUINE_PER_FACE]])
        first.append(torch.full_like(second[-1], place))
    genuine = sum(map(len, first))
    if guessed:
        different = ~protocol.same
        ends = torch.stack((protocol.first[different], protocol.second[different]))
        for one, other in (ends, ends.flip(0)):
            place, number = (attacked[:, None] == one).nonzero(as_tuple=True)
            first.append(place)
            second.append(other[number])
    else:
        places = torch.arange(len(attacked)).repeat_interleave(-(-_IMPOSTORS // len(attacked)))
        images = torch.randint(len(labels), (len(places),), generator=generator)
        drawn = torch.unique(torch.stack((places, images)), dim=1)
        drawn = drawn[:, labels[attacked[drawn[0]]] != labels[drawn[1]]]
        first.append(drawn[0])
        second.append(drawn[1])
    places, images = torch.cat(first), torch.cat(second)
    return PairProtocol(attacked[places], images, torch.arange(len(places)) < genuine, person[places] % _FOLDS)


def assess_recovered(
    recovered: Tensor,
    plain: Tensor,
    *,
    judge: str,
    labels: Tensor,
    pairs: PairProtocol,
    probes: Probes,
    rank1: Measure,
    seed: int,
) -> Linkage:
    """How well a judge links recovered faces with plain ones, beside the same pairs unprotected.

    Accuracy is that on as many pairs of one kind as of the other, so that guessing gets half of them right.

    Args:
        recovered: float (V, D), its embeddings of the recovered faces.
        plain: float (N, D), of all plain images of the victims.
        judge: its name.
        labels: int64 (N,), the person on each image.
        pairs: as :func:`recovered_pairs`.
        probes: which images were attacked.
        rank1: of the recovered faces among the plain gallery.
        seed: of the choice of as many pairs of one kind as of the other.

    Raises:
        DataError: shapes differ, or embeddings are not finite.
    """
    genuine = int(pairs.same.sum())
    if not 0 < genuine < len(pairs) or len(torch.unique(pairs.fold)) < 2:
        counted = f"{genuine} pairs of one person and {len(pairs) - genuine} of two"
        return no_linkage(f"recovered and plain faces make {counted}: too few to tell apart", judge=judge)
    seen = plain.clone()
    seen[probes.attacked] = recovered.to(plain)
    across = replace(pairs, second=pairs.second + len(plain))
    scores = {"protected_plain": pair_scores(torch.cat((seen, plain)), across), "plain": pair_scores(plain, pairs)}

    kinds = [mask.nonzero().flatten() for mask in (pairs.same, ~pairs.same)]
    least, shuffle = min(map(len, kinds)), torch.Generator().manual_seed(seed)
    even = torch.cat([kind[torch.randperm(len(kind), generator=shuffle)[:least]] for kind in kinds])
    halves = PairProtocol(*(column[even] for column in (pairs.first, pairs.second, pairs.same, pairs.fold)))
    verified = {}
    for name, values in scores.items():
        whole, half = (
            verification(of, part, labels, linking=True) for of, part in ((values, pairs), (values[even], halves))
        )
        verified[name] = whole.model_copy(update={"accuracy": half.accuracy, "accuracy_std": half.accuracy_std})
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
    d_sys = unlinkability_estimate(scores["protected_plain"], pairs.same, people)
    counts = genuine, len(pairs) - genuine
    return Linkage(
        **verified,
        protected_protected=_no_pairs(_ONE_RECOVERY),
        rank1=rank1,
        d_sys={"protected_plain": KINDS["d_sys"].measure(d_sys)},
        d_sys_chance=chance_level(choose_bins(*counts), *counts),
        judge=judge,
    )


def no_linkage(reason: str, *, judge: str | None = None) -> Linkage:
    """Linkage of which nothing can be said, and why."""
    nothing = _no_pairs(reason)
    return Linkage(
        protected_plain=nothing,
        protected_protected=nothing,
        plain=nothing,
        rank1=_null("linkage_rank1", reason),
        d_sys={"protected_plain": _null("d_sys", reason)},
        judge=judge,
    )


def _no_pairs(reason: str) -> Verification:
    return Verification(
        accuracy=_null("linkage", reason),
        auc=_null("linkage_auc", reason),
        eer=_null("linkage_eer", reason),
        tar_at_far={far: _null("linkage_tar_at_far", reason) for far in FARS},
        pairs=0,
    )


def _null(figure: str, reason: str) -> Measure:
    return Measure(value=None, direction=KINDS[figure].direction, reason=reason)


#: What an attack got with one budget: the scores of the pairs, and their assessment.
_Point = tuple[dict[str, Tensor], Linkage]


def run_linkage(
    attacks: AttackStages,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    defense: Defense,
    store: RunStore,
    findings: Findings,
    *,
    sheet: bool,
) -> None:
    """Let linkage attacks embed what was intercepted of the victims, and measure how well they tell them apart.

    The ceiling of such an attack is itself on plain faces: no other run is needed.

    Args:
        attacks: hands attacks what they may have, and runs them.
        attack_configs: by the attack's name, a configuration per budget; the last is the run's own.
        defense: the one attacked.
        store: takes the scores and the contact sheet.
        findings: take what was found out.
        sheet: whether to write the contact sheet.

    Raises:
        BenchError: an attack gave up, or was trained on less than what the defence emits.
    """
    stages, config = attacks.stages, attacks.config
    pairs, labels = stages.splits.pairs, stages.splits.victims.labels
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)

    def assess(attack_config: AttackConfig) -> _Point:
        linked = attacks.linked(attack_config, defense)
        return linkage_scores(*linked, pairs), assess_linkage(
            *linked,
            labels=labels,
            pairs=pairs,
            probes=attacks.selection,
            seed=attacks.streams.seed_for("bootstrap"),
            replicates=config.bootstrap,
            guessed=stages.guessed,
        )

    def gain(name: str, after: _Point, before: _Point) -> Measure:
        differences = verification_estimates(
            after[0]["protected_plain"],
            pairs.same,
            pairs.fold,
            people,
            minus=before[0]["protected_plain"],
        )
        return KINDS[name].measure({"linkage": differences.accuracy, "linkage_auc": differences.auc}[name])

    tables: list[pd.DataFrame] = []
    for name, configs in attack_configs.items():
        with findings.surviving(name):
            info = attack_info(attacks, configs[-1], defense)
            for attack_config in configs:
                attacks.linked(attack_config, defense)
        if name in findings.failed:
            continue
        with stages.timed("measure", f"measure how well {name} links", step=True):
            points = [assess(attack_config) for attack_config in configs]
            scores, linkage = points[-1]
            strength = strength_curve(attacks, configs, points, _leakage, gain, LINKAGE_TOLERANCE)
        tables.append(score_table(pairs, scores).assign(attack=name))
        with stages.timed("throughput", f"time {name}"):
            speed = {"link": linkage_speed(attacks, configs[-1], defense)}
        over, over_plain = (chance_test(_accuracy(pairs)) for pairs in (linkage.protected_plain, linkage.plain))
        opens, canary = configs[-1].make().opens, defense.canary
        findings.add(info, strength, over, over_plain, speed, opens=opens, canary=canary, linkage=linkage)
    if not tables:
        return
    store.write_table("linkage", pd.concat(tables, ignore_index=True))
    if sheet:
        sent = next(iter(attacks.interceptions(defense, attacks.selection.attacked, 2)))[1]
        write_sheet(attacks, defense, {"sent again": sent[:, 1].float().cpu()}, (), store)


def _leakage(point: _Point) -> Mapping[str, Measure]:
    """The figures of a strength curve."""
    _, linkage = point
    verified = linkage.protected_plain
    return {"linkage": verified.accuracy, "linkage_auc": verified.auc, "linkage_rank1": linkage.rank1}


def _accuracy(verified: Verification) -> Mapping[str, Measure]:
    """What has to be better than guessing."""
    return {"linkage": verified.accuracy, "linkage_auc": verified.auc}
