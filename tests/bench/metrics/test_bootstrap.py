"""Bootstrap over identities: against explicit resampling, against theory, and where it has nothing to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics import bootstrap
from bench.metrics.bootstrap import (
    draw_identities,
    mean_estimate,
    verification_estimates,
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
    scores, same, fold, identities = verification_sample()
    whole_pairs = verification_estimates(scores, same, fold, identities, seeded(), replicates=50)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 3 * len(scores))
    assert mean_estimate(values, people, seeded()) == whole
    assert verification_estimates(scores, same, fold, identities, seeded(), replicates=50) == whole_pairs


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


def repeat_pairs(row: list[int], identities: torch.Tensor) -> torch.Tensor:
    """Indices of the pairs of a resample, written out: w_i copies of a genuine pair, w_i w_j of an impostor pair."""
    times = [row[a] if a == b else row[a] * row[b] for a, b in identities.tolist()]
    return torch.arange(len(times)).repeat_interleave(torch.tensor(times))


def test_verification_intervals_equal_explicit_resampling() -> None:
    scores, same, fold, identities = verification_sample()
    estimates = verification_estimates(scores, same, fold, identities, seeded(), fars=(0.1, 1e-6), replicates=60)
    assert estimates.accuracy.value == lfw_accuracy(scores, same, fold).mean
    curve = roc(scores, same)
    expected = (float(curve.auc()), float(curve.eer()), float(curve.tar_at_far(0.1)))
    assert (estimates.auc.value, estimates.eer.value, estimates.tar_at_far[0.1].value) == expected
    assert (estimates.auc.n, estimates.tar_at_far[0.1].n) == (180, 90)

    samples = []
    for row in draw_identities(30, seeded(), 60).int().tolist():
        index = repeat_pairs(row, identities)
        s, g = scores[index], same[index]
        curve = roc(s, g)
        samples.append((float(curve.auc()), float(curve.eer()), float(curve.tar_at_far(0.1))))
    low, high = np.quantile(np.array(samples, dtype=float), [0.025, 0.975], axis=0)
    assert estimates.auc.ci95 == pytest.approx((low[0], high[0]))
    assert estimates.eer.ci95 == pytest.approx((low[1], high[1]))
    assert estimates.tar_at_far[0.1].ci95 == pytest.approx((low[2], high[2]))
    assert estimates.tar_at_far[1e-6].value is None
    assert "needs at least 1000000 impostor pairs" in str(estimates.tar_at_far[1e-6].reason)


def test_verification_differences_are_paired() -> None:
    scores, same, fold, identities = verification_sample(60)
    slightly_worse = scores - 0.05 * same
    difference = verification_estimates(scores, same, fold, identities, seeded(), minus=slightly_worse, replicates=200)
    alone = verification_estimates(scores, same, fold, identities, seeded(), replicates=200)
    expected = float(roc(scores, same).auc()) - float(roc(slightly_worse, same).auc())
    assert difference.auc.value == pytest.approx(expected)
    low, high = difference.auc.ci95 or (0.0, 0.0)
    alone_low, alone_high = alone.auc.ci95 or (0.0, 0.0)
    assert 0 < low < expected < high  # a certain difference, though the intervals of each overlap
    assert high - low < 0.2 * (alone_high - alone_low)
    nothing = verification_estimates(scores, same, fold, identities, seeded(), minus=scores, replicates=20)
    assert (nothing.auc.value, nothing.auc.ci95) == (0.0, None)


def test_separable_pairs_have_no_interval() -> None:
    _, same, fold, identities = verification_sample()
    estimates = verification_estimates(same.float(), same, fold, identities, seeded(), replicates=50)
    assert (estimates.accuracy.value, estimates.accuracy.ci95) == (1.0, None)
    assert "same value" in str(estimates.auc.reason)


def test_too_few_identities_for_pairs_say_so() -> None:
    identities = torch.tensor([[0, 0], [1, 1], [0, 1], [0, 1]])
    scores, same = torch.tensor([0.9, 0.3, 0.5, 0.1]), torch.tensor([True, True, False, False])
    estimate = verification_estimates(scores, same, torch.tensor([0, 1, 0, 1]), identities, seeded()).auc
    assert (estimate.value, estimate.ci95) == (0.75, None)
    assert "too few identities" in str(estimate.reason)


def test_contradictions_are_refused() -> None:
    scores, same, fold, identities = verification_sample()
    with pytest.raises(DataError, match="contradict the identities"):
        verification_estimates(scores, ~same, fold, identities, seeded())
    with pytest.raises(DataError, match=r"\(180, 2\)"):
        verification_estimates(scores, same, fold, identities[:, 0], seeded())
    with pytest.raises(DataError, match=r"float \(P,\) and bool"):
        verification_estimates(scores, same, fold, identities, seeded(), minus=scores[:3])
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
