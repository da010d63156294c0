r"""How much a figure changed between runs, and how sure that is.

Three things make a figure differ between runs of one code:

* *who was attacked*. Whole people are drawn with replacement (:func:`bench.metrics.bootstrap.draw_identities`); runs
  that share people draw them together, so that what is peculiar to a person cancels; runs that share nobody draw
  apart. People of whom only one run has images count in that run.
* *another seed*: other faces to learn from, other networks. Of runs with other seeds
  :math:`\tau^2 = \max(0, \overline{(v_r - v_s)^2 - w_{rs}^2} / 2)` over all pairs, where :math:`w_{rs}^2` is what the
  victims explain of the difference: the one-way random-effects model by moments (DerSimonian and Laird, Control. Clin.
  Trials 7(3), 1986, with the paired bootstrap for the variance within).
* *training anew* with the same seed, on other threads or another machine: the same over pairs of one seed.

A change of ``now`` against the mean of ``m`` runs has the variance :math:`w^2 + \tau^2 (1 + 1/m)`, that of the
prediction of a further run (Higgins, Thompson and Spiegelhalter, J. R. Stat. Soc. A 172(1), 2009, section 4). The parts
are joined with the degrees of freedom of Satterthwaite (Biometrics Bull. 2(6), 1946): with a dozen people a normal
quantile is too short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from bench.gate.scores import RunScores
from bench.metrics.bootstrap import draw_identities

Pairing = Literal["identical", "same victims", "some victims shared", "other victims"]

#: Resamples behind a standard error: its own error is then 2 %.
REPLICATES = 1000

#: Below this a change is a rounding of the stored scores.
NOTHING = 1e-6

#: How many runs an assumed standard deviation weighs as much as.
PRIOR_WEIGHT = 6


@dataclass(frozen=True, slots=True)
class Variance:
    """A variance and the degrees of freedom of its estimate."""

    value: float
    df: float


@dataclass(frozen=True, slots=True)
class Change:
    """A figure now against what was expected.

    Attributes:
        expected: mean over the runs compared with.
        now: of the run judged.
        se: standard error of ``now - expected``; None where fewer than two people leave it unknown.
        df: its degrees of freedom.
        pairing: whose victims are compared.
    """

    expected: float
    now: float
    se: float | None
    df: float
    pairing: Pairing

    @property
    def value(self) -> float:
        """``now - expected``."""
        return self.now - self.expected

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Two-sided 95 % interval of the change; None without a standard error."""
        if self.se is None:
            return None
        half = quantile(0.975, self.df) * self.se
        return self.value - half, self.value + half

    def tail(self, excess: float) -> float:
        """P(T > excess / se): how easily chance alone gives such an excess."""
        if self.se is None:
            return 1.0
        if self.se == 0:
            # Exact figures, and the very same scores: sizes decide, not chance.
            return 0.0 if excess > NOTHING else 1.0
        score = -excess / self.se
        return float(special.stdtr(self.df, score) if math.isfinite(self.df) else special.ndtr(score))


def pool(parts: Iterable[Variance]) -> Variance:
    """The variance of a sum of independent parts, with Satterthwaite's degrees of freedom.

    Example:
        >>> pool([Variance(1.0, 10), Variance(1.0, 10)])
        Variance(value=2.0, df=20.0)
    """
    parts = [part for part in parts if part.value > 0]
    total = sum(part.value for part in parts)
    return Variance(total, total**2 / sum(part.value**2 / part.df for part in parts) if parts else math.inf)


def moderated(estimates: Sequence[float], runs: int, assumed: float) -> Variance:
    """A variance between runs from few of them, drawn towards an assumed one.

    The posterior mean under a scaled inverse chi-squared prior with :data:`PRIOR_WEIGHT` degrees of freedom (Smyth,
    Stat. Appl. Genet. Mol. Biol. 3(1), 2004, section 3): one run alone gets what is assumed, many speak for themselves.

    Args:
        estimates: one of the variance from each pair of runs.
        runs: independent runs behind them.
        assumed: standard deviation.
    """
    df = max(0, runs - 1)
    measured = max(0.0, sum(estimates) / len(estimates)) if estimates else 0.0
    total = PRIOR_WEIGHT + df
    return Variance((PRIOR_WEIGHT * assumed**2 + df * measured) / total, total)


def victims_variance(name: str, weighted: Sequence[tuple[RunScores, float]], *, rate: bool) -> Variance | None:
    """What the choice of victims contributes to the variance of a weighted sum of one figure over runs.

    Args:
        name: the figure.
        weighted: runs, and the weight of each in the sum.
        rate: whether the figure is a share of trials: then no less than one person in ``K + 2`` of either kind (Agresti
            and Min, Stat. Med. 24(5), 2005), as resampling finds no error at all where everybody is alike.

    Returns:
        The variance, or None where it needs a second person.
    """
    parts: list[Variance | None] = [
        Variance((weight * scores.se) ** 2, max(1, run.victims - 1))
        for run, weight in weighted
        if (scores := run.figures[name]).se is not None
    ]
    sampled = [(run, weight) for run, weight in weighted if run.figures[name].means is not None]
    parts += [_resampled(name, group) for group in _sharing_people(name, sampled)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    total = pool(known)
    if rate and sampled:
        least = 1 / (min(len(_measured(run, name)) for run, _ in sampled) + 2) ** 2
        if total.value < least:
            return Variance(least, total.df if math.isfinite(total.df) else len(sampled[0][0].people))
    return total


def between_runs(name: str, runs: Sequence[RunScores], *, rate: bool, same_seed: bool) -> list[float]:
    """Of each pair of runs of one seed (or of two), an estimate of the variance that victims do not explain."""
    variances = []
    for first, second in itertools.combinations(runs, 2):
        if ((first.seed, first.source) == (second.seed, second.source)) == same_seed:
            victims = victims_variance(name, [(first, 1.0), (second, -1.0)], rate=rate)
            if victims is not None:
                difference = first.figures[name].value - second.figures[name].value
                variances.append((difference**2 - victims.value) / 2)
    return variances


def references(now: RunScores, runs: Sequence[RunScores]) -> tuple[list[RunScores], bool]:
    """The runs to compare ``now`` with: those of its own seed and faces where there are any, else all of them."""
    paired = [run for run in runs if (run.seed, run.source) == (now.seed, now.source)]
    return (paired, True) if paired else (list(runs), False)


def change(name: str, now: RunScores, runs: Sequence[RunScores], between: Variance, *, rate: bool) -> Change:
    """One figure of ``now`` against the mean of ``runs``.

    Args:
        name: the figure; ``now`` and all ``runs`` have it.
        now: the run judged.
        runs: those compared with.
        between: the variance between runs that applies (:func:`references` says which).
        rate: as in :func:`victims_variance`.
    """
    scores, others = now.figures[name], [run.figures[name] for run in runs]
    expected = sum(other.value for other in others) / len(runs)
    # Without raw scores equal figures mean the same scores only where the faces and the seed are the same.
    same = [run.figures[name] for run in runs if scores.sha256 or (run.seed, run.source) == (now.seed, now.source)]
    if scores in same and scores.se != 0:
        return Change(scores.value, scores.value, 0.0, math.inf, "identical")
    victims = victims_variance(name, [(now, 1.0), *((run, -1 / len(runs)) for run in runs)], rate=rate)
    pairing = _pairing(now, runs)
    if victims is None:
        return Change(expected, scores.value, None, math.inf, pairing)
    total = pool([victims, Variance(between.value * (1 + 1 / len(runs)), between.df)])
    return Change(expected, scores.value, math.sqrt(total.value), total.df, pairing)


def _measured(run: RunScores, name: str) -> set[str]:
    counts = run.figures[name].counts or []
    return {person for person, count in zip(run.people, counts, strict=True) if count}


def _sharing_people(name: str, weighted: Sequence[tuple[RunScores, float]]) -> list[list[tuple[RunScores, float]]]:
    """Runs in groups, so that no person is in two groups."""
    groups: list[tuple[set[str], list[tuple[RunScores, float]]]] = []
    for item in weighted:
        people, members = _measured(item[0], name), [item]
        for group in [group for group in groups if group[0] & people]:
            groups.remove(group)
            people, members = people | group[0], [*group[1], *members]
        groups.append((people, members))
    return [members for _, members in groups]


def _resampled(name: str, group: Sequence[tuple[RunScores, float]]) -> Variance | None:
    """Bootstrap variance of a weighted sum over runs that share people; None with a single person."""
    people = sorted(set().union(*(_measured(run, name) for run, _ in group)))
    if len(people) < 2:
        return None
    # One state for all: the same people are drawn wherever the same people are compared.
    drawn = draw_identities(len(people), torch.Generator().manual_seed(0), REPLICATES).numpy()
    places = {person: place for place, person in enumerate(people)}
    total: NDArray[np.float64] = np.zeros(REPLICATES)
    for run, weight in group:
        scores = run.figures[name]
        sums, counts = np.zeros((2, len(people)))
        for person, mean, count in zip(run.people, scores.means or (), scores.counts or (), strict=True):
            if count and mean is not None:
                # About the mean: equal values leave no rounding for a resample to differ by.
                sums[places[person]], counts[places[person]] = (mean - scores.value) * count, count
        with np.errstate(invalid="ignore", divide="ignore"):
            total += weight * (drawn @ sums) / (drawn @ counts)
    # The plug-in variance is short by (K - 1) / K. A resample without anybody of some run says nothing.
    value = float(np.nanvar(total)) * len(people) / (len(people) - 1)
    return Variance(value if value > 1e-18 else 0.0, len(people) - 1)


def _pairing(now: RunScores, runs: Sequence[RunScores]) -> Pairing:
    if not now.people:
        same = all((run.seed, run.source) == (now.seed, now.source) for run in runs)
        return "same victims" if same else "other victims"
    people = set(now.people)
    if all(set(run.people) == people for run in runs):
        return "same victims"
    return "some victims shared" if any(people & set(run.people) for run in runs) else "other victims"


def quantile(probability: float, df: float) -> float:
    """Of Student's t distribution; of the normal one where the degrees of freedom are infinite."""
    return float(special.stdtrit(df, probability) if math.isfinite(df) else special.ndtri(probability))
