"""Judging a linkage attack: which embeddings meet in which pairs, and what comes of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bench.data.faceset import PairProtocol
from bench.data.pairs import draw_pairs
from bench.errors import DataError
from bench.linkage import assess_linkage, linkage_scores
from bench.metrics.bootstrap import verification_estimates
from bench.metrics.unlinkability import unlinkability
from bench.metrics.verification import lfw_accuracy
from bench.probes import Probes
from bench.results import Linkage
from bench.verification_result import FARS, verification

PEOPLE, EACH, WIDTH = 24, 4, 16
LABELS = torch.arange(PEOPLE).repeat_interleave(EACH)
PROBES = Probes(attacked=torch.arange(0, PEOPLE * EACH, EACH), gallery=torch.arange(1, PEOPLE * EACH, EACH))


def embeddings(noise: float, seed: int) -> torch.Tensor:
    """Unit rows: a direction of each person's own, plus noise of that relative size."""
    person = torch.randn(PEOPLE, WIDTH, generator=torch.Generator().manual_seed(99))[LABELS]
    return functional.normalize(
        person + noise * torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1
    )


@pytest.fixture(scope="module")
def pairs() -> PairProtocol:
    return draw_pairs(LABELS, torch.Generator().manual_seed(0))


def assess(pairs: PairProtocol, first: float, second: float, plain: float, **options) -> Linkage:
    return assess_linkage(
        embeddings(first, 1),
        embeddings(second, 2),
        embeddings(plain, 3),
        labels=LABELS,
        pairs=pairs,
        probes=PROBES,
        **{"seed": 5, "replicates": 40} | options,
    )


def test_each_kind_of_pair_compares_what_it_says(pairs: PairProtocol) -> None:
    first, second, plain = (torch.randn(len(LABELS), 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scores = linkage_scores(first, second, plain, pairs)
    sides = {"protected_plain": (first, plain), "protected_protected": (first, second), "plain": (plain, plain)}
    assert scores.keys() == sides.keys()
    for name, (one, other) in sides.items():
        expected = functional.cosine_similarity(one[pairs.first], other[pairs.second])
        torch.testing.assert_close(scores[name], expected)


def test_perfect_embeddings_link_everything(pairs: PairProtocol) -> None:
    result = assess(pairs, 0.05, 0.05, 0.05)
    for part in (result.protected_plain, result.protected_protected, result.plain):
        assert part.accuracy.value == 1
        assert part.eer.value == 0
    assert result.rank1.value == 1
    assert result.d_sys["protected_protected"].value == 1
    assert result.d_sys["protected_plain"].value == 1


def test_embeddings_of_nothing_link_nothing(pairs: PairProtocol) -> None:
    result = assess(pairs, 1e3, 1e3, 0.05)
    for part in (result.protected_plain, result.protected_protected):
        assert part.auc.value == pytest.approx(0.5, abs=0.12)
    assert result.plain.accuracy.value == 1
    assert result.rank1.value is not None
    assert result.rank1.value < 0.2
    assert all(d.value is not None and d.value < 0.3 for d in result.d_sys.values())


def test_figures_are_those_of_the_metrics(pairs: PairProtocol) -> None:
    result = assess(pairs, 1.0, 1.2, 0.8)
    scores = linkage_scores(embeddings(1.0, 1), embeddings(1.2, 2), embeddings(0.8, 3), pairs)
    for name, values in scores.items():
        part = getattr(result, name)
        assert part.accuracy.value == lfw_accuracy(values, pairs.same, pairs.fold).mean
        assert part.pairs == len(pairs)
    for name, measure in result.d_sys.items():
        assert measure.value == unlinkability(scores[name], pairs.same).d_sys
    similarity = embeddings(1.0, 1)[PROBES.attacked] @ embeddings(0.8, 3)[PROBES.gallery].T
    hits = (similarity.argmax(dim=1) == torch.arange(PEOPLE)).float().mean()
    assert result.rank1.value == pytest.approx(float(hits))
    assert result.rank1.n == PEOPLE


def test_more_linkage_suits_the_attacker_in_every_figure(pairs: PairProtocol) -> None:
    result = assess(pairs, 1.0, 1.0, 1.0)
    assert result.rank1.higher_is_better_for == "utility"
    assert {measure.higher_is_better_for for measure in result.d_sys.values()} == {"utility"}
    assert result.protected_plain.auc.higher_is_better_for == "utility"
    assert result.protected_plain.eer.higher_is_better_for == "privacy"


def test_intervals_rest_on_the_same_people_and_on_the_seed(pairs: PairProtocol) -> None:
    one = assess_linkage(*(embeddings(1.0, 1),) * 3, labels=LABELS, pairs=pairs, probes=PROBES, seed=5, replicates=40)
    assert one.plain == one.protected_plain == one.protected_protected
    assert one.plain.accuracy.ci95 is not None
    assert assess(pairs, 1.0, 1.0, 1.0) == assess(pairs, 1.0, 1.0, 1.0)
    assert assess(pairs, 1.0, 1.0, 1.0) != assess(pairs, 1.0, 1.0, 1.0, seed=6)


def test_a_verification_result_holds_the_estimates(pairs: PairProtocol) -> None:
    scores = linkage_scores(*(embeddings(1.0, i) for i in (1, 2, 3)), pairs)["plain"]
    people = torch.stack([LABELS[pairs.first], LABELS[pairs.second]], dim=1)
    result = verification(scores, pairs, LABELS, torch.Generator().manual_seed(0), replicates=30)
    expected = verification_estimates(
        scores,
        pairs.same,
        pairs.fold,
        people,
        torch.Generator().manual_seed(0),
        fars=list(FARS.values()),
        replicates=30,
    )
    for name in ("accuracy", "auc", "eer"):
        measure, estimate = getattr(result, name), getattr(expected, name)
        assert (measure.value, measure.ci95, measure.n) == (estimate.value, estimate.ci95, estimate.n)
    assert result.tar_at_far.keys() == FARS.keys()
    assert result.tar_at_far["1e-1"].value == expected.tar_at_far[0.1].value
    assert result.accuracy_std == lfw_accuracy(scores, pairs.same, pairs.fold).std


def test_embeddings_that_do_not_fit_are_refused(pairs: PairProtocol) -> None:
    whole = embeddings(1.0, 1)
    with pytest.raises(DataError, match="twice protected and once plain"):
        linkage_scores(whole, whole[:-1], whole, pairs)
    with pytest.raises(DataError, match="twice protected and once plain"):
        linkage_scores(whole, whole, whole[:, :-1], pairs)
    with pytest.raises(DataError, match="beyond the 40 embeddings"):
        linkage_scores(whole[:40], whole[:40], whole[:40], pairs)
    with pytest.raises(DataError, match="finite"):
        assess_linkage(
            whole * torch.nan, whole, whole, labels=LABELS, pairs=pairs, probes=PROBES, seed=0, replicates=10
        )
