"""Verification statistics: LFW accuracy, ROC AUC, EER and TAR@FAR, exact.

A *score* is a similarity; a pair is accepted when its score reaches the threshold. All sums run in float64 on the CPU.
Their intervals are in :mod:`bench.metrics.bootstrap`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.faces import PairProtocol
from bench.errors import DataError


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
        far: float64 (T,), share of impostor pairs accepted.
        tar: float64 (T,), share of genuine pairs accepted.
    """

    thresholds: Tensor
    far: Tensor
    tar: Tensor

    def auc(self) -> float:
        """Area under the curve; ties count one half, as in the Mann-Whitney statistic."""
        return float(torch.trapezoid(self.tar, self.far))

    def eer(self) -> float:
        """Equal error rate: where FAR = FRR on the curve, linear between its points."""
        gap = self.far - (1 - self.tar)
        # From -1 to +1 and never falling: the first point at or above zero ends the segment that crosses.
        after = max(1, int((gap >= 0).to(torch.uint8).argmax()))
        gap0, gap1, far0, far1 = (float(values[i]) for values in (gap, self.far) for i in (after - 1, after))
        return far0 - gap0 / (gap1 - gap0) * (far1 - far0)

    def at_far(self, far: float) -> int:
        """The point of the largest FAR that does not exceed ``far``, and of its points the last."""
        # FAR is a quotient of counts: 3/300 must pass 0.01 however either is rounded.
        return int((self.far <= far + 1e-12).sum()) - 1

    def tar_at_far(self, far: float) -> float:
        """Largest TAR whose FAR does not exceed ``far``; no interpolation, so never flattering."""
        return float(self.tar[self.at_far(far)])

    def threshold_at_far(self, far: float) -> Tensor:
        """Lowest threshold whose FAR does not exceed ``far``, (R,): that of :meth:`tar_at_far`."""
        allowed = self.far <= far + 1e-12
        return torch.where(allowed, self.thresholds, torch.inf).amin(-1)


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


def roc(scores: Tensor, same: Tensor) -> Roc:
    """The exact ROC: one point per distinct score, and the origin.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).

    Raises:
        DataError: shapes differ, a score is not finite, or there are no genuine or no impostor pairs.

    Example:
        >>> import torch
        >>> curve = roc(torch.tensor([0.9, 0.4, 0.5, 0.1]), torch.tensor([True, True, False, False]))
        >>> curve.auc(), curve.eer(), curve.tar_at_far(0.5)
        (0.75, 0.5, 1.0)
    """
    scores, same = checked_pairs(scores, same)
    order = scores.argsort(descending=True, stable=True)
    ranked = scores[order]
    # Equal scores are accepted together: only the last of each run is a point of the curve.
    ends = torch.cat((ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool))).nonzero().squeeze(1)
    genuine = same[order]
    far, tar = (F.pad(mask.cumsum(0)[ends].to(torch.float64) / mask.sum(), (1, 0)) for mask in (~genuine, genuine))
    return Roc(torch.cat((torch.tensor([torch.inf], dtype=torch.float64), ranked[ends])), far, tar)


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
    right = judged_right(scores, same, fold).to(torch.float64)
    accuracies = torch.stack([right[fold.cpu() == number].mean() for number in torch.unique(fold.cpu())])
    threshold = best_threshold(*checked_pairs(scores, same))
    return Accuracy(float(accuracies.mean()), float(accuracies.std(correction=0)), threshold)


def judged_right(scores: Tensor, same: Tensor, fold: Tensor) -> Tensor:
    """Whether each pair is told apart right under the threshold chosen on the other folds, bool (P,).

    Takes and raises what :func:`lfw_accuracy` does.
    """
    scores, same = checked_pairs(scores, same)
    if fold.shape != scores.shape:
        raise DataError(f"folds must be (P,) like the {len(scores)} scores, got {tuple(fold.shape)}")
    folds = torch.unique(fold.cpu())
    if len(folds) < 2:
        raise DataError("LFW accuracy needs at least two folds: the threshold is chosen on the others")
    right = torch.empty_like(same)
    for number in folds.tolist():
        test = fold.cpu() == number
        right[test] = (scores[test] >= best_threshold(scores[~test], same[~test])) == same[test]
    return right


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold of best accuracy; the middle one of those that are equally good."""
    order = scores.argsort(stable=True)
    ranked = scores[order]
    starts = torch.cat((torch.ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1])).nonzero().squeeze(1)
    distinct = ranked[starts]
    candidates = torch.cat((distinct[:1] - 1, (distinct[1:] + distinct[:-1]) / 2, distinct[-1:] + 1))
    # Raising the threshold past a pair wins it if it is an impostor and loses it if it is genuine.
    gain = torch.where(same[order], -1, 1).cumsum(0)
    ends = torch.cat((starts[1:] - 1, torch.tensor([len(ranked) - 1])))
    gain = F.pad(gain[ends], (1, 0))
    best = (gain == gain.max()).nonzero().squeeze(1)
    return float(candidates[best[(len(best) - 1) // 2]])


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
