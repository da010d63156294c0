"""Reads run directories: everything that a report shows comes from here."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from bench.errors import MissingError
from bench.files import parse_json, sha256
from bench.measures import LARGEST
from bench.results import AttackResult, Explanation, RunResult

#: In a run's folder, what `bench explain` found.
EXPLANATION = "explain.json"

_PNG = b"\x89PNG\r\n\x1a\n"


class Victim(BaseModel):
    """One victim image and what became of it.

    Attributes:
        image: its index in the dataset's victims.
        roles: ``worst`` (most leaks), ``median``, ``best``; ``first`` for those that every run on them shows.
        caption: its figures.
        files: column -> name of a PNG in the folder.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    image: int
    roles: tuple[str, ...]
    caption: str
    files: dict[str, str]


class Samples(BaseModel):
    """The pictures of a run.

    Attributes:
        columns: what there is of each victim, from left to right; empty where there is only a ready sheet.
        victims: those that were kept.
        folder: holds the pictures.
        sheet: a ready contact sheet, where there is one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    columns: tuple[str, ...]
    victims: tuple[Victim, ...]
    folder: Path = Path()
    sheet: Path | None = None


def read_samples(folder: Path) -> Samples | None:
    """The pictures in ``folder``; None where there are none.

    Raises:
        MissingError: the index is damaged, or names a file outside the folder or one that is not there.
    """
    sheet, path = folder / "contact-sheet.png", folder / "samples.json"
    place = {"folder": folder, "sheet": sheet if sheet.is_file() else None}
    if not path.is_file():
        return Samples(columns=(), victims=(), folder=folder, sheet=sheet) if sheet.is_file() else None
    index = read_model(path, Samples, "an index of samples")
    there = {file.name for file in folder.iterdir() if file.is_file() and not file.is_symlink()}
    for name in (name for victim in index.victims for name in victim.files.values()):
        if name not in there:
            raise MissingError(f"{path} names {name!r:.80}, which is no file of this folder")
    return index.model_copy(update=place)


def data_uri(path: Path) -> str:
    """A PNG file as a ``data:`` address.

    Raises:
        MissingError: it is no PNG.
    """
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise MissingError(f"{path} is not a PNG picture")
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


#: Columns that a table of raw values must have to be of use.
_COLUMNS = {
    "per_image": {"image", "identity", "method"},
    "scores": {"same", "protected", "unprotected"},
    "state_inference": {"attack", "drawn", "named"},
    "linkage": {"same", "protected_plain", "protected_protected", "plain"},
    "inverted": {"attack", "image", "identity", "first", "second"},
}
#: Columns of names, and of embeddings; all others hold numbers.
_NAMES, _EMBEDDINGS = ("identity", "method", "attack"), ("first", "second")


_M = TypeVar("_M", bound=BaseModel)


#: Settings by the kinds of value that they have in every version.
_ASKED_FOR: dict[str, type] = {
    **dict.fromkeys(("defense", "attack", "knowledge", "dataset", "preset"), str),
    **dict.fromkeys(("defense_options", "attack_options", "dataset_options", "training"), dict),
    "seed": int,
}


class Manifest(BaseModel):
    """``manifest.json``: what was asked for, on what machine, and the hashes of what was written."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    protocol: str
    run_id: str
    status: str
    config: dict[str, Any]
    started: str = ""
    updated: str = ""
    version: str = ""
    git_commit: str | None = None
    python: str = ""
    packages: dict[str, str] = {}
    device: str = ""
    device_name: str = ""
    precision: str = ""
    threads: int | None = None
    deterministic: bool | None = None
    artefacts: dict[str, str] = {}

    @field_validator("config")
    @classmethod
    def _as_asked_for(cls, config: dict[str, Any]) -> dict[str, Any]:
        """What reports and gates read of a configuration, of whatever version; RunConfig knows this one's alone."""
        for name, kind in _ASKED_FOR.items():
            if config.get(name) is not None and not isinstance(config[name], kind):
                raise ValueError(f"{name} cannot be {config[name]!r:.60}")
        return config


@dataclass(frozen=True)
class Losses:
    """A training curve out of ``events.jsonl``: (examples seen, loss), as far as progress was logged."""

    task: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        directory: where it lies.
        manifest: as read.
        result: as read; of a run that was killed or still runs, one with the status ``error``.
        per_image: a row per victim image and method; None where the run has none.
        scores: a row per pair, of the provider's recogniser.
        linkage: a row per pair, of a linkage attack.
        states: a row per interception, of attacks that name states: the one drawn and the one named, -1 for none.
        inverted: a row per attacked image, of attacks that invert templates: what they make of two of the person's.
        losses: training curves of recognisers.
        samples: pictures of single victims.
        altered: files that are not as the manifest recorded them.
        explanation: what ``bench explain`` found of it.
    """

    directory: Path
    manifest: Manifest
    result: RunResult
    per_image: pd.DataFrame | None = None
    scores: pd.DataFrame | None = None
    linkage: pd.DataFrame | None = None
    states: pd.DataFrame | None = None
    inverted: pd.DataFrame | None = None
    losses: tuple[Losses, ...] = ()
    samples: Samples | None = None
    altered: tuple[str, ...] = ()
    explanation: Explanation | None = None

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per figure: its dotted name in the result, value, ends of the interval, n and whatever else it says."""
        return pd.DataFrame(_figures(self.result.model_dump(mode="json"), ""))

    @property
    def failed(self) -> bool:
        """Whether there are no figures."""
        return self.result.status != "success"

    @property
    def attacks(self) -> dict[str, AttackResult | None]:
        """By its name, what each attack got; None of one that gave up, and of those of a run without figures."""
        asked = str(self.manifest.config.get("attack", "?")).split(",")
        got = {**self.result.attack_results, **dict.fromkeys(self.result.failed)}
        return got or dict.fromkeys(name.strip() for name in asked)

    def attack_options(self, attack: str) -> dict[str, Any]:
        """The options asked for one of the attacks: its own, and those for all, as far as it is known to have them."""
        asked, attacks = self.manifest.config.get("attack_options") or {}, self.attacks
        if len(attacks) == 1:
            return dict(asked)
        names = {name.replace("-", "_"): name for name in attacks}
        result = attacks[attack]
        options: dict[str, Any] = {}
        for key, value in asked.items():
            name = names.get(key.replace("-", "_"))
            if name is None and (result is None or key in result.attack.options):
                options.setdefault(key, value)
            elif name == attack:
                options |= value
        return options

    def rows(self, method: str) -> pd.DataFrame | None:
        """The raw values per victim image of an attack or a floor; ``"NAME ceiling"`` of unprotected faces."""
        known = self._methods
        if method.endswith(" ceiling") and method not in known:
            method = "ceiling"  # of the only attack that recovers faces
        return known.get(method)

    @cached_property
    def _methods(self) -> dict[str, pd.DataFrame]:
        table = self.per_image
        return {} if table is None else dict(iter(table.groupby(table["method"].astype(str), sort=False)))

    @property
    def synthetic(self) -> bool:
        """Whether its faces were made up; a run that does not say so counts as one on real faces."""
        return self.result.dataset is not None and self.result.dataset.synthetic


def _figures(node: dict[str, Any], name: str) -> Iterable[dict[str, Any]]:
    if "ci95" in node:
        low, high = node.pop("ci95") or (None, None)
        yield {"metric": name, "value": node.pop("value"), "low": low, "high": high, **node}
        return
    for key, inner in node.items():
        if isinstance(inner, dict):
            yield from _figures(inner, f"{name}.{key}" if name else key)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among ``paths``, or one level below them, each once, in order.

    Raises:
        MissingError: a path that neither is nor holds a run.
    """
    runs: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise MissingError(f"{path} is not a run directory: there is no such folder")
        is_run = (path / "manifest.json").is_file()
        directories = [path] if is_run else sorted(file.parent for file in path.glob("*/manifest.json"))
        if not directories:
            raise MissingError(f"{path} is not a run directory: {path / 'manifest.json'} does not exist")
        runs.update((directory.resolve(), directory) for directory in directories)
    return list(runs.values())


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run among ``paths`` (:func:`find_runs`).

    Raises:
        MissingError: a folder without a run, or a file that cannot be read; the message names it.
    """
    return [load_run(directory) for directory in find_runs(paths)]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a run directory.

    Raises:
        MissingError: it is missing, damaged or of another schema.
    """
    return read_model(directory / "manifest.json", Manifest)


def load_run(directory: Path, *, tables: bool = True) -> Run:
    """One run directory.

    Args:
        directory: the folder.
        tables: whether raw values are read, which most of the time goes into. Without, only those of files that are
            not as the manifest recorded them are, so that damage is found.

    Raises:
        MissingError: a file of it is missing, damaged or of another schema; the message names it.
    """
    manifest = read_manifest(directory)
    result_file = directory / "metrics.json"
    if not result_file.is_file() and manifest.status == "started":
        error = "never finished: it was killed, or it is still running"
        result = RunResult(run_id=manifest.run_id, protocol=manifest.protocol, status="error", error=error)
    else:
        result = read_model(result_file, RunResult)
    recorded = {name: manifest.artefacts.get(name) for name in ("metrics.json", *(f"{t}.parquet" for t in _COLUMNS))}
    there = {name: sha256(directory / name) if (directory / name).is_file() else None for name in recorded}

    def table(name: _TableName) -> pd.DataFrame | None:
        file = f"{name}.parquet"
        known = recorded[file] is not None and there[file] == recorded[file]
        return None if known and not tables else _table(directory, name)

    return Run(
        directory=directory,
        manifest=manifest,
        result=result,
        per_image=table("per_image"),
        scores=table("scores"),
        linkage=table("linkage"),
        states=table("state_inference"),
        inverted=table("inverted"),
        losses=tuple(_losses(directory / "events.jsonl")),
        samples=read_samples(directory / "samples"),
        altered=tuple(name for name, digest in recorded.items() if digest and there[name] != digest),
        explanation=read_model(explained, Explanation) if (explained := directory / EXPLANATION).is_file() else None,
    )


def read_model(path: Path, model: type[_M], what: str = "a file of this schema") -> _M:
    """A JSON file as ``model``.

    Raises:
        MissingError: it cannot be read, or is not ``what``; the message says where.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MissingError(f"{path} is not {what}: {where or 'document'}: {first['msg']}") from None


_TableName = Literal["per_image", "scores", "linkage", "state_inference", "inverted"]


def _table(directory: Path, name: _TableName) -> pd.DataFrame | None:
    path = directory / f"{name}.parquet"
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # a damaged file surfaces as any of pyarrow's and pandas' many
        raise MissingError(f"{path} is not a readable Parquet file: {error}") from None
    if missing := _COLUMNS[name] - set(table.columns):
        raise MissingError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    if problem := _problem(table, _COLUMNS[name]):
        raise MissingError(f"{path} is no table that a run wrote: {problem}")
    for column in table.columns.difference([*_EMBEDDINGS]):
        if column in _NAMES:
            table[column] = table[column].astype(str)
        elif table[column].isna().all():
            table[column] = np.nan
    return table


def _problem(table: pd.DataFrame, needed: set[str]) -> str | None:
    """What no run writes; the needed columns are there."""
    if not table.columns.is_unique or not all(isinstance(column, str) for column in table.columns):
        return "a column has no name, or that of another"
    if table.empty or table[table.columns.intersection([*_NAMES])].isna().any(axis=None):
        return "it has no rows, or rows without a name"
    for column in table.columns.difference([*_NAMES]):
        values = table[column]
        if column in _EMBEDDINGS:
            try:
                numbers = np.stack([np.asarray(row, dtype="float64") for row in values])
            except (TypeError, ValueError):
                return f"{column} does not hold embeddings of one size"
        elif values.isna().all():
            numbers = np.full(len(values), np.nan)
        elif is_numeric_dtype(values.dtype):
            numbers = values.to_numpy(dtype="float64", na_value=np.nan)
        else:
            return f"{column:.60} does not hold numbers"
        if (np.abs(numbers) > LARGEST).any() or (column in needed and np.isnan(numbers).any()):
            return f"{column:.60} holds values that are no figures"
    if "same" in needed:
        groups = table["attack"].astype(str) if "attack" in table else np.zeros(len(table))
        if not table["same"].isin((0, 1)).all() or (table.groupby(groups)["same"].nunique() < 2).any():
            return "it does not hold pairs of one person, and of two"
    return None


def _losses(path: Path) -> Iterable[Losses]:
    """Training curves of the recognisers, which the events alone hold; attacks keep theirs in the result."""
    points: dict[str, list[tuple[float, float]]] = {}
    for event in _events(path):
        task, done, loss = (event.get(name) for name in ("task", "done", "loss"))
        if not isinstance(task, str) or " recogniser " not in task:
            continue
        if isinstance(done, int | float) and isinstance(loss, int | float):
            points.setdefault(task, []).append((done, loss))
    return (Losses(task, tuple(curve)) for task, curve in points.items() if len(curve) > 1)


def last_event(directory: Path) -> dict[str, Any]:
    """The last event of a run: of one that is under way, what it is doing; empty where it has said nothing.

    Raises:
        MissingError: its events are damaged.
    """
    return next(iter(deque(_events(directory / "events.jsonl"), maxlen=1)), {})


def _events(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    # A line that has no end is still being written.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            event = parse_json(line)
        except ValueError:
            raise MissingError(f"{path} is damaged: line {number} is not JSON") from None
        if isinstance(event, dict):
            yield event
