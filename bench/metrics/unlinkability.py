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

*Maximal linkability* (Otroshi Shahreza, Shkel and Marcel, *Measuring Linkability of Protected Biometric Templates Using
Maximal Leakage*, IEEE TIFS 18, 2023) is the maximal leakage from "mated or not" to the score, in bits:

    M = log2 sum over bins of max(p, q) = log2(1 + TV),   TV = sum of the positive parts of p - q

with p and q the shares of mated and of non-mated scores in a bin and TV their total variation distance. Whatever
scores are taken for mated, TMR - FMR is at most TV, so M bounds every such test (:func:`tmr_bound`). TV is an
f-divergence too, so what was said of bins holds: for two samples of one distribution the expectation of M is at most
log2(1 + 0.3989 sqrt(r)), as the logarithm is concave. The authors have 30 bins of equal width; here they are of equal
mass, and fewer where D_sys has fewer than 30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measures import Estimate
from bench.metrics.bootstrap import People
from bench.metrics.verification import checked_pairs

#: What D_sys of an unlinkable system may come to by chance, on average.
LARGEST_BIAS = 0.05
_MOST_BINS = 100
#: Bins of maximal linkability, as its authors have them.
_MAXIMAL_BINS = 30


def chance_level(bins: int, mated: int, non_mated: int) -> float:
    """What D_sys comes to at most, on average, where both classes have one distribution and scores are independent.

    Of ``bins`` bins of equal mass and so many mated and non-mated scores.

    Example:
        >>> round(chance_level(70, 3000, 3000), 3)
        0.049
    """
    ratio = bins * (1 / mated + 1 / non_mated)
    return math.sqrt(ratio) / (2 * math.sqrt(2 * math.pi)) + ratio / 8


def maximal_chance_level(bins: int, mated: int, non_mated: int) -> float:
    """What maximal linkability comes to at most, in bits, on average, where :func:`chance_level` says it of D_sys.

    Example:
        >>> round(maximal_chance_level(30, 3000, 3000), 3)
        0.079
    """
    ratio = bins * (1 / mated + 1 / non_mated)
    return math.log2(1 + math.sqrt(ratio / (2 * math.pi)))


def choose_bins(mated: int, non_mated: int, most: int = _MOST_BINS) -> int:
    """The largest even number of bins, from 2 to ``most``, whose :func:`chance_level` is at most :data:`LARGEST_BIAS`.

    Even, so that one edge is the common median: scores that do not overlap are told apart whatever the number. Below
    some 80 scores of each class not even two bins keep the bias that low.

    Example:
        >>> choose_bins(3000, 3000), choose_bins(300, 300), choose_bins(30, 30)
        (72, 6, 2)
    """
    bins = most
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


def maximal_linkability(scores: Tensor, same: Tensor, *, bins: int | None = None) -> float:
    """Maximal linkability M in bits, in [0, 1]: 0 where scores tell nothing, 1 where they tell all.

    Otroshi Shahreza, Shkel and Marcel, IEEE TIFS 18, 2023. A threshold within a bin can beat its bound
    (:func:`tmr_bound`) by what that bin holds; one between bins cannot.

    Args:
        scores, same: as :func:`unlinkability`.
        bins: how many, of equal mass; fewer come out where scores tie. None for 30, or for :func:`choose_bins` where
            that is less: :func:`maximal_chance_level` then stays below an eighth of a bit from 80 scores of each on.

    Raises:
        DataError: as :func:`unlinkability`.

    Example:
        >>> import torch
        >>> same = torch.tensor([True] * 4 + [False] * 4)
        >>> maximal_linkability(torch.tensor([0.6, 0.7, 0.8, 0.9, 0.1, 0.2, 0.3, 0.4]), same)
        1.0
        >>> maximal_linkability(torch.tensor([0.1, 0.2, 0.8, 0.9, 0.1, 0.2, 0.8, 0.9]), same)
        0.0
    """
    return _maximal(scores, same, bins)[0]


def maximal_linkability_estimate(scores: Tensor, same: Tensor, identities: Tensor) -> Estimate:
    """Maximal linkability in bits with its interval over identities, as :func:`unlinkability_estimate` has it.

    Args:
        scores, same: as :func:`unlinkability`.
        identities: int64 (P, 2), the people of each pair.

    Raises:
        DataError: as :func:`unlinkability`, or ``same`` contradicts the identities.
    """
    value, influence = _maximal(scores, same, None)
    return People.of(identities, same.cpu()).estimate(value, influence, len(scores))


def tmr_bound(maximal: float, fmr: float) -> float:
    """The highest true match rate, in [0, 1], of any test that links at a false match rate of ``fmr``.

    TMR <= TV + FMR = 2^M - 1 + FMR (Otroshi Shahreza, Shkel and Marcel, IEEE TIFS 18, 2023).

    Args:
        maximal: maximal linkability M, in bits.
        fmr: false match rate, in [0, 1].

    Example:
        >>> tmr_bound(0.0, 0.01), tmr_bound(0.5, 0.01) < 0.43, tmr_bound(1.0, 0.01)
        (0.01, True, 1.0)
    """
    return min(1.0, 2**maximal - 1 + fmr)


@dataclass(frozen=True, slots=True)
class _Binned:
    """P pairs in B bins: whether each is mated (P,), its bin (P,), and each bin's shares p, q of both classes (B,)."""

    same: Tensor
    bin_of: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, scores: Tensor, same: Tensor, bins: int | None, most: int) -> _Binned:
        scores, same = checked_pairs(scores, same, "linkage", "mated and non-mated")
        edges = _edges(scores, same, bins or choose_bins(int(same.sum()), int((~same).sum()), most))
        bin_of = torch.bucketize(scores, edges, right=True)
        p, q = (torch.bincount(bin_of[kind], minlength=len(edges) + 1).double() / kind.sum() for kind in (same, ~same))
        return cls(same, bin_of, p, q)

    def influence(self, by_p: Tensor, by_q: Tensor) -> Tensor:
        """The influence of each pair, float64 (P,), on a statistic with these derivatives by the shares (B,)."""
        mated, non_mated = (
            (by[self.bin_of] - (by * share).sum()) / kind.sum()
            for by, share, kind in ((by_p, self.p, self.same), (by_q, self.q, ~self.same))
        )
        return torch.where(self.same, mated, non_mated)


def _d_sys(scores: Tensor, same: Tensor, bins: int | None) -> tuple[float, Tensor]:
    """D_sys, and the influence of each pair on it, float64 (P,)."""
    binned = _Binned.of(scores, same, bins, _MOST_BINS)
    p, q = binned.p, binned.q
    # D(s) of each bin: 2 LR / (1 + LR) - 1 = (p - q) / (p + q), which needs no care where q is 0.
    total, linked = p + q, p > q
    value = float((p[linked] * (p - q)[linked] / total[linked]).sum())
    # Derivatives of p (p - q) / (p + q) by p and by q.
    square = torch.where(linked, total, 1.0).square()
    by_p = torch.where(linked, (p.square() + 2 * p * q - q.square()) / square, 0.0)
    by_q = torch.where(linked, -2 * p.square() / square, 0.0)
    return value, binned.influence(by_p, by_q)


def _maximal(scores: Tensor, same: Tensor, bins: int | None) -> tuple[float, Tensor]:
    """Maximal linkability in bits, and the influence of each pair on it, float64 (P,)."""
    binned = _Binned.of(scores, same, bins, _MAXIMAL_BINS)
    distance = min(1.0, float((binned.p - binned.q).clamp(min=0).sum()))
    slope = (binned.p > binned.q).double() / ((1 + distance) * math.log(2))
    return math.log2(1 + distance), binned.influence(slope, -slope)


def _edges(scores: Tensor, same: Tensor, bins: int) -> Tensor:
    """Edges between bins of equal mass, each class weighing one half."""
    mated, non_mated = int(same.sum()), int((~same).sum())
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
