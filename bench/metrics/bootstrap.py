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
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics.verification import checked_pairs, far_not_measurable, fold_accuracies, roc

#: Replicates behind every interval; the ends of a 95 % interval then rest on 25 replicates each.
REPLICATES = 1000

_CHUNK_ELEMENTS = 2_000_000
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
    for drawn in _draws(len(people), generator, replicates, len(same)):
        weights = drawn[:, index[:, 0]]
        yield torch.where(same, weights, weights * drawn[:, index[:, 1]])


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
    return interval(float(centre), torch.cat(means) + centre, len(values))


def verification_estimates(
    scores: Tensor,
    same: Tensor,
    fold: Tensor,
    identities: Tensor,
    generator: torch.Generator,
    *,
    minus: Tensor | None = None,
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
        minus: float (P,), another condition's scores of the same pairs: what comes out are the differences to it, with
            paired intervals.
        fars: false-accept rates; one below a single impostor pair gets no value but the reason.
        replicates: how many resamples.

    Raises:
        DataError: shapes differ, scores are not finite, a class or a second fold is absent, or ``same`` contradicts the
            identities.
    """
    conditions = [checked_pairs(values, same)[0] for values in (scores, minus) if values is not None]
    same = same.cpu()

    def statistics(weights: Tensor | None) -> Tensor:
        """(R, S): accuracy, AUC, EER, then one TAR per FAR."""
        rows = []
        for values in conditions:
            accuracies, curve = fold_accuracies(values, same, fold, weights), roc(values, same, weights)
            tars = [curve.tar_at_far(far) for far in fars]
            # A fold that a replicate left empty says nothing about it: the mean is over the others.
            rows.append(torch.stack([accuracies.nanmean(1), curve.auc(), curve.eer(), *tars], 1))
        return rows[0] if minus is None else rows[0] - rows[1]

    points = statistics(None)[0].tolist()
    samples = torch.cat([statistics(w) for w in resampled_pairs(identities, same, generator, replicates)])
    genuine = int(same.sum())
    tars = {}
    for column, far in enumerate(fars, start=3):
        reason = far_not_measurable(far, len(same) - genuine)
        tars[far] = (
            interval(points[column], samples[:, column], genuine)
            if reason is None
            else Estimate(None, None, genuine, reason)
        )
    accuracy, auc, eer = (interval(points[i], samples[:, i], len(same)) for i in range(3))
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
        return Estimate(value, None, n, ALIKE)
    low, high = torch.quantile(defined, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if moved:
        shift = value - float(defined.mean())
        low, high = min(low + shift, value), max(high + shift, value)
    return Estimate(value, (low, high), n)
