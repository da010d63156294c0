"""Compares two runs: :func:`compare` fills :class:`bench.gate.compare.Difference`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bench.errors import UsageError
from bench.gate.baseline import check_protocol, resolved_options
from bench.gate.comparison import Variance, change
from bench.gate.scores import FIGURES, RunScores, as_text, differing, run_scores
from bench.measures import Direction, ResultModel, kind_at
from bench.run.archive import Run

SettingKind = Literal["asked", "resolved", "machine"]


class Setting(ResultModel):
    """One setting that differs; None where a run does not have it."""

    kind: SettingKind
    name: str
    first: str | None
    second: str | None


class FigureChange(ResultModel):
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


class Difference(ResultModel):
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
    runs = (first, second)
    for run in runs:
        if run.failed:
            raise UsageError(f"{run.directory} failed ({run.result.error}): it has no figures to compare")
    check_protocol(second, first.manifest.protocol)
    figures: dict[str, FigureChange] = {}
    resolved: tuple[dict[str, str], dict[str, str]] = ({}, {})
    # What is the run's own stands in the scores of each of its attacks.
    of_runs = [run_scores(run, next(iter(run.attacks)))[0] for run in runs]
    for prefix, attacks in _pairs(first, second).items():
        scores: list[RunScores | None] = []
        for run, attack, options in zip(runs, attacks, resolved, strict=True):
            scores.append(run_scores(run, attack)[0] if attack else None)
            asked = resolved_options(run, attack) if attack else {}
            options |= {name.replace("-a ", f"-a {attack}.") if prefix else name: asked[name] for name in asked}
        for name in dict.fromkeys(name for side in scores if side for name in side.figures):
            of_run = name.startswith(("utility.", "defense."))
            place = name if of_run else prefix + name
            if not name.startswith(_LEFT_OUT) and place not in figures:
                figures[place] = _change(place, name, *(of_runs if of_run else scores))
    asked_for = [as_text({k: v for k, v in run.manifest.config.items() if k != "out"}) for run in runs]
    machines = [{k: str(getattr(run.manifest, k)) for k in _MACHINE} | run.manifest.packages for run in runs]
    kinds: dict[SettingKind, Any] = {"asked": asked_for, "resolved": resolved, "machine": machines}
    return Difference(
        first=first.manifest.run_id,
        second=second.manifest.run_id,
        settings=[
            Setting(kind=kind, name=name, first=here, second=there)
            for kind, sides in kinds.items()
            for name, here, there in differing(*sides)
        ],
        figures=list(figures.values()),
        warnings={run.manifest.run_id: list(run.result.warnings) for run in runs},
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
    kind = kind_at(name)
    here, there = (
        scores.figures[name].value if scores and name in scores.figures else None for scores in (first, second)
    )
    known: dict[str, Any] = {}
    if first is not None and second is not None and here is not None and there is not None:
        rate = name in FIGURES and FIGURES[name].rate
        changed = change(name, second, [first], Variance(0.0, 1.0), rate=rate)
        known = {"change": changed.value, "ci95": changed.ci95, "victims": changed.pairing}
    return FigureChange(figure=place, direction=kind and kind.direction, first=here, second=there, **known)
