"""What the gate needs of a run: which cell it is of, and each figure with the raw scores behind it, by person."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.errors import DataError
from bench.results import Direction, Measure, RunResult
from bench.run.archive import Run

Role = Literal["privacy", "utility", "canary"]


@dataclass(frozen=True, slots=True)
class Figure:
    """How one figure is guarded by default.

    Attributes:
        role: ``canary`` is what the attack gets out of unprotected faces: where that falls, the attack broke.
        tolerance: change in the harmful direction that nobody minds, in the figure's own unit.
        seed_sd: standard deviation between runs of other seeds beyond the choice of victims, assumed as far as the
            baseline's own runs do not tell (:func:`bench.gate.comparison.moderated`).
        repeat_sd: the same between runs of one seed that were trained anew: other threads, another machine.
        rate: whether it is a share of trials, whose resampled error is too small near 0 and 1.
        limit: the value at which everything is lost; None where there is none.
    """

    role: Role
    tolerance: float
    seed_sd: float
    repeat_sd: float
    rate: bool = False
    limit: float | None = None


def _rate(role: Role, limit: float, *, tolerance: float = 0.03) -> Figure:
    return Figure(role, tolerance, seed_sd=0.05, repeat_sd=0.03, rate=True, limit=limit)


#: Place in the result -> how it is guarded.
FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "recovery.ssim": Figure("privacy", 0.01, 0.01, 0.004, limit=1.0),
        "recovery.psnr_aligned": Figure("privacy", 0.25, 0.4, 0.15),
        "recovery.lpips": Figure("privacy", 0.01, 0.01, 0.004, limit=0.0),
        "recovery.identity.cosine": Figure("privacy", 0.02, 0.05, 0.04, limit=1.0),
        "recovery.identity.type1_tar": _rate("privacy", 1.0),
        "recovery.identity.type2_tar": _rate("privacy", 1.0),
        "recovery.identity.rank1": _rate("privacy", 1.0),
        "state_inference.faces": _rate("privacy", 1.0),
        # Declared, not measured: how much an attacker has to guess. Exact, so the slightest loss counts.
        "defense.entropy_bits": Figure("privacy", 0.01, 0.0, 0.0, limit=0.0),
        "linkage.protected_plain.accuracy": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_plain.auc": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_protected.accuracy": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.protected_protected.auc": _rate("privacy", 1.0, tolerance=0.02),
        "linkage.rank1": _rate("privacy", 1.0),
        "utility.accuracy": _rate("utility", 0.5, tolerance=0.02),
        "utility.auc": _rate("utility", 0.5, tolerance=0.02),
        "recovery.ceiling.ssim": Figure("canary", 0.03, 0.01, 0.004, limit=0.0),
        "recovery.ceiling.identity.cosine": Figure("canary", 0.05, 0.03, 0.02),
        "linkage.plain.auc": _rate("canary", 0.5, tolerance=0.03),
    }
)


def harm_sign(role: Role, direction: Direction) -> int:
    """+1 where a rise of the figure does harm, -1 where a fall does.

    Leaking more harms privacy; recognising less harms utility; and a canary is harmed when its attack gets less.

    Example:
        >>> harm_sign("privacy", "leakage"), harm_sign("utility", "utility"), harm_sign("canary", "leakage")
        (1, -1, -1)
    """
    return 1 if (direction in ("leakage", "cost")) == (role != "canary") else -1


#: Settings that decide no figure, or say where things lie on one machine.
_NO_PART = frozenset({"seed", "out", "resume", "device", "data_root", "evaluator", "bootstrap", "batch_size"})
_NAMED = ("defense", "attack", "knowledge", "dataset", "preset", "image_size")
_NOT_SETTINGS = _NO_PART | set(_NAMED) | {"defense_options", "attack_options"}

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
    evaluator: str | None = Field(description="SHA-256 of the judging recogniser's file; null if it was trained")
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
        mine, theirs = (
            key.model_copy(update={"settings": {name: key.settings[name] for name in known}}) for key in (self, other)
        )
        return mine == theirs

    def differences(self, other: CellKey) -> list[str]:
        """What differs, as ``name here -> there``."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{name} {mine.get(name, 'default')} -> {theirs.get(name, 'default')}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, str]:
        own = {name: str(getattr(self, name)) for name in (*_NAMED, "evaluator")}
        own |= {f"-o {name}": value for name, value in self.defense_options.items()}
        own |= {f"-a {name}": value for name, value in self.attack_options.items()}
        return own | self.settings


class Scores(StoredModel):
    """One figure of one run.

    Attributes:
        value: the figure.
        se: standard error over people, where only the figure and its interval are there; else None.
        sha256: of the raw values per image (identities, images, float64), where there are some.
        means: of each person of the run, the mean of the person's images; null where none was measured.
        counts: how many images of each person that is.
    """

    value: float
    se: float | None = Field(None, ge=0)
    sha256: str | None = None
    means: list[float | None] | None = None
    counts: list[int] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.means is None) != (self.counts is None) or (self.means is None) == (self.se is None):
            raise ValueError("either means with counts or a standard error")
        if self.means is not None and self.counts is not None:
            if len(self.means) != len(self.counts) or min(self.counts, default=0) < 0:
                raise ValueError("means and counts must match, and no count is negative")
            if any((mean is None) != (count == 0) for mean, count in zip(self.means, self.counts, strict=True)):
                raise ValueError("a mean is null exactly where its count is 0")
            if not any(self.counts):
                raise ValueError("nobody was measured")
            if abs(_mean(self.means, self.counts) - self.value) > 1e-4 * max(1.0, abs(self.value)):
                raise ValueError("the value is not the mean of the people's means: it was edited by hand")
        return self


class RunScores(StoredModel):
    """One run.

    Attributes:
        run_id: its name.
        seed: its seed.
        source: hash of the faces that it was run on; runs of one source and seed have the same victims.
        victims: how many people were attacked or verified.
        people: a hash for each attacked person, in the order of the scores: the same person of the same source has the
            same one in every run, and no name is given away.
        figures: place in the result -> scores.
    """

    run_id: str
    seed: int
    source: str
    victims: int = Field(ge=1)
    people: list[str] = []
    figures: dict[str, Scores]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.people)) != len(self.people):
            raise ValueError("a person is listed twice")
        for name, scores in self.figures.items():
            if scores.means is not None and len(scores.means) != len(self.people):
                raise ValueError(f"{name} has {len(scores.means)} people, the run {len(self.people)}")
        return self


def cell_key(run: Run) -> CellKey:
    """The cell that a run is of, from what was asked for; also of a run that failed.

    Raises:
        DataError: the manifest lacks what a run is asked for.
    """
    config = run.manifest.config
    evaluator = run.result.evaluator
    try:
        return CellKey(
            **{name: config.get(name) for name in _NAMED},
            defense_options=as_text(config.get("defense_options", {})),
            attack_options=as_text(config.get("attack_options", {})),
            evaluator=evaluator.sha256 if evaluator is not None else None,
            settings=as_text(
                {k: v for k, v in config.items() if k not in _NO_PART | set(_NAMED) and "_options" not in k}
            )
            | as_text({"dataset_options": config.get("dataset_options", {})}),
        )
    except (ValidationError, AttributeError) as error:
        raise DataError(f"{run.directory / 'manifest.json'} does not say what was run: {_first_line(error)}") from None


def run_scores(run: Run) -> tuple[RunScores, dict[str, Direction], dict[str, str]]:
    """The scores of a run that succeeded, which way each figure reads, and why figures are missing.

    Raises:
        DataError: its raw values do not fit its figures.
    """
    result = run.result
    if result.dataset is None or result.defense is None or result.attack is None:
        raise DataError(f"{run.directory} has no figures: {result.error or result.status}")
    source = _digest([result.dataset.name, sorted((k, str(v)) for k, v in result.dataset.details.items())])
    names = [] if run.per_image is None else sorted(run.per_image["identity"].astype(str).unique())
    victims = max(1, result.dataset.identities.get("victims", len(names)))
    figures: dict[str, Scores] = {"defense.entropy_bits": Scores(value=result.defense.entropy_bits, se=0.0)}
    directions: dict[str, Direction] = {"defense.entropy_bits": "privacy"}
    reasons: dict[str, str] = {}
    for path, measure in measures(result):
        name = ".".join(path)
        directions[name] = measure.direction
        if measure.value is None:
            reasons[name] = measure.reason or ""
            continue
        rows = _raw(path, result.attack.name, run.per_image)
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
    return scores, directions, reasons


def measures(result: RunResult) -> Iterator[tuple[tuple[str, ...], Measure]]:
    """Every figure of a result with its place in the document."""

    def walk(path: tuple[str, ...], node: object) -> Iterator[tuple[tuple[str, ...], Measure]]:
        if isinstance(node, Measure):
            yield path, node
        elif isinstance(node, BaseModel):
            for name in type(node).model_fields:
                yield from walk((*path, name), getattr(node, name))
        elif isinstance(node, dict):
            for name, value in node.items():
                yield from walk((*path, str(name)), value)

    for part in ("utility", "recovery", "linkage", "state_inference"):
        yield from walk((part,), getattr(result, part))


def _raw(path: tuple[str, ...], attack: str, table: pd.DataFrame | None) -> pd.DataFrame | None:
    """The rows (image, identity, value) behind a figure of recovery; None where the run keeps none."""
    if table is None or path[0] != "recovery":
        return None
    method = {"ceiling": path[1], "floors": path[2], "members": path[2]}.get(path[1], attack) if path[2:] else attack
    column = path[-1]
    if column not in table.columns:
        return None
    rows = table.loc[table["method"] == method, ["image", "identity", column]]
    rows = rows.set_axis(["image", "identity", "value"], axis=1).dropna()
    return rows if len(rows) else None


def _scores(rows: pd.DataFrame, names: list[str]) -> Scores:
    values = pd.to_numeric(rows["value"], errors="coerce").astype("float64")
    identity = rows["identity"].astype(str)
    grouped = values.groupby(identity)
    means = grouped.mean().reindex(names)
    counts = grouped.count().reindex(names).fillna(0).astype(int)
    digest = hashlib.sha256()
    for image, person, value in sorted(zip(rows["image"], identity, values, strict=True)):
        digest.update(f"{image}\0{person}\0{value.hex()}\n".encode())
    # Six digits: finer than any tolerance, and short enough for a file under version control.
    rounded = [None if count == 0 else float(f"{mean:.6g}") for mean, count in zip(means, counts, strict=True)]
    return Scores(value=_mean(rounded, list(counts)), sha256=digest.hexdigest(), means=rounded, counts=list(counts))


def _summary(measure: Measure, victims: int) -> Scores:
    assert measure.value is not None
    if measure.ci95 is None:
        # Every resample gave the same: so many people alike say no more than Laplace's rule lets them.
        return Scores(value=measure.value, se=1 / (victims + 2))
    low, high = measure.ci95
    return Scores(value=measure.value, se=(high - low) / (2 * _Z95))


def _mean(means: list[float | None], counts: list[int]) -> float:
    total = sum(mean * count for mean, count in zip(means, counts, strict=True) if mean is not None)
    return total / sum(counts)


def as_text(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as text, nested keys dotted, so that ``1`` from a file and ``"1"`` from a flag are one."""
    flat: dict[str, str] = {}
    for key, value in sorted(options.items()):
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": text for inner, text in as_text(value).items()}
        else:
            flat[str(key)] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, ensure_ascii=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
    return str(error)
