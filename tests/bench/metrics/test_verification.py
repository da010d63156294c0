"""Verification statistics against scikit-learn and exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve

from bench.data.faces import PairProtocol
from bench.errors import DataError
from bench.metrics.verification import far_not_measurable, judged_right, lfw_accuracy, pair_scores, roc


def sample(pairs: int = 400, *, ties: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(pairs, generator=generator) < 0.4
    scores = torch.randn(pairs, generator=generator) + 1.2 * same
    if ties:
        scores = (scores * 3).round() / 3
    return scores, same, torch.arange(pairs) % 5


def reference_eer(far: np.ndarray, tar: np.ndarray) -> float:
    """Where the piecewise linear curve meets the diagonal FAR = FRR, by root finding."""
    curve = interp1d(far, tar)
    return float(brentq(lambda x: 1 - x - curve(x), 0, 1))


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_equals_scikit_learn(ties: bool) -> None:
    scores, same, _ = sample(ties=ties)
    curve = roc(scores, same)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    assert curve.auc() == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert curve.eer() == pytest.approx(reference_eer(far, tar), abs=1e-9)
    for rate in (0.01, 0.1, 0.5):
        assert curve.tar_at_far(rate) == pytest.approx(tar[far <= rate].max(), abs=1e-12)


def test_perfect_and_reversed_separation() -> None:
    same = torch.tensor([True, True, False, False])
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert (roc(scores, same).auc(), roc(scores, same).eer()) == (1.0, 0.0)
    assert (roc(-scores, same).auc(), roc(-scores, same).eer()) == (0.0, 1.0)
    assert (roc(torch.ones(4), same).auc(), roc(torch.ones(4), same).eer()) == (0.5, 0.5)


def test_three_of_three_hundred_impostors_pass_one_per_cent() -> None:
    # 3 / 300 and 0.01 are the same rate; the fourth impostor ranks above the last genuine pair.
    impostors = torch.arange(300).float()
    genuine = torch.tensor([1000.0, 297.5, 296.5, 295.5])
    scores, same = torch.cat((impostors, genuine)), torch.arange(304) >= 300
    assert roc(scores, same).tar_at_far(0.01) == 0.75


def test_far_below_one_impostor_pair_is_not_measurable() -> None:
    assert far_not_measurable(1 / 300, 300) is None
    assert far_not_measurable(0.99 / 300, 300) == "FAR 0.0033 needs at least 303 impostor pairs, there are 300"
    with pytest.raises(DataError, match="between 0 and 1"):
        far_not_measurable(0.0, 300)


def exhaustive_fold(scores: np.ndarray, same: np.ndarray, fold: np.ndarray, number: int) -> float:
    """Textbook LFW: try every midpoint on the other folds one by one, take the middle one of the best."""
    train, test = fold != number, fold == number
    values = np.unique(scores[train])
    candidates = np.concatenate(([values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]))
    gained = [np.sum((scores[train] >= t) == same[train]) for t in candidates]
    best = np.flatnonzero(np.array(gained) == max(gained))
    threshold = candidates[best[(len(best) - 1) // 2]]
    return float(np.mean((scores[test] >= threshold) == same[test]))


@pytest.mark.parametrize("ties", [False, True])
def test_lfw_accuracy_equals_exhaustive_search(ties: bool) -> None:
    scores, same, fold = sample(150, ties=ties)
    right = judged_right(scores, same, fold)
    columns = scores.double().numpy(), same.numpy(), fold.numpy()
    expected = [exhaustive_fold(*columns, number) for number in range(5)]
    assert [float(right[fold == number].double().mean()) for number in range(5)] == pytest.approx(expected)
    accuracy = lfw_accuracy(scores, same, fold)
    assert accuracy.mean == pytest.approx(np.mean(expected))
    assert accuracy.std == pytest.approx(np.std(expected))


def test_the_overall_threshold_is_the_best_one() -> None:
    scores, same, fold = sample(150)
    accuracy = lfw_accuracy(scores, same, fold)
    reached = ((scores >= accuracy.threshold) == same).float().mean()
    assert reached == max(((scores >= t) == same).float().mean() for t in scores)


def test_a_fold_of_its_own_never_sets_its_threshold() -> None:
    # Fold 0 is separated elsewhere than fold 1: thresholds taken from the fold itself would score 1.
    scores = torch.tensor([0.2, 0.1, 0.9, 0.8])
    same = torch.tensor([True, False, True, False])
    assert judged_right(scores, same, torch.tensor([0, 0, 1, 1])).tolist() == [False, True, True, False]


def test_pair_scores_are_cosines() -> None:
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([0, 3, 5]), torch.tensor([1, 4, 5])
    protocol = PairProtocol(first, second, torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.int64))
    expected = torch.nn.functional.cosine_similarity(embeddings[first], embeddings[second])
    torch.testing.assert_close(pair_scores(embeddings, protocol), expected)
    with pytest.raises(DataError, match="index beyond the 5"):
        pair_scores(embeddings[:5], protocol)


def test_wrong_input_is_refused() -> None:
    scores, same, fold = sample(20)
    with pytest.raises(DataError, match="both genuine and impostor"):
        roc(scores, torch.ones(20, dtype=torch.bool))
    with pytest.raises(DataError, match="finite"):
        roc(torch.full((20,), torch.nan), same)
    with pytest.raises(DataError, match=r"bool \(P,\)"):
        roc(scores, same.long())
    with pytest.raises(DataError, match="two folds"):
        lfw_accuracy(scores, same, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(DataError, match="folds must be"):
        lfw_accuracy(scores, same, fold[:3])
