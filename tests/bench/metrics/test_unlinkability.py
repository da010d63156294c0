"""D_sys and maximal linkability against cases that can be computed otherwise: integrals, permutations, separation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bench.errors import DataError
from bench.metrics.unlinkability import (
    LARGEST_BIAS,
    chance_level,
    choose_bins,
    maximal_chance_level,
    maximal_linkability,
    maximal_linkability_estimate,
    tmr_bound,
    unlinkability,
    unlinkability_estimate,
)


def normal(mated: int, non_mated: int, shift: float, *, spread: float = 1.0, seed: int = 0):
    """Scores of ``mated`` pairs from N(shift, spread^2) and of ``non_mated`` from N(0, 1), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.arange(mated + non_mated) < mated
    scores = torch.randn(len(same), generator=generator, dtype=torch.float64)
    scores = torch.where(same, spread * scores + shift, scores)
    order = torch.randperm(len(same), generator=generator)
    return scores[order], same[order]


def integral(shift: float, spread: float = 1.0) -> float:
    """D_sys of these two normal laws, by quadrature of the definition."""
    mated, non_mated = stats.norm(shift, spread).pdf, stats.norm(0, 1).pdf

    def integrand(s: float) -> float:
        ratio = mated(s) / non_mated(s)
        return (2 * ratio / (1 + ratio) - 1) * mated(s) if ratio > 1 else 0.0

    return float(integrate.quad(integrand, -12, 14, limit=500, points=[0, shift / 2, shift])[0])


@pytest.mark.parametrize(("shift", "spread"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (0.0, 0.3), (1.5, 2.0)])
def test_two_normal_laws_give_their_integral(shift: float, spread: float) -> None:
    scores, same = normal(60_000, 60_000, shift, spread=spread)
    assert unlinkability(scores, same) == pytest.approx(integral(shift, spread), abs=0.01)


def test_a_protocol_of_six_thousand_pairs_comes_near_the_integral() -> None:
    values = [unlinkability(*normal(3000, 3000, 1.0, seed=seed)) for seed in range(8)]
    assert sum(values) / len(values) == pytest.approx(integral(1.0), abs=0.02)


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (300, 300), (200, 1000)])
def test_one_law_gives_the_chance_level_which_the_bins_keep_low(mated: int, non_mated: int) -> None:
    bins = choose_bins(mated, non_mated)
    values = [unlinkability(*normal(mated, non_mated, 0.0, seed=seed)) for seed in range(60)]
    mean, predicted = sum(values) / len(values), chance_level(bins, mated, non_mated)
    assert predicted <= LARGEST_BIAS
    assert 0.8 * predicted < mean < 1.05 * predicted


def test_the_number_of_bins_is_even_grows_with_the_sample_and_stays_within_the_published_one() -> None:
    chosen = [choose_bins(n, n) for n in (2, 50, 300, 3000, 10_000, 10**6)]
    assert chosen == sorted(chosen)
    assert all(bins % 2 == 0 for bins in chosen)
    assert (chosen[0], chosen[-1]) == (2, 100)
    assert chance_level(choose_bins(3000, 3000) + 2, 3000, 3000) > LARGEST_BIAS


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (7, 13), (40, 400), (1, 1)])
def test_scores_that_do_not_overlap_are_fully_linkable(mated: int, non_mated: int) -> None:
    same = torch.arange(mated + non_mated) < mated
    scores = torch.linspace(1, 0, len(same))
    assert unlinkability(scores, same) == pytest.approx(1, abs=1e-12)


def test_mated_pairs_that_score_lower_are_linkable_as_well() -> None:
    """LR asks for no direction: two modes around the non-mated one give them away too."""
    same = torch.tensor([True, False, True] * 40)
    scores = torch.tensor([0.0, 0.5, 1.0] * 40) + torch.linspace(0, 0.1, 120)
    assert unlinkability(scores, same, bins=8) > 0.7


def test_equal_scores_say_nothing() -> None:
    assert unlinkability(torch.full((100,), 0.3), torch.arange(100) < 50) == 0


def test_ties_share_a_bin() -> None:
    # Two thirds of the mated and one third of the non-mated pairs score 1, the others 0: LR = 2 and 1/2.
    same = torch.tensor([True, True, True, False, False, False] * 50)
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0] * 50)
    assert unlinkability(scores, same) == pytest.approx(2 / 3 * (2 / 3 - 1 / 3) / (2 / 3 + 1 / 3))


@pytest.mark.parametrize("bins", [1, 3, 10, 40])
def test_it_is_the_definition_over_bins_of_equal_mass(bins: int) -> None:
    scores, same = normal(2000, 1000, 2.0)
    ranked = same[scores.argsort()].double()
    mass = (ranked / 2000 + (1 - ranked) / 1000).cumsum(0) / 2
    bin_of = (mass * bins - 1e-6).ceil().clamp(1, bins)
    total = 0.0
    for number in range(1, bins + 1):
        p, q = (ranked[bin_of == number].sum() / 2000).item(), ((1 - ranked)[bin_of == number].sum() / 1000).item()
        ratio = p / q if q else float("inf")
        total += p * (1.0 if q == 0 else max(0.0, 2 * ratio / (1 + ratio) - 1))
    assert unlinkability(scores, same, bins=bins) == pytest.approx(total, abs=0.003)


@pytest.mark.parametrize("transform", [torch.exp, lambda s: s**3, lambda s: 7 * s - 2])
def test_only_the_order_of_scores_matters(transform) -> None:
    scores, same = normal(700, 500, 1.0)
    scores[3] = 1e2  # an outlier
    assert unlinkability(transform(scores), same) == unlinkability(scores, same)


def test_merging_bins_never_raises_it() -> None:
    scores, same = normal(2000, 2000, 0.7)
    values = [unlinkability(scores, same, bins=bins) for bins in (1, 2, 4, 8, 16, 32, 64)]
    assert values == sorted(values)
    assert values[0] == 0


def protocol(people: int, shift: float, seed: int = 0):
    """Four genuine pairs a person and as many impostor pairs, with scores that depend on the person."""
    generator = torch.Generator().manual_seed(seed)
    person = torch.arange(people).repeat(4)
    genuine = torch.stack([person, person], dim=1)
    impostor = torch.stack([person, (person + 1 + torch.arange(4).repeat_interleave(people)) % people], dim=1)
    identities = torch.cat([genuine, impostor])
    same = identities[:, 0] == identities[:, 1]
    bias = torch.randn(people, generator=generator)
    scores = torch.randn(len(same), generator=generator) + shift * same + 0.3 * bias[identities].sum(dim=1) * same
    return scores, same, identities


def test_the_interval_holds_the_value_and_narrows_with_more_people() -> None:
    few, many = (unlinkability_estimate(*protocol(people, 1.0)) for people in (30, 300))
    for estimate in (few, many):
        assert 0 <= estimate.ci95[0] < estimate.value < estimate.ci95[1] <= 1
    assert many.ci95[1] - many.ci95[0] < (few.ci95[1] - few.ci95[0]) / 1.8
    assert many.value == unlinkability(*protocol(300, 1.0)[:2])
    assert many.n == 2400


def test_the_interval_of_an_unlinkable_system_is_not_pushed_up_by_resampling() -> None:
    scores, same, identities = protocol(200, 0.0)
    scores = torch.randn(len(scores), generator=torch.Generator().manual_seed(2))
    estimate = unlinkability_estimate(scores, same, identities)
    assert estimate.value < 0.1
    assert estimate.ci95[0] < 0.05


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of two normal distributions a standard deviation and a half apart, seen by 120 people."""
    estimates = [unlinkability_estimate(*protocol(120, 1.5, seed)) for seed in range(150)]
    values, low, high = np.array([(e.value, *e.ci95) for e in estimates]).T
    truth = values.mean()  # of so many bins and pairs
    assert 0.90 <= ((low <= truth) & (truth <= high)).mean() <= 0.99


def test_what_resembles_nothing_else_is_as_sure_as_its_people_are_many() -> None:
    _, same, identities = protocol(20, 0.0)
    certain = unlinkability_estimate(same.float(), same, identities)
    quantile = float(stats.t.ppf(0.975, 19))
    assert certain.value == 1
    assert certain.ci95 == pytest.approx((20 / (20 + quantile**2), 1))
    two = torch.tensor([[0, 0], [0, 1]])
    lone = unlinkability_estimate(torch.tensor([0.9, 0.1]), two[:, 0] == two[:, 1], two)
    assert lone.ci95 is None
    assert "two identities" in str(lone.reason)


@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        (torch.zeros(3), torch.tensor([True, False]), "float"),
        (torch.zeros(2), torch.tensor([1, 0]), "bool"),
        (torch.tensor([0.0, torch.nan]), torch.tensor([True, False]), "finite"),
        (torch.zeros(2), torch.tensor([True, True]), "both mated and non-mated"),
    ],
)
def test_unusable_scores_are_refused(scores: torch.Tensor, same: torch.Tensor, message: str) -> None:
    for measure in (unlinkability, maximal_linkability):
        with pytest.raises(DataError, match=message):
            measure(scores, same)


def test_unusable_identities_are_refused() -> None:
    scores, same, identities = protocol(10, 0.0)
    for estimate in (unlinkability_estimate, maximal_linkability_estimate):
        with pytest.raises(DataError, match="must be"):
            estimate(scores, same, identities[:3])
        with pytest.raises(DataError, match="contradict"):
            estimate(scores, ~same, identities)


# -- maximal linkability ---------------------------------------------------------------------------


def distance(shift: float, spread: float = 1.0) -> float:
    """Total variation distance of N(shift, spread^2) and N(0, 1), by quadrature."""
    mated, non_mated = stats.norm(shift, spread).pdf, stats.norm(0, 1).pdf
    return 0.5 * float(integrate.quad(lambda s: abs(mated(s) - non_mated(s)), -12, 14, limit=500, points=[0, shift])[0])


def test_the_oracle_is_the_closed_form_where_there_is_one() -> None:
    assert distance(1.0) == pytest.approx(2 * stats.norm.cdf(0.5) - 1)


@pytest.mark.parametrize(("shift", "spread"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (0.0, 0.3), (1.5, 2.0)])
def test_maximal_linkability_of_two_normal_laws_is_that_of_their_distance(shift: float, spread: float) -> None:
    scores, same = normal(60_000, 60_000, shift, spread=spread)
    assert maximal_linkability(scores, same) == pytest.approx(np.log2(1 + distance(shift, spread)), abs=0.01)


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (300, 300), (200, 1000)])
def test_one_law_gives_the_chance_level_of_maximal_linkability(mated: int, non_mated: int) -> None:
    bins = min(30, choose_bins(mated, non_mated))
    values = [maximal_linkability(*normal(mated, non_mated, 0.0, seed=seed)) for seed in range(60)]
    mean, predicted = sum(values) / len(values), maximal_chance_level(bins, mated, non_mated)
    assert predicted < 1 / 8
    assert 0.8 * predicted < mean < 1.05 * predicted


def test_there_are_thirty_bins_and_fewer_for_few_scores() -> None:
    for count, bins in ((3000, 30), (300, 6)):
        scores, same = normal(count, count, 0.0)
        assert maximal_linkability(scores, same) == maximal_linkability(scores, same, bins=bins)
        assert maximal_linkability(scores, same) != maximal_linkability(scores, same, bins=bins + 2)


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (7, 13), (40, 400), (1, 1)])
def test_scores_that_do_not_overlap_have_a_bit(mated: int, non_mated: int) -> None:
    same = torch.arange(mated + non_mated) < mated
    assert maximal_linkability(torch.linspace(1, 0, len(same)), same) == pytest.approx(1, abs=1e-12)
    assert maximal_linkability(torch.linspace(0, 1, len(same)), same) == pytest.approx(1, abs=1e-12)


def test_equal_scores_have_no_bit_and_ties_share_a_bin() -> None:
    assert maximal_linkability(torch.full((100,), 0.3), torch.arange(100) < 50) == 0
    same = torch.tensor([True, True, True, False, False, False] * 50)
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0] * 50)
    assert maximal_linkability(scores, same) == pytest.approx(np.log2(4 / 3))


@pytest.mark.parametrize(("shift", "spread"), [(0.3, 1.0), (1.0, 1.0), (2.5, 1.0), (1.0, 0.5), (0.0, 2.0), (-1.0, 1.0)])
def test_no_threshold_beats_the_bound(shift: float, spread: float) -> None:
    """At every score of the sample, from either side; a threshold within a bin by no more than that bin holds."""
    scores, same = normal(3000, 3000, shift, spread=spread)
    maximal, bins = maximal_linkability(scores, same), 30
    ranked = np.sort(scores.numpy())
    fmr, tmr = (1 - np.searchsorted(np.sort(scores[kind].numpy()), ranked) / 3000 for kind in (~same, same))
    between = np.arange(200, 6000, 200)  # where bins of equal mass meet
    for miss, match in ((fmr, tmr), (1 - fmr, 1 - tmr)):
        bound = np.array([tmr_bound(maximal, rate) for rate in miss])
        assert (match <= bound + 2 / bins).all()
        assert (match <= bound + 1e-9)[between].all()
    assert tmr_bound(1.0, 0.3) == 1


def test_the_bound_is_met_where_one_threshold_is_the_best_test() -> None:
    scores, same = normal(60_000, 60_000, 1.0)
    accepted = scores >= 0.5
    fmr, tmr = float(accepted[~same].double().mean()), float(accepted[same].double().mean())
    assert tmr_bound(maximal_linkability(scores, same), fmr) == pytest.approx(tmr, abs=0.01)


def test_the_influence_is_the_derivative_by_the_weight_of_a_person() -> None:
    """Against the interval of a jackknife over people with the bins held: few bins, so that they hardly move."""
    scores, same, identities = protocol(120, 1.5)
    estimate = maximal_linkability_estimate(scores, same, identities)
    without = []
    for person in range(120):
        kept = (identities != person).all(dim=1)
        without.append(maximal_linkability(scores[kept], same[kept], bins=choose_bins(480, 480, 30)))
    error = np.std(without) * 119 / np.sqrt(120)
    half = (estimate.ci95[1] - estimate.ci95[0]) / 2
    assert half / stats.t.ppf(0.975, 119) == pytest.approx(error, rel=0.35)


def test_intervals_of_maximal_linkability_hold_the_truth_about_as_often_as_they_say() -> None:
    estimates = [maximal_linkability_estimate(*protocol(120, 1.5, seed)) for seed in range(150)]
    values, low, high = np.array([(e.value, *e.ci95) for e in estimates]).T
    truth = values.mean()
    assert 0.90 <= ((low <= truth) & (truth <= high)).mean() <= 0.99
