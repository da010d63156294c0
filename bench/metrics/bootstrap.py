"""Confidence intervals by bootstrap over identities.

Images of one person resemble each other, and so do pairs that share a person: an interval that treats them as
independent is too narrow. Here whole identities are drawn with replacement, ``K`` out of ``K``.

* *Per-image values* (SSIM, a Type I acceptance): a replicate takes all images of every identity drawn, as often as it
  was drawn (cluster bootstrap; Davison and Hinkley 1997, section 3.8; for biometrics the subsets bootstrap of Bolle,
  Ratha and Pankanti, CVIU 93(1), 2004).
* *Pairs*: an identity drawn ``w_i`` times gives its genuine pairs the weight ``w_i`` and a pair of two people
  ``w_i * w_j`` (vertex bootstrap; Snijders and Borgatti, Connections 22(2), 1999; product weights as in Owen, Ann.
  Appl. Stat. 1(2), 2007; reviewed for 1:1 matching by Fogliato, Patil and Perona, IJCV 2024). Copies of one person are
  not paired with each other as impostors.

Intervals are the percentile kind (Efron 1979): invariant under monotone transforms, never outside the range of the
statistic. With few identities, or rates near 0 or 1, they are somewhat short. Functions called with generators of one
state draw the same identities; differences of two conditions are computed within each replicate, so they are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics.verification import checked_pairs, far_not_measurable, fold_accuracies, roc

#: Replicates behind every interval; the ends of a 95 % interval then rest on 25 replicates each.
REPLICATES = 1000

_CHUNK_ELEMENTS = 2_000_000
_FEW = "a confidence interval needs at least two identities"


@dataclass(frozen=True, slots=True)
class VerificationEstimates:
    """Verification statistics with intervals.

    Attributes:
        accuracy: mean accuracy over folds (LFW View 2); over all pairs.
        auc: area under the ROC; over all pairs.
        eer: equal error rate; over all pairs.
        tar_at_far: TAR by FAR; over the genuine pairs.
    """

    accuracy: Estimate
    auc: Estimate
    eer: Estimate
    tar_at_far: Mapping[float, Estimate] = field(default_factory=dict)


def draw_identities(identities: int, generator: torch.Generator, replicates: int = REPLICATES) -> Tensor:
    """How often each identity is drawn in each replicate: float64 (replicates, identities), rows sum to ``identities``.

    Example:
        >>> import torch
        >>> draw_identities(4, torch.Generator().manual_seed(0), replicates=3).sum(1)
        tensor([4., 4., 4.], dtype=torch.float64)
    """
    if identities < 1 or replicates < 1:
        raise DataError(f"a bootstrap needs identities and replicates, got {identities} and {replicates}")
    drawn = torch.randint(identities, (replicates, identities), generator=generator, device=generator.device).cpu()
    counts = torch.zeros(replicates, identities, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))


def resampled_pairs(
    identities: Tensor, same: Tensor, generator: torch.Generator, replicates: int = REPLICATES
) -> Iterator[Tensor]:
    """Weights of P pairs in each replicate, some replicates at a time: float64 (r, P).

    Args:
        identities: int64 (P, 2), the people of each pair.
        same: bool (P,), on the CPU.
        generator: source of the draws.
        replicates: how many resamples in all.

    Raises:
        DataError: shapes differ, or ``same`` contradicts the identities.
    """
    if identities.shape != (len(same), 2):
        raise DataError(f"identities of the pairs must be ({len(same)}, 2), got {tuple(identities.shape)}")
    people, index = torch.unique(identities.cpu(), return_inverse=True)
    if not torch.equal(index[:, 0] == index[:, 1], same):
        raise DataError("the pairs contradict the identities: `same` must hold exactly within a person")
    rows = max(1, _CHUNK_ELEMENTS // max(len(same), len(people)))
    for start in range(0, replicates, rows):
        drawn = draw_identities(len(people), generator, min(rows, replicates - start))
        weights = drawn[:, index[:, 0]]
        yield torch.where(same, weights, weights * drawn[:, index[:, 1]])


def mean_estimate(
    values: Tensor, identities: Tensor, generator: torch.Generator, *, replicates: int = REPLICATES
) -> Estimate:
    """Mean over images with its interval over identities.

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
    # Never more replicates at once than fit some tens of megabytes, however many people there are.
    rows = max(1, _CHUNK_ELEMENTS // len(people))
    means = []
    for start in range(0, replicates, rows):
        weights = draw_identities(len(people), generator, min(rows, replicates - start))
        means.append((weights @ sums) / (weights @ sizes))
    return interval(float(centre), torch.cat(means) + centre, len(values))


def difference_estimate(
    first: Tensor,
    second: Tensor,
    identities: Tensor,
    generator: torch.Generator,
    *,
    replicates: int = REPLICATES,
) -> Estimate:
    """Mean of ``first - second`` on the same victims, with its paired interval over identities.

    Args:
        first: (N,), one condition.
        second: (N,), the other, of the same images in the same order; an image counts if measured in both.
        identities: int64 (N,).
        generator: source of the draws.
        replicates: how many resamples.

    Raises:
        DataError: as :func:`mean_estimate`.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([0.50, 0.75, 1.00]), torch.tensor([0.25, 0.25, 0.25])
        >>> difference_estimate(a, b, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)).value
        0.5
    """
    if first.shape != second.shape:
        raise DataError(
            f"paired conditions need values of the same images, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return mean_estimate(
        first.cpu().to(torch.float64) - second.cpu().to(torch.float64), identities, generator, replicates=replicates
    )


def verification_estimates(
    scores: Tensor,
    same: Tensor,
    fold: Tensor,
    identities: Tensor,
    generator: torch.Generator,
    *,
    fars: Sequence[float] = (),
    replicates: int = REPLICATES,
) -> VerificationEstimates:
    """Accuracy, AUC, EER and TAR@FAR with intervals over identities.

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,).
        fold: int64 (P,).
        identities: int64 (P, 2), the people of each pair.
        generator: source of the draws.
        fars: false-accept rates; one below a single impostor pair gets no value but the reason.
        replicates: how many resamples.

    Raises:
        DataError: shapes differ, scores are not finite, a class or a second fold is absent, or ``same`` contradicts the
            identities.
    """
    points, samples = _statistics(scores, same, fold, identities, generator, fars, replicates)
    return _estimates(points, samples, same, fars)


def verification_differences(
    first: Tensor,
    second: Tensor,
    same: Tensor,
    fold: Tensor,
    identities: Tensor,
    generator: torch.Generator,
    *,
    fars: Sequence[float] = (),
    replicates: int = REPLICATES,
) -> VerificationEstimates:
    """``first`` minus ``second``: two conditions scored on the same pairs, with paired intervals.

    Args:
        first: float (P,), scores of one condition.
        second: float (P,), scores of the other.
        same, fold, identities, generator, fars, replicates: as :func:`verification_estimates`.

    Raises:
        DataError: as :func:`verification_estimates`.
    """
    if first.shape != second.shape:
        raise DataError(
            f"paired conditions need scores of the same pairs, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    state = generator.get_state()
    points, samples = _statistics(first, same, fold, identities, generator, fars, replicates)
    generator.set_state(state)  # the same people are drawn again
    other_points, other_samples = _statistics(second, same, fold, identities, generator, fars, replicates)
    return _estimates(points - other_points, samples - other_samples, same, fars)


def _statistics(
    scores: Tensor,
    same: Tensor,
    fold: Tensor,
    identities: Tensor,
    generator: torch.Generator,
    fars: Sequence[float],
    replicates: int,
) -> tuple[Tensor, Tensor]:
    """Statistics (S,) of the sample and (R, S) of its resamples: accuracy, AUC, EER, then one TAR per FAR."""
    scores, same = checked_pairs(scores, same)

    def evaluate(weights: Tensor | None) -> Tensor:
        accuracies = fold_accuracies(scores, same, fold, weights)
        curve = roc(scores, same, weights)
        tars = [curve.tar_at_far(far) for far in fars]
        # A fold that a replicate left empty says nothing about it: the mean is over the others.
        return torch.stack([accuracies.nanmean(1), curve.auc(), curve.eer(), *tars], 1)

    samples = [evaluate(weights) for weights in resampled_pairs(identities, same, generator, replicates)]
    return evaluate(None)[0], torch.cat(samples)


def _estimates(points: Tensor, samples: Tensor, same: Tensor, fars: Sequence[float]) -> VerificationEstimates:
    pairs, genuine = len(same), int(same.sum())
    accuracy, auc, eer = (interval(float(points[i]), samples[:, i], pairs) for i in range(3))
    tars = {}
    for column, far in enumerate(fars, start=3):
        reason = far_not_measurable(far, pairs - genuine)
        tars[far] = (
            interval(float(points[column]), samples[:, column], genuine)
            if reason is None
            else Estimate(None, None, genuine, reason)
        )
    return VerificationEstimates(accuracy, auc, eer, tars)


def interval(value: float, samples: Tensor, n: int, *, moved: bool = False) -> Estimate:
    """An estimate with the percentile interval of its resamples.

    Args:
        value: the estimate.
        samples: float64 (R,), NaN where a replicate has none.
        n: what the estimate counts.
        moved: move the replicates' mean to the estimate, for a statistic that the noise of resampling biases, and the
            interval's ends so far out that it holds the estimate.
    """
    defined = samples[~samples.isnan()]
    # Dropping a few replicates that drew no impostor pair is harmless; losing many would bias the interval.
    if len(defined) < 0.95 * len(samples):
        return Estimate(value, None, n, "too few identities: many resamples hold pairs of one kind only")
    if defined.max() - defined.min() <= 1e-12:
        return Estimate(value, None, n, "no confidence interval: every resample gives the same value")
    low, high = torch.quantile(defined, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if moved:
        shift = value - float(defined.mean())
        low, high = min(low + shift, value), max(high + shift, value)
    return Estimate(value, (low, high), n)
