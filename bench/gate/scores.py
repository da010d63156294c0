"""What the gate needs of a run: which cell it is of, and each figure with the raw scores behind it, by person."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.data.loaders import ROLES
from bench.errors import DataError
from bench.measures import KINDS, LARGEST, Direction, Guard, Measure
from bench.results import measures
from bench.run.archive import Run

Role = Literal["privacy", "utility", "canary"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that the gate guards.

    A ``canary`` is what the attack gets out of unprotected faces: where that falls, the attack broke. A ``rate`` is a
    share of trials, whose resampled error is too small near 0 and 1.
    """

    role: Role
    direction: Direction
    guard: Guard
    rate: bool


def _guarded() -> Iterator[tuple[str, Figure]]:
    for kind in KINDS.values():
        role: Role = "privacy" if kind.leaks else "utility"
        # Both kinds of pairs are guarded alike.
        for place in dict.fromkeys((kind.place, kind.place.replace("protected_plain", "protected_protected"))):
            if kind.guard is not None:
                yield place, Figure(role, kind.direction, kind.guard, kind.unit == "%")
        if kind.canary is not None:
            yield kind.ceiling, Figure("canary", kind.direction, kind.canary, kind.unit == "%")


_ROLES: tuple[Role, ...] = ("privacy", "utility", "canary")
#: Place in the result of an attack -> how it is guarded.
FIGURES: Mapping[str, Figure] = MappingProxyType(
    dict(sorted(_guarded(), key=lambda guarded: _ROLES.index(guarded[1].role)))
)


#: Settings that decide no figure that is guarded, or say where things lie on one machine.
_NO_PART = frozenset(
    {"seed", "out", "resume", "device", "data_root", "evaluator", "bootstrap", "batch_size", "verify", "distractors"}
)
_MEASURED = ("recovery", "linkage", "state_inference")
_NAMED = ("defense", "attack", "knowledge", "dataset", "preset", "image_size")

#: Of a normal distribution, for half the width of its 95 % interval.
_Z95 = 1.959964


class StoredModel(BaseModel):
    """Part of the baseline file: unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CellKey(StoredModel):
    """What makes runs comparable: everything that was asked for but the seed.

    Options are those that somebody gave, not the resolved ones: a changed default is a change to be judged, not another
    cell.
    """

    defense: str
    defense_options: dict[str, str]
    attack: str
    attack_options: dict[str, str]
    knowledge: str
    dataset: str
    preset: str
    image_size: int
    evaluator: str | None = Field(description="SHA-256 of the judges' files; null if it was trained")
    settings: dict[str, str]

    @property
    def label(self) -> str:
        """For people, with the options in brackets."""

        def named(name: str, options: Mapping[str, str]) -> str:
            return name + (f"[{', '.join(f'{k}={v}' for k, v in options.items())}]" if options else "")

        return (
            f"{named(self.defense, self.defense_options)} / {named(self.attack, self.attack_options)} "
            f"({self.knowledge}, {self.dataset}, {self.preset}, {self.image_size} px)"
        )

    def plain(self) -> CellKey:
        """The same without anybody's options."""
        return self.model_copy(update={"defense_options": {}, "attack_options": {}})

    def matches(self, other: CellKey) -> bool:
        """Whether both are of one cell; a setting that only one knows came with another version of the suite."""
        known = self.settings.keys() & other.settings.keys()
        same = all(self.settings[name] == other.settings[name] for name in known)
        return same and self == other.model_copy(update={"settings": self.settings})

    def differences(self, other: CellKey) -> list[str]:
        """What differs, as ``name here -> there``."""
        pairs = differing(self._flat(), other._flat())
        return [f"{name} {here or 'default'} -> {there or 'default'}" for name, here, there in pairs]

    def _flat(self) -> dict[str, str]:
        named = {name: str(getattr(self, name)) for name in (*_NAMED, "evaluator")}
        named |= {f"-o {name}": value for name, value in self.defense_options.items()}
        named |= {f"-a {name}": value for name, value in self.attack_options.items()}
        return named | self.settings


class Scores(StoredModel):
    """One figure of one run."""

    value: float = Field(ge=-LARGEST, le=LARGEST, description="the figure")
    se: float | None = Field(
        None, ge=0, le=LARGEST, description="standard error over people, where there are no raw values"
    )
    sha256: str | None = Field(None, description="of the raw values per image (images, identities, float64)")
    means: list[float | None] | None = Field(None, description="mean of each person's images; null of those without")
    counts: list[int] | None = Field(None, description="how many images of each person that is")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.means is None) != (self.counts is None) or (self.means is None) == (self.se is None):
            raise ValueError("either means with counts or a standard error")
        if self.means is not None and self.counts is not None:
            if len(self.means) != len(self.counts) or not all(0 <= count <= LARGEST for count in self.counts):
                raise ValueError("means and counts must match, and no count is negative or so large")
            if [mean is None for mean in self.means] != [count == 0 for count in self.counts]:
                raise ValueError("a mean is null exactly where its count is 0")
            if not any(self.counts):
                raise ValueError("nobody was measured")
            if abs(_mean(self.means, self.counts) - self.value) > 1e-4 * max(1.0, abs(self.value)):
                raise ValueError("the value is not the mean of the people's means: it was edited by hand")
        return self


class RunScores(StoredModel):
    """One run."""

    run_id: str = Field(description="its name")
    seed: int = Field(description="its seed")
    source: str = Field(
        description="hash of the faces that it was run on; runs of one source and seed have the same victims"
    )
    victims: int = Field(ge=1, description="how many people were attacked or verified")
    people: list[str] = Field(
        [],
        description="a hash for each attacked person, in the order of the scores: the same person of the same source "
        "has the same one in every run, and no name is given away",
    )
    figures: dict[str, Scores] = Field(description="place in the result -> scores")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.people)) != len(self.people):
            raise ValueError("a person is listed twice")
        for name, scores in self.figures.items():
            if scores.means is not None and len(scores.means) != len(self.people):
                raise ValueError(f"{name} has {len(scores.means)} people, the run {len(self.people)}")
        return self


def cell_key(run: Run, attack: str) -> CellKey:
    """The cell that one of the attacks of a run is of, from what was asked for; also of a run that failed.

    Raises:
        DataError: the manifest lacks what a run is asked for.
    """
    config = run.manifest.config
    try:
        return CellKey(
            **{name: config.get(name) for name in _NAMED} | {"attack": attack},
            defense_options=as_text(config.get("defense_options", {})),
            attack_options=as_text(run.attack_options(attack)),
            evaluator="+".join(sorted(judge.sha256 for judge in run.result.judges.values() if judge.sha256)) or None,
            settings=as_text(
                {k: v for k, v in config.items() if k not in _NO_PART | set(_NAMED) and "_options" not in k}
                | {role: str(config[role]).partition(":")[0] for role in ROLES if config.get(role)}
                | {"teacher": PurePath(str(config["teacher"])).name if config.get("teacher") else None}
            )
            | as_text({name: config[name] for name in ("dataset_options", "source_options") if config.get(name)}),
        )
    except (ValidationError, AttributeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{run.directory / 'manifest.json'} does not say what was run: {problem}") from None


def run_scores(run: Run, attack: str) -> tuple[RunScores, dict[str, str]]:
    """The scores of one of the attacks of a run that succeeded, and why figures are missing.

    Raises:
        DataError: its raw values do not fit its figures.
    """
    result, part = run.result, run.attacks[attack]
    if result.dataset is None or result.defense is None or part is None:
        raise DataError(f"{run.directory} has no figures: {result.error or result.status}")
    source = _digest([result.dataset.name, sorted((k, str(v)) for k, v in result.dataset.details.items())])
    names = [] if run.per_image is None else sorted(run.per_image["identity"].astype(str).unique())
    victims = max(1, result.dataset.identities.get("victims", len(names)))
    figures: dict[str, Scores] = {"defense.entropy_bits": Scores(value=result.defense.entropy_bits, se=0.0)}
    reasons: dict[str, str] = {}
    measured = {"utility": result.utility, **{name: getattr(part, name) for name in _MEASURED}}
    for name, measure in measures(measured):
        if measure.value is None:
            reasons[name] = measure.reason or ""
            continue
        rows = _raw(name, attack, run)
        figures[name] = _summary(measure, victims) if rows is None else _scores(rows, names)
        if abs(figures[name].value - measure.value) > 1e-4 * max(1.0, abs(measure.value)):
            raise DataError(
                f"{run.directory}: {name} is {measure.value:.6g} in metrics.json but {figures[name].value:.6g} in "
                "per_image.parquet: one of them was altered; run it again"
            )
    scores = RunScores(
        run_id=result.run_id,
        seed=int(run.manifest.config.get("seed", 0)),
        source=source,
        victims=victims,
        people=[_digest([source, name])[:12] for name in names],
        figures=figures,
    )
    return scores, reasons


def _raw(place: str, attack: str, run: Run) -> pd.DataFrame | None:
    """The rows (image, identity, value) behind a figure of recovery; None where the run keeps none."""
    part, *path = place.split(".")
    if part != "recovery":
        return None
    method = {"ceiling": f"{attack} ceiling", "floors": path[1] if path[1:] else ""}.get(path[0], attack)
    rows = run.rows(method)
    # Several judges have a column each.
    column = f"{path[-1]}@{path[path.index('judges') + 1]}" if "judges" in path else path[-1]
    if rows is None or column not in rows:
        return None
    rows = rows[["image", "identity", column]].set_axis(["image", "identity", "value"], axis=1).dropna()
    return rows if len(rows) else None


def _scores(rows: pd.DataFrame, names: list[str]) -> Scores:
    values = pd.to_numeric(rows["value"], errors="coerce").astype("float64")
    identity = rows["identity"].astype(str)
    people = values.groupby(identity).agg(["mean", "count"]).reindex(names)
    counts = [int(count) for count in people["count"].fillna(0)]
    # Six digits: finer than any tolerance, and short enough for a file under version control.
    means = [float(f"{mean:.6g}") if count else None for mean, count in zip(people["mean"], counts, strict=True)]
    lines = (
        f"{i}\0{who}\0{value.hex()}\n" for i, who, value in sorted(zip(rows["image"], identity, values, strict=True))
    )
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Scores(value=_mean(means, counts), sha256=digest, means=means, counts=counts)


def _summary(measure: Measure, victims: int) -> Scores:
    assert measure.value is not None
    if measure.ci95 is None:
        # Every resample gave the same: so many people alike say no more than Laplace's rule lets them.
        return Scores(value=measure.value, se=1 / (victims + 2))
    low, high = measure.ci95
    return Scores(value=measure.value, se=(high - low) / (2 * _Z95))


def _mean(means: list[float | None], counts: list[int]) -> float:
    return sum((mean or 0.0) * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def as_text(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as text, nested keys dotted, so that ``1`` from a file and ``"1"`` from a flag are one."""
    flat: dict[str, str] = {}
    for key, value in sorted(options.items()):
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": text for inner, text in as_text(value).items()}
        else:
            flat[str(key)] = value if isinstance(value, str) else json.dumps(value)
    return flat


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str | None, str | None]]:
    """(key, value in the first, value in the second) of what differs, by key; None where there is no such key."""
    keys = sorted(first.keys() | second.keys())
    return [(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, ensure_ascii=True).encode()).hexdigest()


def first_problem(error: ValidationError) -> str:
    """Where the first error is, and what it is, on one line."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"])) or "document"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
