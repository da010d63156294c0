"""Compares two runs: :func:`compare` fills :class:`bench.gate.compare.Difference`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bench.errors import UsageError
from bench.gate.baseline import check_protocol, resolved_options
from bench.gate.comparison import Variance, change
from bench.gate.scores import FIGURES, RunScores, as_text, run_scores
from bench.results import Direction
from bench.run.archive import Run


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Setting(_Model):
    """One setting that differs; None where a run does not have it."""

    kind: Literal["asked", "resolved", "machine"]
    name: str
    first: str | None
    second: str | None


class FigureChange(_Model):
    """One figure in both runs.

    Attributes:
        figure: its place in ``metrics.json``.
        direction: which way it reads.
        first, second: its values; None where a run has none.
        change: ``second - first``.
        ci95: 95 % interval over people; of the victims' choice alone, without what another training would change.
        victims: whether both are of the same people, so that the interval is paired.
    """

    figure: str
    direction: Direction
    first: float | None
    second: float | None
    change: float | None = None
    ci95: tuple[float, float] | None = None
    victims: str | None = None


class Difference(_Model):
    """``bench compare A B --json``."""

    first: str
    second: str
    settings: list[Setting]
    figures: list[FigureChange]
    warnings: dict[str, list[str]]


#: Where a run was computed; differences of these explain small changes.
_MACHINE = ("version", "git_commit", "python", "device", "device_name", "precision", "threads", "deterministic")

#: Floors are what they are under any defence; they would only hide what changed.
_LEFT_OUT = "recovery.floors."


def compare(first: Run, second: Run) -> Difference:
    """What ``second`` has changed against ``first``.

    Raises:
        UsageError: a run failed, or they are of two protocol versions.
        DataError: a run's files contradict each other.
    """
    for run in (first, second):
        if run.failed:
            raise UsageError(f"{run.directory} failed ({run.result.error}): it has no figures to compare")
    check_protocol(second, first.manifest.protocol)
    one, directions, _ = run_scores(first)
    other, more, _ = run_scores(second)
    names = [name for name in {**directions, **more} if not name.startswith(_LEFT_OUT)]
    return Difference(
        first=first.manifest.run_id,
        second=second.manifest.run_id,
        settings=[
            *_settings("asked", as_text(_asked(first)), as_text(_asked(second))),
            *_settings("resolved", resolved_options(first), resolved_options(second)),
            *_settings("machine", _machine(first), _machine(second)),
        ],
        figures=[
            _change(name, one, other, (directions | more)[name])
            for name in names
            if name in one.figures or name in other.figures
        ],
        warnings={run.manifest.run_id: list(run.result.warnings) for run in (first, second)},
    )


def _change(name: str, first: RunScores, second: RunScores, direction: Direction) -> FigureChange:
    values = [run.figures[name].value if name in run.figures else None for run in (first, second)]
    row = FigureChange(figure=name, direction=direction, first=values[0], second=values[1])
    if None in values:
        return row
    nothing = Variance(0.0, 1.0)
    found = change(name, second, [first], nothing, rate=name in FIGURES and FIGURES[name].rate)
    half = found.half_width(0.95)
    interval = None if found.se is None else (found.value - half, found.value + half)
    return row.model_copy(update={"change": found.value, "ci95": interval, "victims": found.pairing})


def _asked(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.manifest.config.items() if name != "out"}


def _machine(run: Run) -> dict[str, str]:
    own = {name: str(getattr(run.manifest, name)) for name in _MACHINE}
    return own | run.manifest.packages


def _settings(
    kind: Literal["asked", "resolved", "machine"], first: dict[str, str], second: dict[str, str]
) -> list[Setting]:
    return [
        Setting(kind=kind, name=name, first=first.get(name), second=second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]
