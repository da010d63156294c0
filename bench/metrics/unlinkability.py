"""Unlinkability: how far an attacker who compares two protected faces learns that they show one person.

Gomez-Barrero, Galbally, Rathgeb and Busch, *General Framework to Evaluate Unlinkability in Biometric Template
Protection Systems*, IEEE TIFS 13(6), 2018. With mated scores (one person) and non-mated scores (two people), priors
alike (omega = 1):

* LR(s) = p(s | mated) / p(s | non-mated);
* D(s) = 0 where LR(s) <= 1, else 2 LR(s) / (1 + LR(s)) - 1: the *local* measure, 1 where only mated pairs score s;
* D_sys = integral of D(s) p(s | mated) ds: 0 is unlinkable, 1 fully linkable.

Densities are histograms, as in the authors' method. Theirs has bins of equal width, min(M / 10, 100) of them for M
mated scores. D_sys does not change under a monotone map of the scores, but such bins do, and a single outlier empties
most of them. Here bins are of equal *mass*, both classes weighing one half: ranks alone decide.

How many bins? D_sys is the expectation of a convex function of LR that vanishes at LR = 1, hence an f-divergence:
merging bins can only lower it, while sampling noise can only raise its expectation (Jensen), above all where the truth
is 0. For two samples of one distribution, of M and N scores in B bins, the expectation is at most about

    0.1995 sqrt(r) + r / 8   with   r = B (1/M + 1/N)

(the excess of mated over non-mated share in a bin is about normal, of variance r / B^2). :func:`choose_bins` takes as
many bins, at most the authors' 100, as keep this below :data:`LARGEST_BIAS`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.measures import Estimate
from bench.metrics.bootstrap import People
from bench.metrics.verification import checked_pairs

#: What D_sys of an unlinkable system may come to by chance, on average.
LARGEST_BIAS = 0.05
_MOST_BINS = 100


def chance_level(bins: int, mated: int, non_mated: int) -> float:
    """What D_sys comes to at most, on average, where both classes have one distribution and scores are independent.

    Of ``bins`` bins of equal mass and so many mated and non-mated scores.

    Example:
        >>> round(chance_level(70, 3000, 3000), 3)
        0.049
    """
    ratio = bins * (1 / mated + 1 / non_mated)
    return math.sqrt(ratio) / (2 * math.sqrt(2 * math.pi)) + ratio / 8


def choose_bins(mated: int, non_mated: int) -> int:
    """The largest even number of bins, from 2 to 100, whose :func:`chance_level` is at most :data:`LARGEST_BIAS`.

    Even, so that one edge is the common median: scores that do not overlap are told apart whatever the number. Below
    some 80 scores of each class not even two bins keep the bias that low.

    Example:
        >>> choose_bins(3000, 3000), choose_bins(300, 300), choose_bins(30, 30)
        (72, 6, 2)
    """
    bins = _MOST_BINS
    while bins > 2 and chance_level(bins, mated, non_mated) > LARGEST_BIAS:
        bins -= 2
    return bins


def unlinkability(scores: Tensor, same: Tensor, *, bins: int | None = None) -> float:
    """D_sys, in [0, 1].

    Args:
        scores: float (P,), higher is more alike.
        same: bool (P,), whether the pair is mated.
        bins: how many, of equal mass; fewer come out where scores tie. None for :func:`choose_bins`.

    Raises:
        DataError: shapes differ, a score is not finite, or one class is absent.

    Example:
        >>> import torch
        >>> same = torch.tensor([True] * 4 + [False] * 4)
        >>> unlinkability(torch.tensor([0.6, 0.7, 0.8, 0.9, 0.1, 0.2, 0.3, 0.4]), same)
        1.0
        >>> unlinkability(torch.tensor([0.1, 0.2, 0.8, 0.9, 0.1, 0.2, 0.8, 0.9]), same)
        0.0
    """
    return _d_sys(scores, same, bins)[0]


def unlinkability_estimate(scores: Tensor, same: Tensor, identities: Tensor) -> Estimate:
    """D_sys with its interval over identities, as in :mod:`bench.metrics.bootstrap`; bins stay as they are.

    Args:
        scores, same: as :func:`unlinkability`.
        identities: int64 (P, 2), the people of each pair.

    Raises:
        DataError: as :func:`unlinkability`, or ``same`` contradicts the identities.

    Example:
        >>> people = torch.combinations(torch.arange(8), with_replacement=True)
        >>> same = people[:, 0] == people[:, 1]
        >>> estimate = unlinkability_estimate(same.float(), same, people)
        >>> estimate.value, [round(end, 2) for end in estimate.ci95]
        (1.0, [0.59, 1.0])
    """
    value, influence = _d_sys(scores, same, None)
    return People.of(identities, same.cpu()).estimate(value, influence, len(scores))


def _d_sys(scores: Tensor, same: Tensor, bins: int | None) -> tuple[float, Tensor]:
    """D_sys, and the influence of each pair on it, float64 (P,)."""
    scores, same = checked_pairs(scores, same, "linkage", "mated and non-mated")
    edges = _edges(scores, same, bins)
    bin_of = torch.bucketize(scores, edges, right=True)
    p, q = (torch.bincount(bin_of[kind], minlength=len(edges) + 1).double() / kind.sum() for kind in (same, ~same))
    # D(s) of each bin: 2 LR / (1 + LR) - 1 = (p - q) / (p + q), which needs no care where q is 0.
    total, linked = p + q, p > q
    value = float((p[linked] * (p - q)[linked] / total[linked]).sum())
    # Derivatives of p (p - q) / (p + q) by p and by q.
    square = torch.where(linked, total, 1.0).square()
    by_p = torch.where(linked, (p.square() + 2 * p * q - q.square()) / square, 0.0)
    by_q = torch.where(linked, -2 * p.square() / square, 0.0)
    mated, non_mated = (
        (by[bin_of] - (by * share).sum()) / n for by, share, n in ((by_p, p, same.sum()), (by_q, q, (~same).sum()))
    )
    return value, torch.where(same, mated, non_mated)


def _edges(scores: Tensor, same: Tensor, bins: int | None) -> Tensor:
    """Edges between bins of equal mass, each class weighing one half."""
    mated, non_mated = int(same.sum()), int((~same).sum())
    if bins is None:
        bins = choose_bins(mated, non_mated)
    order = scores.argsort(stable=True)
    ranked = scores[order]
    mass = torch.where(same[order], 0.5 / mated, 0.5 / non_mated).cumsum(0)
    # Where a share of the mass ends is a matter of rounding: half a score's weight decides nothing else.
    slack = 0.25 / max(mated, non_mated)
    wanted = torch.arange(1, bins, dtype=torch.float64) / bins - slack
    last = torch.searchsorted(mass, wanted).clamp_max(len(ranked) - 2)
    below, above = ranked[last], ranked[last + 1]
    # Equal scores share a bin; an edge through them goes to their upper end.
    tied = below == above
    upper = torch.searchsorted(ranked, below, right=True).clamp_max(len(ranked) - 1)
    edges = torch.where(tied, (below + ranked[upper]) / 2, (below + above) / 2)
    distinct: Tensor = torch.unique(edges[edges > ranked[0]])
    return distinct
