"""Verification statistics: LFW accuracy, ROC AUC, EER and TAR@FAR, exact and, where asked, weighted.

A *score* is a similarity; a pair is accepted when its score reaches the threshold. Every statistic takes optional pair
weights with a leading batch of replicates, (R, P): that is how :mod:`bench.metrics.bootstrap` evaluates a thousand
resamples with one sort. All sums run in float64 on the CPU, where integer weights add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.faces import PairProtocol
from bench.errors import DataError

# Weights times pairs held at once per fold; about 64 MB of float64 with the intermediates.
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy under the LFW View 2 protocol.

    Attributes:
        mean: mean accuracy over folds.
        std: population standard deviation over folds, as the field prints it behind the mean.
        threshold: the threshold with the best accuracy over all pairs: the recogniser's operating point elsewhere.
    """

    mean: float
    std: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Roc:
    """The ROC, from the strictest threshold (nothing accepted) to the laxest (all accepted).

    Attributes:
        thresholds: float64 (T,), falling; a pair is accepted where its score is at least this.
        far: float64 (R, T), weighted share of impostor pairs accepted.
        tar: float64 (R, T), weighted share of genuine pairs accepted.

    A replicate in which either class has no weight is NaN throughout.
    """

    thresholds: Tensor
    far: Tensor
    tar: Tensor

    def auc(self) -> Tensor:
        """Area under the curve, (R,); ties count one half, as in the Mann-Whitney statistic."""
        return torch.trapezoid(self.tar, self.far)

    def eer(self) -> Tensor:
        """Equal error rate, (R,): where FAR = FRR on the curve, linear between its points."""
        gap = self.far - (1 - self.tar)
        # From -1 to +1 and never falling: the first point at or above zero ends the segment that crosses.
        after = (gap >= 0).to(torch.uint8).argmax(-1, keepdim=True).clamp_min(1)
        before = after - 1
        gap0, gap1 = gap.gather(-1, before), gap.gather(-1, after)
        far0, far1 = self.far.gather(-1, before), self.far.gather(-1, after)
        return (far0 - gap0 / (gap1 - gap0) * (far1 - far0)).squeeze(-1)

    def tar_at_far(self, far: float) -> Tensor:
        """Largest TAR whose FAR does not exceed ``far``, (R,); no interpolation, so never flattering."""
        # FAR is a quotient of counts: 3/300 must pass 0.01 however either is rounded.
        allowed = self.far <= far + 1e-12
        return torch.where(self.far.isnan(), self.tar, torch.where(allowed, self.tar, 0.0)).amax(-1)


def pair_scores(embeddings: Tensor, protocol: PairProtocol) -> Tensor:
    """Cosine similarity of every pair of the protocol, float32 (P,), from embeddings (N, D) of any length.

    Raises:
        DataError: the protocol indexes faces that have no embedding.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> first, second = torch.tensor([0, 0]), torch.tensor([1, 2])
        >>> pair_scores(embeddings, PairProtocol(first, second, torch.tensor([True, False]), torch.zeros(2).long()))
        tensor([1., 0.])
    """
    if len(protocol) and int(torch.stack((protocol.first, protocol.second)).max()) >= len(embeddings):
        raise DataError(f"the verification pairs index beyond the {len(embeddings)} embeddings")
    unit = F.normalize(embeddings.to(torch.float32), dim=1)
    first, second = protocol.first.to(unit.device), protocol.second.to(unit.device)
    return (unit[first] * unit[second]).sum(1)


def roc(scores: Tensor, same: Tensor, weights: Tensor | None = None) -> Roc:
    """The exact ROC: one point per distinct score, and the origin.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).
        weights: non-negative (R, P), one row per replicate; None for R = 1 with every pair counted once.

    Raises:
        DataError: shapes differ, a score is not finite, or there are no genuine or no impostor pairs.

    Example:
        >>> import torch
        >>> curve = roc(torch.tensor([0.9, 0.4, 0.5, 0.1]), torch.tensor([True, True, False, False]))
        >>> float(curve.auc()), float(curve.eer()), float(curve.tar_at_far(0.5))
        (0.75, 0.5, 1.0)
    """
    scores, same = checked_pairs(scores, same)
    weights = _weights(weights, len(scores))
    order = scores.argsort(descending=True, stable=True)
    ranked = scores[order]
    # Equal scores are accepted together: only the last of each run is a point of the curve.
    ends = torch.cat((ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool))).nonzero().squeeze(1)
    weights, genuine = weights[:, order], same[order]
    rates = []
    for mask in (~genuine, genuine):
        accepted = (weights * mask).cumsum(1)[:, ends]
        rates.append(F.pad(accepted / accepted[:, -1:], (1, 0)))
        rates[-1][accepted[:, -1] == 0] = torch.nan
    thresholds = torch.cat((torch.tensor([torch.inf], dtype=torch.float64), ranked[ends]))
    return Roc(thresholds, *rates)


def far_not_measurable(far: float, impostors: int) -> str | None:
    """Why ``far`` cannot be measured with so many impostor pairs, or None if it can."""
    if not 0 < far < 1:
        raise DataError(f"FAR must lie between 0 and 1, got {far}")
    if far * impostors < 1 - 1e-9:
        return f"FAR {far:g} needs at least {round(1 / far)} impostor pairs, there are {impostors}"
    return None


def lfw_accuracy(scores: Tensor, same: Tensor, fold: Tensor) -> Accuracy:
    """Mean accuracy over folds, each under the threshold chosen on the others (LFW View 2, Huang et al. 2007).

    The threshold is exact: every midpoint between neighbouring training scores (and one value below and one above them
    all) is tried; among equally good ones the middle one is taken, which favours neither error.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).
        fold: int64 (P,), at least two different values.

    Raises:
        DataError: shapes differ, a score is not finite, one class is absent, or there is one fold only.

    Example:
        >>> import torch
        >>> scores, same = torch.tensor([0.9, 0.2, 0.8, 0.7]), torch.tensor([True, False, True, False])
        >>> lfw_accuracy(scores, same, torch.tensor([0, 0, 1, 1])).mean
        0.75
    """
    accuracies = fold_accuracies(scores, same, fold)
    threshold = _best_thresholds(*checked_pairs(scores, same), _weights(None, len(scores)))
    return Accuracy(float(accuracies.mean()), float(accuracies.std(correction=0)), float(threshold))


def fold_accuracies(scores: Tensor, same: Tensor, fold: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted accuracy of every fold, as :func:`lfw_accuracy` defines them.

    Candidate thresholds are those of the unweighted sample: a pair of weight zero still marks one.

    Args:
        scores, same, fold: as :func:`lfw_accuracy`, F different folds.
        weights: non-negative (R, P); None for R = 1 with every pair counted once.

    Returns:
        float64 (R, F), NaN where a fold has no weight.
    """
    scores, same = checked_pairs(scores, same)
    if fold.shape != scores.shape:
        raise DataError(f"folds must be (P,) like the {len(scores)} scores, got {tuple(fold.shape)}")
    folds = torch.unique(fold.cpu())
    if len(folds) < 2:
        raise DataError("LFW accuracy needs at least two folds: the threshold is chosen on the others")
    weights = _weights(weights, len(scores))
    return torch.stack([_held_out(scores, same, fold.cpu() == number, weights) for number in folds.tolist()], 1)


def _held_out(scores: Tensor, same: Tensor, test: Tensor, weights: Tensor) -> Tensor:
    """Accuracies (R,) on the pairs ``test``, under the threshold chosen on the others."""
    accuracies = []
    for chunk in torch.split(weights, max(1, _CHUNK_ELEMENTS // len(scores))):
        chosen = _best_thresholds(scores[~test], same[~test], chunk[:, ~test])
        right = (scores[test] >= chosen[:, None]) == same[test]
        accuracies.append((chunk[:, test] * right).sum(1) / chunk[:, test].sum(1))
    return torch.cat(accuracies)


def _best_thresholds(scores: Tensor, same: Tensor, weights: Tensor) -> Tensor:
    """Thresholds (R,) of best weighted accuracy; the middle one of those that are equally good."""
    order = scores.argsort(stable=True)
    ranked = scores[order]
    starts = torch.cat((torch.ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1])).nonzero().squeeze(1)
    distinct = ranked[starts]
    candidates = torch.cat((distinct[:1] - 1, (distinct[1:] + distinct[:-1]) / 2, distinct[-1:] + 1))
    # Raising the threshold past a pair wins its weight if it is an impostor and loses it if it is genuine.
    gain = (weights[:, order] * torch.where(same[order], -1.0, 1.0)).cumsum(1)
    ends = torch.cat((starts[1:] - 1, torch.tensor([len(ranked) - 1])))
    gain = F.pad(gain[:, ends], (1, 0))
    best = gain >= gain.amax(1, keepdim=True) - 1e-9
    rank = best.to(torch.int32).cumsum(1)
    middle = (rank == (rank[:, -1:] + 1) // 2).to(torch.uint8).argmax(1)
    return candidates[middle]


def checked_pairs(
    scores: Tensor, same: Tensor, what: str = "verification", classes: str = "genuine and impostor"
) -> tuple[Tensor, Tensor]:
    """Scores as float64 and ``same``, both (P,) and on the CPU.

    Raises:
        DataError: shapes differ, a score is not finite, or one class is absent; ``what`` says whose scores they are,
            ``classes`` what the two kinds of pairs are called.
    """
    if scores.ndim != 1 or same.shape != scores.shape or same.dtype != torch.bool:
        raise DataError(
            f"scores and same must be float (P,) and bool (P,), got {tuple(scores.shape)} and "
            f"{same.dtype} {tuple(same.shape)}"
        )
    scores, same = scores.detach().cpu().to(torch.float64), same.cpu()
    if not torch.isfinite(scores).all():
        raise DataError(f"{what} scores must be finite: an embedding holds NaN or infinity")
    if not same.any() or same.all():
        raise DataError(f"{what} needs both {classes} pairs")
    return scores, same


def _weights(weights: Tensor | None, pairs: int) -> Tensor:
    if weights is None:
        return torch.ones(1, pairs, dtype=torch.float64)
    if weights.ndim != 2 or weights.shape[1] != pairs:
        raise DataError(f"pair weights must be (R, {pairs}), got {tuple(weights.shape)}")
    return weights.cpu().to(torch.float64)
