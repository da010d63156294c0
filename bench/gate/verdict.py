"""What the gate found: the document that ``bench gate --json`` prints and that every other output shows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.gate.scores import Role
from bench.results import Direction

Outcome = Literal["pass", "regress", "broken attack", "inconclusive", "missing", "failed"]

#: From best to worst. A cell is as good as its worst figure, a report as its worst cell.
_RANK: tuple[Outcome, ...] = ("pass", "inconclusive", "regress", "broken attack", "failed", "missing")

REGRESSION, INCONCLUSIVE = 1, 4


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class FigureVerdict(_Model):
    """One figure of one run against its baseline.

    Attributes:
        figure: its place in ``metrics.json``.
        role: what it guards.
        direction: which way it reads.
        baseline, now: expected and found; ``now`` is null where it was not measured.
        change: ``now - baseline``.
        ci95: two-sided 95 % interval of the change.
        tolerance: harmful change that is tolerated.
        margin: harmful change that a pass rules out.
        detectable: harmful change that would be called a regression with a probability of 80 %.
        p_harm: Holm-adjusted p-value of "the harm is within the tolerance"; small means that it is not.
        p_safe: p-value of "the harm reaches the margin"; small means that it does not.
        victims: whose scores were compared.
        outcome: of this figure.
        improved: whether the figure got better beyond its tolerance.
        blind: whether even the loss of all that is left would not be detected, so that a pass says nothing.
        note: what else there is to say.
    """

    figure: str
    role: Role
    direction: Direction
    baseline: float
    now: float | None
    change: float | None = None
    ci95: tuple[float, float] | None = None
    tolerance: float
    margin: float
    detectable: float | None = None
    p_harm: float | None = None
    p_safe: float | None = None
    victims: str | None = None
    outcome: Outcome
    improved: bool = False
    blind: bool = False
    note: str | None = None


class CellVerdict(_Model):
    """One run against its cell, or a cell without a run."""

    cell: str
    run: str | None
    directory: str | None = None
    outcome: Outcome
    figures: list[FigureVerdict] = []
    notes: list[str] = []


class GateReport(_Model):
    """All of it; ``extra`` are runs that no cell of the baseline is for."""

    outcome: Outcome
    exit_code: int
    baseline: str
    alpha: float
    alpha_pass: float
    cells: list[CellVerdict]
    extra: list[str] = []


def worst(outcomes: list[Outcome]) -> Outcome:
    """The worst of some outcomes; nothing at all passes.

    Example:
        >>> worst(["pass", "inconclusive", "pass"])
        'inconclusive'
    """
    return max(outcomes, key=_RANK.index, default="pass")


def exit_code(outcome: Outcome) -> int:
    """0 for a pass, 4 where it could not be decided, 1 for all that must stop a merge."""
    return {"pass": 0, "inconclusive": INCONCLUSIVE}.get(outcome, REGRESSION)
