"""D_sys against cases that can be computed otherwise: integrals, permutations, separation."""

from __future__ import annotations

import pytest
import torch
from scipy import integrate, stats

from bench.errors import DataError
from bench.metrics.unlinkability import LARGEST_BIAS, chance_level, choose_bins, unlinkability, unlinkability_estimate


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
    assert unlinkability(scores, same).d_sys == pytest.approx(integral(shift, spread), abs=0.01)


def test_a_protocol_of_six_thousand_pairs_comes_near_the_integral() -> None:
    found = [unlinkability(*normal(3000, 3000, 1.0, seed=seed)).d_sys for seed in range(8)]
    assert sum(found) / len(found) == pytest.approx(integral(1.0), abs=0.02)


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (300, 300), (200, 1000)])
def test_one_law_gives_the_chance_level_which_the_bins_keep_low(mated: int, non_mated: int) -> None:
    bins = choose_bins(mated, non_mated)
    found = [unlinkability(*normal(mated, non_mated, 0.0, seed=seed)).d_sys for seed in range(60)]
    mean, predicted = sum(found) / len(found), chance_level(bins, mated, non_mated)
    assert predicted <= LARGEST_BIAS
    assert 0.8 * predicted < mean < 1.05 * predicted


def test_the_number_of_bins_is_even_grows_with_the_sample_and_stays_within_the_published_one() -> None:
    found = [choose_bins(n, n) for n in (2, 50, 300, 3000, 10_000, 10**6)]
    assert found == sorted(found)
    assert all(bins % 2 == 0 for bins in found)
    assert (found[0], found[-1]) == (2, 100)
    assert chance_level(choose_bins(3000, 3000) + 2, 3000, 3000) > LARGEST_BIAS


@pytest.mark.parametrize(("mated", "non_mated"), [(3000, 3000), (7, 13), (40, 400), (1, 1)])
def test_scores_that_do_not_overlap_are_fully_linkable(mated: int, non_mated: int) -> None:
    same = torch.arange(mated + non_mated) < mated
    scores = torch.linspace(1, 0, len(same))
    assert unlinkability(scores, same).d_sys == pytest.approx(1, abs=1e-12)


def test_mated_pairs_that_score_lower_are_linkable_as_well() -> None:
    """LR asks for no direction: two modes around the non-mated one give them away too."""
    same = torch.tensor([True, False, True] * 40)
    scores = torch.tensor([0.0, 0.5, 1.0] * 40) + torch.linspace(0, 0.1, 120)
    assert unlinkability(scores, same, bins=8).d_sys > 0.7


def test_equal_scores_say_nothing() -> None:
    same = torch.arange(100) < 50
    result = unlinkability(torch.full((100,), 0.3), same)
    assert result.d_sys == 0
    assert len(result.edges) == 0


def test_ties_share_a_bin() -> None:
    # Two thirds of the mated and one third of the non-mated pairs score 1, the others 0: LR = 2 and 1/2.
    same = torch.tensor([True, True, True, False, False, False] * 50)
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0] * 50)
    result = unlinkability(scores, same)
    assert result.d_sys == pytest.approx(2 / 3 * (2 / 3 - 1 / 3) / (2 / 3 + 1 / 3))
    torch.testing.assert_close(result.likelihood_ratio, torch.tensor([0.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(result.local, torch.tensor([0.0, 1 / 3], dtype=torch.float64))
    assert result.edges.tolist() == [0.5]


def test_the_local_measure_follows_the_definition() -> None:
    result = unlinkability(*normal(5000, 4000, 1.0))
    ratio = result.likelihood_ratio
    assert torch.isinf(ratio).sum() == (result.non_mated == 0).sum()
    expected = torch.where(ratio > 1, torch.where(ratio.isinf(), 1.0, 2 * ratio / (1 + ratio) - 1), 0.0)
    torch.testing.assert_close(result.local, expected)
    assert result.d_sys == pytest.approx(float((expected * result.mated).sum()))
    torch.testing.assert_close(
        (result.mated + result.non_mated) / 2, torch.full_like(ratio, 1 / len(ratio)), atol=3e-4, rtol=0
    )


def test_a_bin_without_non_mated_pairs_counts_in_full() -> None:
    same = torch.tensor([True, True, True, False, False, False])
    result = unlinkability(torch.tensor([0.9, 0.8, 0.1, 0.4, 0.3, 0.2]), same, bins=3)
    assert torch.isinf(result.likelihood_ratio[-1])
    assert result.local[-1] == 1


@pytest.mark.parametrize("transform", [torch.exp, lambda s: s**3, lambda s: 7 * s - 2])
def test_only_the_order_of_scores_matters(transform) -> None:
    scores, same = normal(700, 500, 1.0)
    scores[3] = 1e2  # an outlier
    assert unlinkability(transform(scores), same).d_sys == unlinkability(scores, same).d_sys


def test_merging_bins_never_raises_it() -> None:
    scores, same = normal(2000, 2000, 0.7)
    found = [unlinkability(scores, same, bins=bins).d_sys for bins in (1, 2, 4, 8, 16, 32, 64)]
    assert found == sorted(found)
    assert found[0] == 0


# -- intervals ----------------------------------------------------------------------------------------


def protocol(people: int, shift: float, seed: int = 0):
    """Four genuine pairs a person and as many impostor pairs, with scores that depend on the person."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(people).repeat(4)
    genuine = torch.stack([own, own], dim=1)
    impostor = torch.stack([own, (own + 1 + torch.arange(4).repeat_interleave(people)) % people], dim=1)
    identities = torch.cat([genuine, impostor])
    same = identities[:, 0] == identities[:, 1]
    bias = torch.randn(people, generator=generator)
    scores = torch.randn(len(same), generator=generator) + shift * same + 0.3 * bias[identities].sum(dim=1) * same
    return scores, same, identities


def estimate(people: int, shift: float, **options):
    return unlinkability_estimate(*protocol(people, shift), torch.Generator().manual_seed(1), replicates=200, **options)


def test_the_interval_holds_the_value_and_narrows_with_more_people() -> None:
    few, many = estimate(30, 1.0), estimate(300, 1.0)
    for found in (few, many):
        assert found.ci95 is not None
        assert found.value is not None
        assert 0 <= found.ci95[0] < found.value < found.ci95[1] <= 1
    assert many.ci95[1] - many.ci95[0] < (few.ci95[1] - few.ci95[0]) / 1.8
    assert many.value == unlinkability(*protocol(300, 1.0)[:2]).d_sys
    assert many.n == 2400


def test_the_interval_of_an_unlinkable_system_is_not_pushed_up_by_resampling() -> None:
    scores, same, identities = protocol(200, 0.0)
    scores = torch.randn(len(scores), generator=torch.Generator().manual_seed(2))
    found = unlinkability_estimate(scores, same, identities, torch.Generator().manual_seed(1), replicates=200)
    assert found.value is not None
    assert found.ci95 is not None
    assert found.value < 0.1
    assert found.ci95[0] < 0.05


def test_the_same_draws_give_the_same_interval() -> None:
    assert estimate(40, 1.0) == estimate(40, 1.0)


def test_no_interval_where_resampling_says_nothing() -> None:
    _, same, identities = protocol(20, 0.0)
    found = unlinkability_estimate(same.float(), same, identities, torch.Generator().manual_seed(0), replicates=50)
    assert found.value == 1
    assert found.ci95 is None
    assert found.reason is not None
    assert "same value" in found.reason
    two = torch.tensor([[0, 0], [0, 1]])
    lone = unlinkability_estimate(
        torch.tensor([0.9, 0.1]), two[:, 0] == two[:, 1], two, torch.Generator().manual_seed(0)
    )
    assert lone.ci95 is None
    assert lone.reason is not None
    assert "too few identities" in lone.reason


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
    with pytest.raises(DataError, match=message):
        unlinkability(scores, same)


def test_unusable_bins_and_identities_are_refused() -> None:
    scores, same, identities = protocol(10, 0.0)
    with pytest.raises(DataError, match="at least one bin"):
        unlinkability(scores, same, bins=0)
    with pytest.raises(DataError, match="must be"):
        unlinkability_estimate(scores, same, identities[:3], torch.Generator())
    with pytest.raises(DataError, match="contradict"):
        unlinkability_estimate(scores, ~same, identities, torch.Generator())
