"""Intervals over identities: against explicit resampling, against theory, and where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics import bootstrap
from bench.metrics.bootstrap import (
    People,
    draw_identities,
    mean_estimate,
    mean_of_independent,
    tar_estimates,
    verification_estimates,
    wilson,
)
from bench.metrics.verification import lfw_accuracy, roc


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draws_are_with_replacement_and_uniform() -> None:
    counts = draw_identities(50, seeded(), 2000)
    assert counts.shape == (2000, 50)
    assert (counts.sum(1) == 50).all()
    # Multinomial(50, 1/50): mean 1, variance 1 - 1/50; a permutation would have variance 0.
    assert counts.var(0).mean() == pytest.approx(0.98, rel=0.02)
    assert counts.mean(0).tolist() == pytest.approx([1.0] * 50, abs=0.1)
    assert torch.equal(counts, draw_identities(50, seeded(), 2000))


def test_mean_interval_equals_explicit_resampling_of_identities() -> None:
    generator = seeded(1)
    people = torch.tensor([7, 7, 7, 2, 2, 9, 4, 4, 4, 4])  # labels need not be 0..K-1
    values = torch.rand(10, generator=generator)
    counts = draw_identities(4, seeded(), 1000)
    order = [2, 4, 7, 9]
    means = []
    for row in counts.int().tolist():
        drawn = [
            values[people == person].numpy() for person, times in zip(order, row, strict=True) for _ in range(times)
        ]
        means.append(np.concatenate(drawn).mean())
    estimate = mean_estimate(values, people, seeded())
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.ci95 == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-6)
    assert estimate.n == 10
    assert estimate.reason is None


@pytest.mark.parametrize(("few", "end", "bound"), [(1.0, 0, "0.0"), (0.0, 1, "1.0")])
def test_a_share_never_leaves_its_range_by_rounding(few: float, end: int, bound: str) -> None:
    """It was shown as -0.0: many replicates hold nobody of the few."""
    values = torch.full((300,), 1 - few, dtype=torch.float64)
    values[:7] = few
    for people in (torch.arange(300), torch.arange(300) // 7):
        ci95 = mean_estimate(values, people, seeded()).ci95
        assert ci95 is not None
        if people[7] == 1:  # all of the few are one person: one replicate in three holds none of them
            assert str(ci95[end]) == bound
        assert 0 <= ci95[0] <= ci95[1] <= 1


def test_images_of_one_person_do_not_count_as_independent() -> None:
    # 40 people with 25 equal images each carry the information of 40 images, not of 1,000.
    per_person = torch.randn(40, generator=seeded(2))
    people = torch.arange(40).repeat_interleave(25)
    clustered = mean_estimate(per_person[people], people, seeded()).ci95
    single = mean_estimate(per_person, torch.arange(40), seeded()).ci95
    assert clustered == pytest.approx(single)
    low, high = clustered or (0.0, 0.0)
    expected = 2 * 1.96 * float(per_person.std(correction=0)) / 40**0.5
    assert high - low == pytest.approx(expected, rel=0.15)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator, covered = seeded(3), 0
    for _ in range(200):
        effect = torch.randn(60, generator=generator)
        values = effect[:, None] + torch.randn(60, 5, generator=generator)
        estimate = mean_estimate(values.flatten(), torch.arange(60).repeat_interleave(5), generator, replicates=300)
        low, high = estimate.ci95 or (1.0, 1.0)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_values_not_measured_are_left_out_and_not_counted() -> None:
    nan = torch.nan
    values, people = torch.tensor([1.0, nan, 2.0, nan, 6.0]), torch.tensor([0, 0, 1, 2, 3])
    measured = mean_estimate(values[[0, 2, 4]], people[[0, 2, 4]], seeded())
    assert mean_estimate(values, people, seeded()) == measured
    assert (measured.value, measured.n) == (3.0, 3)
    nothing = mean_estimate(torch.full((2,), nan), torch.tensor([0, 1]), seeded())
    assert (nothing.value, nothing.ci95, nothing.n) == (None, None, 0)
    assert nothing.reason == "it could not be measured for any image"


def test_degenerate_samples_have_no_interval_but_a_reason() -> None:
    alone = mean_estimate(torch.tensor([True, False]), torch.tensor([3, 3]), seeded())
    assert (alone.value, alone.ci95) == (0.5, None)
    assert "two identities" in str(alone.reason)
    for constant in (1.0, 0.1, 0.3141):
        same = mean_estimate(torch.full((9,), constant), torch.arange(9) // 2, seeded())
        assert same.value == pytest.approx(constant)
        assert same.ci95 is None
        assert "same value" in str(same.reason)


def test_differences_are_paired() -> None:
    # What varies between people cancels; what remains is the small difference between conditions.
    generator = seeded(4)
    people = torch.arange(100) // 4
    first = torch.randn(25, generator=generator)[people]
    second = first + 0.1 + 0.01 * torch.randn(100, generator=generator)
    low, high = mean_estimate(second - first, people, seeded()).ci95 or (0.0, 0.0)
    assert 0.09 < low < high < 0.11


def test_replicates_in_pieces_are_the_same_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    values, people = torch.rand(30, generator=seeded(5)), torch.arange(30) // 3
    whole = mean_estimate(values, people, seeded())
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 30)
    assert mean_estimate(values, people, seeded()) == whole


def verification_sample(
    people: int = 30, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three genuine pairs a person and as many impostor pairs, in three folds."""
    generator = seeded(seed)
    mine = torch.arange(people).repeat_interleave(3)
    others = (mine + torch.randint(1, people, mine.shape, generator=generator)) % people
    identities = torch.cat((torch.stack((mine, mine), 1), torch.stack((mine, others), 1)))
    same = identities[:, 0] == identities[:, 1]
    ability = torch.randn(people, generator=generator)
    scores = 1.5 * same + 0.5 * ability[identities].mean(1) + torch.randn(len(same), generator=generator)
    return scores, same, torch.arange(len(same)) % 3, identities


def test_values_are_those_of_the_sample() -> None:
    scores, same, fold, identities = verification_sample()
    estimates = verification_estimates(scores, same, fold, identities, fars=(0.1, 1e-6))
    curve = roc(scores, same)
    assert estimates.accuracy.value == pytest.approx(lfw_accuracy(scores, same, fold).mean)
    expected = (curve.auc(), curve.eer(), curve.tar_at_far(0.1))
    assert (estimates.auc.value, estimates.eer.value, estimates.tar_at_far[0.1].value) == expected
    assert (estimates.accuracy.n, estimates.auc.n, estimates.tar_at_far[0.1].n) == (180, 180, 90)
    assert estimates.tar_at_far[1e-6].value is None
    assert "needs at least 1000000 impostor pairs" in str(estimates.tar_at_far[1e-6].reason)


def test_the_variance_is_the_jackknifes_less_what_two_people_count_twice() -> None:
    scores, same, _, identities = verification_sample(9)
    scores = scores.double() + torch.randn(9, generator=seeded(1), dtype=torch.float64)[identities].sum(1)

    def difference(kept: torch.Tensor) -> float:
        return float(scores[kept & same].mean() - scores[kept & ~same].mean())

    influence = torch.where(same, scores - scores[same].mean(), scores[~same].mean() - scores) / 27
    without = [difference((identities != person).all(1)) - difference(torch.ones_like(same)) for person in range(9)]
    jackknife = 8 / 9 * sum(change**2 for change in without)
    expected = jackknife - float(influence[~same].square().sum())
    assert expected > float(influence.square().sum())
    assert float(People.of(identities, same).variance(influence)) == pytest.approx(expected)


def test_the_influence_on_auc_is_its_derivative() -> None:
    """By the weight of each pair, with scikit-learn's weighted AUC."""
    scores, same, fold, identities = verification_sample(12)
    scores = (2 * scores).round()  # with ties
    people = People.of(identities, same)
    _, influences, _ = bootstrap._influences(scores.double(), same, fold, people, [])
    step = 1e-6
    for pair in range(0, len(same), 5):
        weights = np.ones(len(same))
        weights[pair] += step
        change = roc_auc_score(same, scores, sample_weight=weights) - roc_auc_score(same, scores)
        assert float(influences[1, pair]) == pytest.approx(change / step, abs=1e-6)


def lfw_like() -> torch.Tensor:
    """The people of 700 genuine and 700 impostor pairs: most in one or two, a few in dozens."""
    often = 1 / torch.arange(1, 1101, dtype=torch.float64) ** 0.6
    mine, first, second = (torch.multinomial(often, 700, replacement=True, generator=seeded(i)) for i in range(3))
    second = torch.where(first == second, (second + 1) % 1100, second)
    return torch.cat([torch.stack([mine, mine], 1), torch.stack([first, second], 1)])


def all_pairs() -> torch.Tensor:
    """The people of all pairs of three images each of 30."""
    person = torch.arange(30).repeat_interleave(3)
    return person[torch.combinations(torch.arange(90))]


def simulated(people: torch.Tensor, seed: int, far_apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the same pairs under two conditions; everybody is easy or hard to know, and like some others."""
    generator, same = seeded(seed), people[:, 0] == people[:, 1]
    known, common, noise = (torch.randn(size, generator=generator) for size in (1100, 1100, len(same)))
    place = torch.randn(1100, 4, generator=generator)
    alike = (place[people[:, 0]] * place[people[:, 1]]).sum(1) / 2
    genuine = far_apart + 0.5 * known[people[:, 0]] + 0.87 * noise
    scores = torch.where(same, genuine, 0.28 * common[people].sum(1) + 0.3 * alike + 0.87 * noise)
    other = 0.8 * scores + 0.6 * torch.randn(len(same), generator=generator) + 0.1 * far_apart * same
    return scores, other


def coverage(structure: Callable[[], torch.Tensor], far_apart: float, runs: int) -> np.ndarray:
    """(8,): how often intervals hold the mean estimate; accuracy, AUC, EER, TAR at FAR 1e-2, then their differences."""
    people = structure()
    same, fold = people[:, 0] == people[:, 1], torch.arange(len(people)) % 5
    rows = []
    for seed in range(runs):
        first, second = simulated(people, seed, far_apart)
        for minus in (None, second):
            estimates = verification_estimates(first, same, fold, people, minus=minus, fars=(1e-2,))
            for estimate in (estimates.accuracy, estimates.auc, estimates.eer, estimates.tar_at_far[1e-2]):
                assert estimate.value is not None
                assert estimate.ci95 is not None
                assert minus is not None or 0 <= estimate.ci95[0] <= estimate.value <= estimate.ci95[1] <= 1
                rows.append((estimate.value, *estimate.ci95))
    values, low, high = np.array(rows).reshape(runs, 8, 3).transpose(2, 0, 1)
    return np.asarray(((low <= values.mean(0)) & (values.mean(0) <= high)).mean(0))


STUDY = [(lfw_like, 2.5), (lfw_like, 4.0), (all_pairs, 2.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "far_apart"), STUDY)
def test_intervals_of_pairs_hold_the_truth_as_often_as_they_say(structure: Any, far_apart: float) -> None:
    """Product weights would hold it in 97.5 to 100 %."""
    covered = coverage(structure, far_apart, 160)
    assert 0.93 <= covered.mean() <= 0.97
    # Each is within the chance of so few runs: 3.5 standard errors of 95 % are 6 %.
    assert covered.min() >= 0.89
    assert covered.max() <= 0.99


def test_verification_differences_are_paired() -> None:
    scores, same, fold, identities = verification_sample(60)
    slightly_worse = scores - 0.05 * same
    difference = verification_estimates(scores, same, fold, identities, minus=slightly_worse)
    alone = verification_estimates(scores, same, fold, identities)
    expected = roc(scores, same).auc() - roc(slightly_worse, same).auc()
    assert difference.auc.value == pytest.approx(expected)
    low, high = difference.auc.ci95 or (0.0, 0.0)
    alone_low, alone_high = alone.auc.ci95 or (0.0, 0.0)
    assert 0 < low < expected < high  # a certain difference, though the intervals of each overlap
    assert high - low < 0.2 * (alone_high - alone_low)
    nothing = verification_estimates(scores, same, fold, identities, minus=scores)
    assert (nothing.auc.value, nothing.auc.ci95) == (0.0, None)
    assert nothing.auc.reason == bootstrap.ALIKE


def test_separable_pairs_are_as_sure_as_their_people_are_many() -> None:
    for people in (30, 300):
        _, same, fold, identities = verification_sample(people)
        estimates = verification_estimates(same.float(), same, fold, identities, fars=(0.1,))
        # Wilson's interval of so many successes in as many trials.
        quantile = float(stats.t.ppf(0.975, people - 1))
        for estimate in (estimates.accuracy, estimates.auc, estimates.tar_at_far[0.1]):
            assert estimate.value == 1.0
            assert estimate.ci95 == pytest.approx((people / (people + quantile**2), 1.0))
        assert estimates.eer.value == 0.0
        assert estimates.eer.ci95 == pytest.approx((0.0, quantile**2 / (people + quantile**2)))


def test_wilsons_interval_is_scipys() -> None:
    expected = stats.binomtest(81, 263).proportion_ci(0.95, method="wilson")
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_pairs_of_one_kind_of_one_person_have_no_interval() -> None:
    identities = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]])
    scores, same = torch.tensor([0.9, 0.3, 0.5, 0.1]), torch.tensor([True, True, False, False])
    estimate = verification_estimates(scores, same, torch.tensor([0, 1, 0, 1]), identities).auc
    assert (estimate.value, estimate.ci95) == (0.75, None)
    assert "at least two identities" in str(estimate.reason)


def test_contradictions_are_refused() -> None:
    scores, same, fold, identities = verification_sample()
    with pytest.raises(DataError, match="contradict the identities"):
        verification_estimates(scores, ~same, fold, identities)
    with pytest.raises(DataError, match=r"\(180, 2\)"):
        verification_estimates(scores, same, fold, identities[:, 0])
    with pytest.raises(DataError, match=r"float \(P,\) and bool"):
        verification_estimates(scores, same, fold, identities, minus=scores[:3])
    with pytest.raises(DataError, match="share one shape"):
        mean_estimate(scores, fold[:3], seeded())
    with pytest.raises(DataError, match="infinite"):
        mean_estimate(torch.tensor([1.0, torch.inf]), torch.tensor([0, 1]), seeded())


@pytest.mark.parametrize("fields", [(None, None, 3), (0.5, None, 3), (None, (0.0, 1.0), 3)])
def test_what_is_missing_needs_a_reason(fields: tuple[Any, Any, int]) -> None:
    with pytest.raises(ValueError, match="must say why"):
        Estimate(*fields)


def test_an_interval_needs_a_value() -> None:
    with pytest.raises(ValueError, match="an interval needs a value"):
        Estimate(None, (0.0, 1.0), 3, "no data")


if __name__ == "__main__":  # the study of docs/metrics.md
    for case in STUDY:
        print(case[0].__name__, case[1], coverage(*case, 1000).round(3))


def test_rates_alone_are_those_of_verification() -> None:
    draws = seeded(3)
    people = torch.randint(30, (900, 2), generator=draws)
    people[:300, 1] = people[:300, 0]
    same = people[:, 0] == people[:, 1]
    scores = torch.randn(900, generator=draws) + 1.5 * same
    fars = [0.1, 0.01, 1e-6]
    whole = verification_estimates(scores, same, torch.arange(900) % 2, people, fars=fars).tar_at_far
    assert tar_estimates(scores, same, fars, people) == whole
    alone = tar_estimates(scores, same, fars, None, "nobody knows")
    assert [alone[far].value for far in fars] == [whole[far].value for far in fars]
    assert alone[0.1].reason == "nobody knows"


def test_the_mean_of_independent_figures_has_the_interval_of_a_mean() -> None:
    """Of normal errors the half width of a mean of two is the root of the sum of squares over two."""
    parts = [Estimate(0.5, (0.4, 0.6), 10), Estimate(0.8, (0.5, 1.1), 5)]
    half = np.hypot(0.1, 0.3) / 2
    mean = mean_of_independent(parts)
    assert (mean.value, mean.n, mean.reason) == (pytest.approx(0.65), 15, None)
    assert mean.ci95 == pytest.approx((0.65 - half, 0.65 + half))
    missing = Estimate(None, None, 3, "too few")
    assert mean_of_independent([parts[0], missing]) == Estimate(None, None, 13, "too few")
    assert mean_of_independent([parts[0], Estimate(0.7, None, 3, "all alike")]).ci95 is None
