"""Compares two runs: :func:`compare` fills :class:`bench.gate.compare.Difference`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import UsageError
from bench.gate.baseline import check_protocol, resolved_options
from bench.gate.comparison import Variance, change
from bench.gate.scores import FIGURES, RunScores, as_text, run_scores
from bench.measures import Direction, kind_at
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
    """One figure in both runs."""

    figure: str = Field(description="its place in metrics.json")
    direction: Direction | None = Field(description="what a higher value means; null of an unknown figure")
    first: float | None = Field(description="its value in the first run; null where that has none")
    second: float | None = Field(description="its value in the second run")
    change: float | None = Field(None, description="second - first")
    ci95: tuple[float, float] | None = Field(
        None, description="95 % interval over people, without what another training would change"
    )
    victims: str | None = Field(None, description="whether both are of the same people, so that the interval is paired")


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
    figures: dict[str, FigureChange] = {}
    resolved: tuple[dict[str, str], dict[str, str]] = ({}, {})
    # What is the run's own stands in the scores of each of its attacks.
    of_runs = [run_scores(run, next(iter(run.attacks)))[0] for run in (first, second)]
    for prefix, attacks in _pairs(first, second).items():
        scores: list[RunScores | None] = []
        for run, attack, options in zip((first, second), attacks, resolved, strict=True):
            scores.append(run_scores(run, attack)[0] if attack else None)
            asked = resolved_options(run, attack) if attack else {}
            options |= {name.replace("-a ", f"-a {attack}.") if prefix else name: asked[name] for name in asked}
        for name in dict.fromkeys(name for side in scores if side for name in side.figures):
            of_run = name.startswith(("utility.", "defense."))
            place = name if of_run else prefix + name
            if name.startswith(_LEFT_OUT) or place in figures:
                continue
            figures[place] = _change(place, name, *(of_runs if of_run else scores))
    return Difference(
        first=first.manifest.run_id,
        second=second.manifest.run_id,
        settings=[
            *_settings("asked", as_text(_asked(first)), as_text(_asked(second))),
            *_settings("resolved", *resolved),
            *_settings("machine", _machine(first), _machine(second)),
        ],
        figures=list(figures.values()),
        warnings={run.manifest.run_id: list(run.result.warnings) for run in (first, second)},
    )


def _pairs(first: Run, second: Run) -> dict[str, tuple[str | None, str | None]]:
    """Where the figures of an attack stand -> its name in both runs: of two single attacks those, whatever they are."""
    if len(first.attacks) == len(second.attacks) == 1:
        return {"": (next(iter(first.attacks)), next(iter(second.attacks)))}
    names = dict.fromkeys((*first.attacks, *second.attacks))
    return {
        f"attacks.{name}.": (name if name in first.attacks else None, name if name in second.attacks else None)
        for name in names
    }


def _change(place: str, name: str, first: RunScores | None, second: RunScores | None) -> FigureChange:
    values = [scores.figures[name].value if scores and name in scores.figures else None for scores in (first, second)]
    kind = kind_at(name)
    row = FigureChange(figure=place, direction=kind.direction if kind else None, first=values[0], second=values[1])
    if first is None or second is None or None in values:
        return row
    rate = name in FIGURES and FIGURES[name].rate
    changed = change(name, second, [first], Variance(0.0, 1.0), rate=rate)
    half = changed.half_width(0.95)
    interval = None if changed.se is None else (changed.value - half, changed.value + half)
    return row.model_copy(update={"change": changed.value, "ci95": interval, "victims": changed.pairing})


def _asked(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.manifest.config.items() if name != "out"}


def _machine(run: Run) -> dict[str, str]:
    return {name: str(getattr(run.manifest, name)) for name in _MACHINE} | run.manifest.packages


def _settings(
    kind: Literal["asked", "resolved", "machine"], first: dict[str, str], second: dict[str, str]
) -> list[Setting]:
    return [
        Setting(kind=kind, name=name, first=first.get(name), second=second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]
