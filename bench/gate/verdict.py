r"""Verdicts on figures, runs and all of them, by two one-sided tests; what ``bench gate --json`` prints.

Let :math:`h` be the change of a figure in its harmful direction, :math:`s` its standard error with :math:`\nu` degrees
of freedom, :math:`\delta` the tolerance and :math:`\Delta \ge \delta` the margin.

* *regress*: :math:`H: h \le \delta` is rejected, :math:`p = P(T_\nu > (h - \delta) / s)`. Among the figures of one run
  the p-values are adjusted by Holm (Scand. J. Stat. 6(2), 1979), so that the chance that anything at all is called a
  regression that is none is at most ``alpha``, however the figures depend on each other.
* *pass*: :math:`H: h \ge \Delta` is rejected, :math:`p = P(T_\nu > (\Delta - h) / s)` at most ``alpha_pass``, for every
  figure: non-inferiority, one half of Schuirmann's two one-sided tests (J. Pharmacokinet. Biopharm. 15(6), 1987). As
  all must pass, no adjustment is needed (Berger, Technometrics 24(4), 1982).
* *inconclusive*: neither; too few victims, or runs that differ too much, for what is asked.

With :math:`\Delta = \delta` the interval of the change lies wholly beyond the tolerance, wholly within it, or across.
Few victims cannot show equivalence within a small tolerance; ``bench baseline`` then sets the margin to what its runs
can show, so that a pass says openly what it rules out instead of taking "not significant" for "no change".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field

from bench.gate.baseline import Expected
from bench.gate.comparison import NOTHING, Change, quantile
from bench.gate.scores import Role
from bench.measures import Direction, ResultModel

#: From best to worst. A cell is as good as its worst figure, a report as its worst cell.
Verdict = Literal["pass", "inconclusive", "regress", "broken attack", "failed", "missing"]


class FigureVerdict(ResultModel):
    """One figure of one run against its baseline."""

    figure: str = Field(description="its place in metrics.json")
    role: Role = Field(description="what it guards")
    direction: Direction = Field(description="what a higher value means")
    baseline: float = Field(description="what was expected")
    now: float | None = Field(description="what was measured; null where it was not measured")
    change: float | None = Field(None, description="now - baseline")
    ci95: tuple[float, float] | None = Field(None, description="two-sided 95 % interval of the change")
    tolerance: float = Field(description="harmful change that is tolerated")
    margin: float = Field(description="harmful change that a pass rules out")
    detectable: float | None = Field(None, description="harmful change that would not pass, with a probability of 90 %")
    p_harm: float | None = Field(
        None, description="Holm-adjusted p-value of 'the harm is within the tolerance'; small means that it is not"
    )
    p_safe: float | None = Field(
        None, description="p-value of 'the harm reaches the margin'; small means that it does not"
    )
    victims: str | None = Field(None, description="whose scores were compared")
    outcome: Verdict = Field(description="of this figure")
    improved: bool = Field(False, description="whether the figure got better beyond its tolerance")
    blind: bool = Field(
        False,
        description="whether even the loss of all that is left would not be detected, so that a pass says nothing",
    )
    note: str | None = Field(None, description="what else there is to say")

    @classmethod
    def of(cls, figure: str, expected: Expected, baseline: float, now: float | None, **more: Any) -> Self:
        """The verdict on a figure of which ``expected`` says what is tolerated."""
        known: dict[str, Any] = {"role": expected.role, "direction": expected.direction}
        known |= {"tolerance": expected.tolerance, "margin": expected.excluded}
        return cls(figure=figure, baseline=baseline, now=now, **known, **more)


class CellVerdict(ResultModel):
    """One run against its cell, or a cell without a run."""

    cell: str
    run: str | None
    directory: str | None = None
    outcome: Verdict
    figures: list[FigureVerdict] = Field([])
    notes: list[str] = Field([])


class GateReport(ResultModel):
    """All of it; ``extra`` are runs that no cell of the baseline is for."""

    outcome: Verdict
    exit_code: int
    baseline: str
    alpha: float
    alpha_pass: float
    cells: list[CellVerdict]
    extra: list[str] = Field([])


def worst(outcomes: Iterable[Verdict]) -> Verdict:
    """The worst of some outcomes; nothing at all passes.

    Example:
        >>> worst(["pass", "inconclusive", "pass"])
        'inconclusive'
    """
    return max(outcomes, key=get_args(Verdict).index, default="pass")


def exit_code(outcome: Verdict) -> int:
    """0 for a pass, 4 where it could not be decided, 1 for all that must stop a merge."""
    return {"pass": 0, "inconclusive": 4}.get(outcome, 1)


#: With this probability a harm of what is reported as detectable does not pass.
POWER = 0.9


def decide(
    changes: Mapping[str, Change], expected: Mapping[str, Expected], *, alpha: float, alpha_pass: float
) -> list[FigureVerdict]:
    """The verdicts on the figures of one run.

    Args:
        changes: figure -> its change.
        expected: figure -> what is tolerated of it; at least those of ``changes``.
        alpha: of calling anything a regression.
        alpha_pass: of passing a change of the margin.
    """
    harm = {name: expected[name].harm_sign * change.value for name, change in changes.items()}
    p_harm = holm({name: change.tail(harm[name] - expected[name].tolerance) for name, change in changes.items()})
    verdicts = []
    for name, change in changes.items():
        tolerated = expected[name]
        p_safe = change.tail(tolerated.excluded - harm[name] + 2 * NOTHING)  # what is exactly tolerated passes
        outcome: Verdict = "pass" if p_safe <= alpha_pass else "inconclusive"
        if p_harm[name] <= alpha:
            outcome = "broken attack" if tolerated.role == "canary" else "regress"
        detectable, blind, note = None, False, None
        if change.se is None:
            note = "fewer than two people: nothing can be said about chance"
        elif change.pairing == "identical":
            note = "the same scores as in the baseline"
        else:
            quantiles = quantile(POWER, change.df) - quantile(1 - alpha_pass, change.df)
            detectable = max(tolerated.tolerance, tolerated.excluded + quantiles * change.se)
            # All that is left to lose could be lost without being seen.
            blind = (
                tolerated.limit is not None
                and tolerated.tolerance < abs(tolerated.limit - change.expected) < detectable
            )
        verdicts.append(
            FigureVerdict.of(
                name,
                tolerated,
                change.expected,
                change.now,
                change=change.value,
                ci95=change.ci95,
                detectable=detectable,
                p_harm=p_harm[name],
                p_safe=p_safe,
                victims=change.pairing,
                outcome=outcome,
                improved=change.tail(-harm[name] - tolerated.tolerance) <= alpha_pass,
                blind=blind,
                note=note,
            )
        )
    return verdicts


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = least
    return adjusted
