r"""Confidence intervals over identities: by bootstrap of images, by influence functions of pairs.

Images of one person resemble each other, and so do pairs that share a person: an interval that treats them as
independent is too narrow.

*Per-image values* (SSIM, a Type I acceptance). Whole identities are drawn with replacement, ``K`` out of ``K``, each
with all its images (cluster bootstrap; Davison and Hinkley 1997, section 3.8; for biometrics the subsets bootstrap of
Bolle, Ratha and Pankanti, CVIU 93(1), 2004). Intervals are the percentile kind (Efron 1979): invariant under monotone
transforms, never outside the range of the statistic. With few identities, or rates near 0 or 1, they are somewhat
short. Functions called with generators of one state draw the same identities; differences of two conditions are
computed within each replicate, so they are paired.

*Pairs*. A statistic moves, to first order, by the mean of the influences :math:`\psi_p` of its pairs (Hampel 1974).
Two pairs depend on each other where they share a person, so the variance is the sum of :math:`\psi_p \psi_q` over
those that do: of two ways to cluster, by either person, less what both count (Cameron, Gelbach and Miller, J. Bus.
Econ. Stat. 29(2), 2011; of pairs within one population Aronow, Samii and Assenova, Political Analysis 23(4), 2015; for
1:1 matching Fogliato, Patil and Perona, IJCV 2024),

.. math:: V = \sum_i \Bigl(\sum_{p \ni i} \psi_p\Bigr)^2 - \sum_{p\ \text{of two people}} \psi_p^2.

Resampling people with product weights instead counts a pair of two people three times: where most people are in one
pair or two, as in LFW, its intervals are 1.3 to 1.6 times too wide. The interval of a share is symmetric on the logit
scale, hence within [0, 1]; where all pairs are judged alike it is Wilson's, of one trial for each of the people. A
difference of two conditions has a symmetric one. The quantile is Student's, with a degree of freedom less than there
are people. docs/metrics.md says how often these intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics.verification import Roc, best_threshold, checked_pairs, far_not_measurable, judged_right, roc

#: Replicates behind every interval; the ends of a 95 % interval then rest on 25 replicates each.
REPLICATES = 1000

_CHUNK_ELEMENTS = 2_000_000
#: Below this a spread is a matter of rounding.
_NOTHING = 1e-12
_FEW = "a confidence interval needs at least two identities"
#: Why a figure of which nothing is uncertain has no interval.
ALIKE = "no confidence interval: every resample gives the same value"


@dataclass(frozen=True, slots=True)
class VerificationEstimates:
    """Accuracy (mean over folds, LFW View 2), AUC and EER over all pairs; TAR by FAR over the genuine pairs."""

    accuracy: Estimate
    auc: Estimate
    eer: Estimate
    tar_at_far: Mapping[float, Estimate]


def draw_identities(identities: int, generator: torch.Generator, replicates: int = REPLICATES) -> Tensor:
    """How often each identity is drawn in each replicate: float64 (replicates, identities), rows sum to ``identities``.

    Example:
        >>> import torch
        >>> draw_identities(4, torch.Generator().manual_seed(0), replicates=3).sum(1)
        tensor([4., 4., 4.], dtype=torch.float64)
    """
    drawn = torch.randint(identities, (replicates, identities), generator=generator, device=generator.device).cpu()
    counts = torch.zeros(replicates, identities, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))


def _draws(identities: int, generator: torch.Generator, replicates: int, width: int) -> Iterator[Tensor]:
    """:func:`draw_identities`, so many replicates at a time that (r, ``width``) stays within some tens of megabytes."""
    rows = max(1, _CHUNK_ELEMENTS // max(width, identities))
    for start in range(0, replicates, rows):
        yield draw_identities(identities, generator, min(rows, replicates - start))


def mean_estimate(
    values: Tensor, identities: Tensor, generator: torch.Generator, *, replicates: int = REPLICATES
) -> Estimate:
    """Mean over images with its interval over identities; of differences of two conditions, a paired interval.

    Args:
        values: float or bool (N,), one per image; NaN where it cannot be measured for that image, which leaves it out.
        identities: int64 (N,), whose image it is.
        generator: source of the draws.
        replicates: how many resamples.

    Returns:
        The mean over the ``n`` images measured. No interval with fewer than two identities or where no replicate
        differs from another (all values alike): resampling then says nothing about the uncertainty.

    Raises:
        DataError: shapes differ or a value is infinite.

    Example:
        >>> import torch
        >>> values, people = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> mean_estimate(values, people, torch.Generator().manual_seed(0))
        Estimate(value=0.5, ci95=(0.0, 1.0), n=4, reason=None)
    """
    if values.ndim != 1 or identities.shape != values.shape:
        raise DataError(
            f"values and identities must share one shape (N,), got {tuple(values.shape)} and {tuple(identities.shape)}"
        )
    values, identities = values.detach().cpu().to(torch.float64), identities.cpu()
    if values.isinf().any():
        raise DataError("a per-image value is infinite")
    measured = ~values.isnan()
    values, identities = values[measured], identities[measured]
    if not len(values):
        return Estimate(None, None, 0, "it could not be measured for any image")
    people, cluster = torch.unique(identities, return_inverse=True)
    if len(people) < 2:
        return Estimate(float(values.mean()), None, len(values), _FEW)
    zeros = torch.zeros(len(people), dtype=torch.float64)
    # About the mean, so that equal values leave no rounding for a replicate to differ by.
    centre = values.mean()
    sums = zeros.scatter_add(0, cluster, values - centre)
    sizes = zeros.scatter_add(0, cluster, torch.ones_like(values))
    means = [
        (weights @ sums) / (weights @ sizes) for weights in _draws(len(people), generator, replicates, len(people))
    ]
    # No mean lies outside the values, but for rounding: a share that is 0 in a replicate was -1e-18.
    samples = (torch.cat(means) + centre).clamp(float(values.min()), float(values.max()))
    return interval(float(centre), samples, len(values))


def verification_estimates(
    scores: Tensor,
    same: Tensor,
    fold: Tensor,
    identities: Tensor,
    *,
    minus: Tensor | None = None,
    fars: Sequence[float] = (),
) -> VerificationEstimates:
    """Accuracy, AUC, EER and TAR@FAR with intervals over identities.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).
        fold: int64 (P,).
        identities: int64 (P, 2), the people of each pair.
        minus: float (P,), another condition's scores of the same pairs: what comes out are the differences to it, with
            paired intervals.
        fars: false-accept rates; one below a single impostor pair gets no value but the reason.

    Raises:
        DataError: shapes differ, scores are not finite, a class or a second fold is absent, or ``same`` contradicts the
            identities.
    """
    conditions = [checked_pairs(values, same)[0] for values in (scores, minus) if values is not None]
    same = same.cpu()
    people = People.of(identities, same)
    measured = [_influences(values, same, fold, people, fars) for values in conditions]
    values, influences = measured[0][:2]
    if minus is not None:
        values, influences = values - measured[1][0], influences - measured[1][1]
    genuine, everyone = int(same.sum()), len(same)
    counts = [everyone, everyone, everyone, *(genuine for _ in fars)]
    # Only accuracy has thresholds that are chosen.
    chosen = [sum(gap**2 / 2 for _, _, gap in measured), *(0.0 for _ in counts[1:])]
    accuracy, auc, eer, *tars = (
        people.estimate(float(value), influence, n, more=more, difference=minus is not None)
        for value, influence, n, more in zip(values, influences, counts, chosen, strict=True)
    )
    reasons = [far_not_measurable(far, everyone - genuine) for far in fars]
    tars = [Estimate(None, None, genuine, why) if why else tar for tar, why in zip(tars, reasons, strict=True)]
    return VerificationEstimates(accuracy, auc, eer, dict(zip(fars, tars, strict=True)))


def _influences(
    scores: Tensor, same: Tensor, fold: Tensor, people: People, fars: Sequence[float]
) -> tuple[Tensor, Tensor, float]:
    """Accuracy, AUC, EER, then a TAR per FAR: values (S,) and the influences of the pairs, float64 (S, P).

    And the gap of the accuracy to that under the best threshold of all. To first order, choosing thresholds changes
    nothing; but they converge slowly (as the cube root of the pairs; Kim and Pollard, Ann. Stat. 18(1), 1990), and what
    they cost varies. In simulations half the squared gap is what the influences leave of the variance.
    """
    genuine, impostors = int(same.sum()), int((~same).sum())
    right, curve = judged_right(scores, same, fold).to(torch.float64), roc(scores, same)
    accuracies = torch.stack([right[fold.cpu() == number].mean() for number in torch.unique(fold.cpu())])
    _, number, size = torch.unique(fold.cpu(), return_inverse=True, return_counts=True)
    share = 1 / (len(size) * size[number].double())
    # By kind: how many pairs of each there are is the protocol's, not chance.
    of_kind = torch.bincount(same.long(), weights=right * share) / torch.bincount(same.long(), weights=share)
    values, rows = [accuracies.mean()], [(right - of_kind[same.long()]) * share]
    # Of each pair the share of the other kind on the wrong side of it, ties one half (DeLong et al., 1988).
    auc, rank = curve.auc(), torch.searchsorted(-curve.thresholds, -scores)
    far, tar = ((share[rank] + share[rank - 1]) / 2 for share in (curve.far, curve.tar))
    values.append(torch.tensor(auc, dtype=torch.float64))
    rows.append(torch.where(same, (1 - far - auc) / genuine, (tar - auc) / impostors))

    # Where 1 - TAR(e) = e, a rise of FAR at the threshold moves e by m / (1 + m) and one of TAR by -1 / (1 + m).
    by_far, by_tar, slope = _accepted(scores, same, people, curve, int((curve.far + curve.tar - 1).abs().argmin()))
    values.append(torch.tensor(curve.eer(), dtype=torch.float64))
    rows.append((slope * by_far - by_tar) / (1 + slope))
    for rate in fars:
        values.append(torch.tensor(curve.tar_at_far(rate), dtype=torch.float64))
        rows.append(_on_tar(scores, same, people, curve, rate))
    gap = float(((scores >= best_threshold(scores, same)) == same).double().mean() - values[0])
    return torch.stack(values), torch.stack(rows), gap


def _accepted(scores: Tensor, same: Tensor, people: People, curve: Roc, point: int) -> tuple[Tensor, Tensor, float]:
    """The influences of the pairs on FAR and TAR at a point of the curve, float64 (P,) both, and its slope there."""
    passed = (scores >= curve.thresholds[point]).to(torch.float64)
    by_far = torch.where(same, 0.0, (passed - curve.far[point]) / (~same).sum())
    by_tar = torch.where(same, (passed - curve.tar[point]) / same.sum(), 0.0)
    return by_far, by_tar, _slope(curve, point, float(people.variance(by_far)) ** 0.5)


def _on_tar(scores: Tensor, same: Tensor, people: People, curve: Roc, far: float) -> Tensor:
    """The influences of the pairs on the TAR at a FAR, float64 (P,): the threshold moves with them."""
    by_far, by_tar, slope = _accepted(scores, same, people, curve, curve.at_far(far))
    return by_tar - slope * by_far


def tar_estimates(
    scores: Tensor, same: Tensor, fars: Sequence[float], identities: Tensor | None, why: str = _FEW
) -> dict[float, Estimate]:
    """TAR at each FAR of many pairs, with intervals over identities as :func:`verification_estimates` has them.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).
        fars: false-accept rates; one below a single impostor pair gets no value but the reason.
        identities: int64 (P, 2), the people of each pair; None where nobody knows, and there are no intervals.
        why: there are none.

    Raises:
        DataError: shapes differ, scores are not finite, a class is absent, or ``same`` contradicts the identities.
    """
    scores, same = checked_pairs(scores, same)
    curve, genuine = roc(scores, same), int(same.sum())
    people = None if identities is None else People.of(identities, same)

    def estimate(far: float) -> Estimate:
        if (reason := far_not_measurable(far, len(same) - genuine)) is not None:
            return Estimate(None, None, genuine, reason)
        value = curve.tar_at_far(far)
        if people is None:
            return Estimate(value, None, genuine, why)
        return people.estimate(value, _on_tar(scores, same, people, curve, far), genuine)

    return {far: estimate(far) for far in fars}


def _slope(curve: Roc, point: int, error: float) -> float:
    """dTAR / dFAR at a point of the curve, over the 95 % interval that the standard ``error`` of FAR leaves open there.

    A derivative of a step function needs a width, and this is where the threshold may lie (numerical delta method;
    Hong and Li, J. Econometrics 206(2), 2018).
    """
    far = float(curve.far[point])
    if not error:
        return 0.0
    # By a factor either way, as the curve is straighter over the logarithm of a small FAR.
    factor = 1 + 2 * error / far
    low, high = curve.at_far(far / factor), curve.at_far(min(1.0, far * factor))
    width = float(curve.far[high] - curve.far[low])
    if width and (least := float(curve.far[low])):
        width = far * math.log(float(curve.far[high]) / least)
    return float(curve.tar[high] - curve.tar[low]) / width if width else 0.0


@dataclass(frozen=True, slots=True)
class People:
    """Who is in which of P pairs, and what that means for a statistic of them.

    Attributes:
        of_pair: int64 (P, 2), numbered 0..K-1.
        same: bool (P,), whether both are one person.
        count: how many people there are, of those in genuine or in impostor pairs the fewer.
    """

    of_pair: Tensor
    same: Tensor
    count: int

    @classmethod
    def of(cls, identities: Tensor, same: Tensor) -> People:
        """The people of pairs.

        Args:
            identities: int64 (P, 2).
            same: bool (P,), on the CPU.

        Raises:
            DataError: shapes differ, or ``same`` contradicts the identities.
        """
        if identities.shape != (len(same), 2):
            raise DataError(f"identities of the pairs must be ({len(same)}, 2), got {tuple(identities.shape)}")
        of_pair = torch.unique(identities.cpu(), return_inverse=True)[1]
        if not torch.equal(of_pair[:, 0] == of_pair[:, 1], same):
            raise DataError("the pairs contradict the identities: `same` must hold exactly within a person")
        return cls(of_pair, same, min(len(torch.unique(of_pair[kind])) for kind in (same, ~same)))

    def variance(self, influence: Tensor) -> Tensor:
        """Variance (...) of statistics from the influences of the pairs on them, float64 (..., P).

        A person's pairs are left out as in the jackknife: the others' mean moves by what those in them exceed it, over
        the share that is left. Without that, whoever is in many pairs would hide in the mean.
        """
        people = int(self.of_pair.max()) + 1
        sums = influence.new_zeros(*influence.shape[:-1], people)
        for kind in (self.same, ~self.same):
            # Both people of an impostor pair, the one of a genuine pair once.
            ends = self.of_pair[kind][:, :1] if bool(self.same[kind][0]) else self.of_pair[kind]
            left = 1 - torch.bincount(ends.flatten(), minlength=people) / kind.sum()
            of_kind = torch.zeros_like(sums)
            for end in ends.T:
                of_kind.index_add_(-1, end, influence[..., kind])
            sums += of_kind / left.clamp(min=0.5)
        squares = influence.square()
        twice = torch.where(self.same, 0.0, squares).sum(-1)
        shared = sums.square().sum(-1) * (1 - 1 / people) - twice
        # Sharing people makes an estimate no surer than if all pairs were independent.
        return torch.maximum(shared, squares.sum(-1))

    def estimate(
        self, value: float, influence: Tensor, n: int, *, more: float = 0.0, difference: bool = False
    ) -> Estimate:
        """A statistic in [0, 1], or a ``difference`` of two, with its interval.

        Args:
            value: the statistic.
            influence: float64 (P,), of each pair on it.
            n: what it counts.
            more: variance that the influences do not know of.
            difference: of two conditions.
        """
        if self.count < 2:
            return Estimate(value, None, n, _FEW)
        from scipy import special  # here, as this module is loaded where nothing is measured, too

        error = math.sqrt(float(self.variance(influence)) + more)
        quantile = float(special.stdtrit(self.count - 1, 0.975))  # of Student's t
        if difference:
            if error <= _NOTHING:
                return Estimate(value, None, n, ALIKE)
            return Estimate(value, (max(-1.0, value - quantile * error), min(1.0, value + quantile * error)), n)
        spread = value * (1 - value)
        if min(error, spread) <= _NOTHING:
            return Estimate(value, wilson(value, self.count, quantile), n)
        low, high = special.expit(special.logit(value) + quantile * error / spread * np.array([-1.0, 1.0])).tolist()
        return Estimate(value, (low, high), n)


def mean_of_independent(parts: Sequence[Estimate]) -> Estimate:
    """The mean of figures of different people, with its interval from theirs (Zou and Donner, Stat. Med. 27, 2008).

    Example:
        >>> mean_of_independent([Estimate(0.5, (0.2, 0.9), 10), Estimate(0.7, (0.4, 0.7), 20)])
        Estimate(value=0.6, ci95=(0.3878..., 0.8), n=30, reason=None)
    """
    count = sum(part.n for part in parts)
    values = [part.value for part in parts if part.value is not None]
    if len(values) < len(parts):
        return Estimate(None, None, count, next(part.reason for part in parts if part.value is None))
    value = math.fsum(values) / len(values)
    ends = [part.ci95 for part in parts if part.ci95 is not None]
    if len(ends) < len(parts):
        return Estimate(value, None, count, next(part.reason for part in parts if part.ci95 is None))
    low, high = (
        math.hypot(*(one - end[side] for one, end in zip(values, ends, strict=True))) / len(values) for side in (0, 1)
    )
    return Estimate(value, (value - low, value + high), count)


def wilson(share: float, trials: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share (J. Am. Stat. Assoc. 22, 1927); ``trials`` need be no whole number.

    Example:
        >>> [round(end, 3) for end in wilson(0.9, 10, 1.96)]
        [0.596, 0.982]
    """
    weight = quantile**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = (share * (1 - share) * weight + weight**2 / 4) ** 0.5 / (1 + weight)
    # The ends of 0 and of 1 are these, but for rounding.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def interval(value: float, samples: Tensor, n: int) -> Estimate:
    """An estimate with the percentile interval of its resamples.

    Args:
        value: the estimate.
        samples: float64 (R,).
        n: what the estimate counts.
    """
    if samples.max() - samples.min() <= _NOTHING:
        return Estimate(value, None, n, ALIKE)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, (low, high), n)
