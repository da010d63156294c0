"""Orders attacks on defences for comparison: which may be compared, what each is called, and the worst case of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench.measures import KINDS, leak
from bench.results import NO_BETTER, AttackResult, Measure
from bench.run.archive import Run

#: Options named in a label at most; provenance has them all.
_SHOWN_OPTIONS = 3


@dataclass(frozen=True)
class Cell:
    """One attack (``name``) of a run.

    ``defense`` and ``attack`` are their names with the options that set them apart from the others of the report.
    """

    run: Run
    name: str
    defense: str
    attack: str

    @property
    def result(self) -> AttackResult | None:
        """What the attack got; None of a failed run."""
        return self.run.attacks[self.name]

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.run.manifest.config.get("seed", 0))

    @property
    def unsaturated(self) -> bool:
        """Whether the attack was still improving, so that its figures are lower bounds."""
        return self.result is not None and self.result.attack.saturated is False

    @property
    def no_better(self) -> bool:
        """Whether the attack is no better than a floor, so that its figures say nothing about the defence."""
        return self.result is not None and self.result.attack.above_floor is False

    @property
    def submitted(self) -> bool:
        """Whether the attack was run elsewhere, and only what it recovered was scored here."""
        return self.result is not None and "submitted" in self.result.attack.details

    @property
    def verdict(self) -> str:
        """Why its figures are not to be taken at their word; empty where nothing is known against them."""
        if self.result is None:
            return "failed: see the warnings"
        broken = "broken" if self.result.attack.broken else ""
        unsaturated = "unsaturated: a lower bound" if self.unsaturated else ""
        submitted = "submitted: run elsewhere, scored here" if self.submitted else ""
        return "; ".join(filter(None, (submitted, broken, NO_BETTER if self.no_better else "", unsaturated)))

    @property
    def links(self) -> bool:
        """Whether the attack itself tells who is who, and keeps its scores; of one that recovers faces a judge does."""
        return self.result is not None and self.result.linkage is not None and self.result.recovery is None

    def scores(self, table: str) -> pd.DataFrame | None:
        """The pairs of faces as the provider's recogniser scored them (``scores``), or this attack (``linkage``)."""
        frame: pd.DataFrame | None = getattr(self.run, table)
        if frame is None or table == "scores":
            return frame
        if "attack" in frame:  # runs of before several linkage attacks have rows of the only one
            frame = frame[frame["attack"] == self.name]
        return frame if self.links and len(frame) else None

    @property
    def knowledge(self) -> str:
        """The rung of the ladder."""
        return _plain(self.run.manifest.config.get("knowledge", "?"))

    @property
    def label(self) -> str:
        """Everything that tells this cell from the others, in one line."""
        return f"{self.attack} ({self.knowledge}) on {self.defense}"


@dataclass(frozen=True)
class Setting:
    """Runs that may be compared, each attack a cell, by defence.

    They are of one protocol, dataset, image size, evaluator and teacher. A setting is ``synthetic`` if any of its faces
    were made up.
    """

    protocol: str
    title: str
    synthetic: bool
    cells: tuple[Cell, ...]

    @property
    def defenses(self) -> dict[str, list[Cell]]:
        """The attacks on each defence."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.defense, []).append(cell)
        return groups

    @property
    def measured(self) -> list[tuple[Cell, AttackResult]]:
        """The attacks that have figures."""
        return [(cell, cell.result) for cell in self.cells if cell.result is not None]

    @property
    def runs(self) -> list[tuple[str, Cell]]:
        """Each run once, by its first attack, under a label that names all of them."""
        groups: dict[Path, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.run.directory, []).append(cell)
        named = [(", ".join(cell.attack for cell in cells), cells[0]) for cells in groups.values()]
        return [(f"{attacks} ({cell.knowledge}) on {cell.defense}", cell) for attacks, cell in named]


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Group ``runs`` by what makes them comparable, each with the shortest labels that tell them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_comparable(run), sort_keys=True, default=str), []).append(run)
    titles = labels([(_title(group[0]), _comparable(group[0])) for group in groups.values()])
    return [_setting(title, group) for title, group in zip(titles, groups.values(), strict=True)]


def _comparable(run: Run) -> dict[str, Any]:
    """What two runs must share before one figure may stand beside the other."""
    config = run.manifest.config
    evaluator = config.get("evaluator") or []
    return {
        "protocol": run.manifest.protocol,
        "dataset": config.get("dataset"),
        "data": Path(str(config["data_root"])).name if config.get("data_root") else None,
        "image_size": config.get("image_size"),
        "limit": config.get("limit"),
        "evaluator": [Path(str(file)).name for file in (evaluator if isinstance(evaluator, list) else [evaluator])]
        or config.get("evaluator_backbone"),
        "teacher": Path(str(config["teacher"])).name if config.get("teacher") else None,
        **_mapping(config.get("dataset_options")),
    }


def _title(run: Run) -> str:
    config = run.manifest.config
    return f"{config.get('dataset', '?')}, {config.get('image_size', '?')} px, protocol {run.manifest.protocol}"


def _setting(title: str, runs: Sequence[Run]) -> Setting:
    resolved = {_asked(run): run.result.defense.options for run in runs if run.result.defense is not None}
    parts = [(run, attack) for run in runs for attack in run.attacks]
    defenses = labels([(_defense(run), resolved.get(_asked(run), _defense_options(run))) for run, _ in parts])
    attacks = labels([(attack, _attack_options(run, attack)) for run, attack in parts])
    named = zip(parts, defenses, attacks, strict=True)
    cells = [Cell(run, name, defense, attack) for (run, name), defense, attack in named]
    order = {name: place for place, name in enumerate(dict.fromkeys(defenses))}
    cells.sort(key=lambda cell: order[cell.defense])
    return Setting(runs[0].manifest.protocol, title, any(run.synthetic for run in runs), tuple(cells))


def _defense(run: Run) -> str:
    return str(run.manifest.config.get("defense", "?"))


def _defense_options(run: Run) -> dict[str, Any]:
    return _mapping(run.manifest.config.get("defense_options"))


def _asked(run: Run) -> str:
    """The defence as it was asked for: what a failed run knows of it, too."""
    asked = [_defense(run), _defense_options(run), run.manifest.config.get("preset")]
    return json.dumps(asked, sort_keys=True, default=str)


def _attack_options(run: Run, attack: str) -> dict[str, Any]:
    budget = {name: run.manifest.config.get(name) for name in ("preset", "queries", "budget")}
    return {**budget, **run.attack_options(attack)}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def labels(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names, followed by the options in which things of one name differ."""
    made = []
    for name, options in named:
        others = [other for same, other in named if same == name]
        keys = dict.fromkeys(key for other in others for key in other)
        # repr: JSON has no order for values of different kinds, and 1 is not "1".
        differing = [key for key in keys if len({repr(other.get(key)) for other in others}) > 1]
        told = [f"{key}={options[key]}" for key in differing if options.get(key) not in (None, {})]
        shown = told[:_SHOWN_OPTIONS] + ["…"] * (len(told) > _SHOWN_OPTIONS)
        made.append(_plain(f"{name} ({', '.join(shown)})" if told else name))
    return made


def _plain(value: Any) -> str:
    """``value`` on one line, without characters that cannot be shown."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split()) or "?"


# -- the worst case --------------------------------------------------------------------------------

#: Resamples of the interval of a pointwise worst case.
_REPLICATES = 1000


@dataclass(frozen=True)
class Worst:
    """What leaks at worst by one figure, and the attack to which most leaks on average."""

    measure: Measure
    strongest: Cell


def worst_case(cells: Sequence[Cell], name: str) -> Worst | None:
    """The worst case over all attacks on one defence, by the figure ``name``; None if no attack has it.

    Attacks on the same victims are combined victim by victim (the pointwise worst case); of attacks on different
    victims (other seeds) the one that leaks most counts.
    """
    measures = [(cell, cell.result.figure(name)) for cell in cells if cell.result is not None]
    known = [(cell, measure) for cell, measure in measures if measure is not None and measure.value is not None]
    if not known:
        return None
    strongest, measure = max(known, key=lambda pair: leak(name, pair[1]))
    for group in _same_victims([cell for cell, _ in known], name):
        if len(group) > 1:
            measure = max(measure, _pointwise(group, name), key=lambda candidate: leak(name, candidate))
    return Worst(measure, strongest)


def _same_victims(cells: Sequence[Cell], name: str) -> list[list[pd.DataFrame]]:
    """The raw values of ``cells`` by ``name``, put together where they are of the same victims in the same order."""
    groups: dict[tuple[int, ...], list[pd.DataFrame]] = {}
    for cell in cells:
        rows = cell.run.rows(cell.name)
        if rows is not None and name in rows:
            groups.setdefault((cell.seed, *rows["image"].tolist()), []).append(rows)
    return list(groups.values())


def _pointwise(tables: Sequence[pd.DataFrame], name: str) -> Measure:
    """The mean over victims of the worst value of each, with its interval over identities."""
    import torch

    from bench.metrics.bootstrap import mean_estimate

    kind = KINDS[name]
    values = pd.concat([table[name].reset_index(drop=True) for table in tables], axis=1)
    worst = values.max(axis=1) if kind.leaks > 0 else values.min(axis=1)
    people = pd.factorize(tables[0]["identity"])[0]
    estimate = mean_estimate(
        torch.tensor(worst.to_numpy(dtype="float64")),
        torch.tensor(people),
        torch.Generator().manual_seed(0),
        replicates=_REPLICATES,
    )
    return kind.measure(estimate)


def floors(cells: Sequence[Cell], name: str) -> dict[str, Measure]:
    """Trivial guess -> what it gets by the figure ``name``: of several runs the most, which flatters no defence."""
    highest: dict[str, Measure] = {}
    for result in (cell.result for cell in cells if cell.result is not None):
        guesses: dict[str, Measure | None] = {}
        if result.recovery is not None:
            guesses = {label.replace("_", " "): floor.figure(name) for label, floor in result.recovery.floors.items()}
        if result.linkage is not None:
            value = result.linkage.d_sys_chance if name == "d_sys" else KINDS[name].guess
            guesses["guessing"] = None if value is None else Measure(value=value, direction=KINDS[name].direction)
        if result.inversion is not None and name == "embedding_cosine":
            guesses["mean embedding"] = result.inversion.floor
        for label, measure in guesses.items():
            if measure is not None and leak(name, measure) > leak(name, highest.get(label)):
                highest[label] = measure
    return highest


def worst_floor(cells: Sequence[Cell], name: str) -> Measure | None:
    """The floor of a worst case: per victim the guess that gets most, of several runs the most; of linkage, guessing.

    The highest floor where a run keeps no raw values.
    """
    found = [floor for cell in cells if (floor := _pointwise_floor(cell, name)) is not None]
    highest = [*found, *floors(cells, name).values()]
    return max(highest, key=lambda measure: leak(name, measure), default=None)


def _pointwise_floor(cell: Cell, name: str) -> Measure | None:
    if cell.result is None or cell.result.recovery is None:
        return None
    tables = [rows for floor in cell.result.recovery.floors if (rows := cell.run.rows(floor)) is not None]
    values = [table[name].reset_index(drop=True) for table in tables if name in table]
    if not values:
        return None
    together, kind = pd.concat(values, axis=1), KINDS[name]
    worst = together.max(axis=1) if kind.leaks > 0 else together.min(axis=1)
    return Measure(value=float(worst.mean()), direction=kind.direction, n=len(worst))


def lowest_accuracy(cells: Sequence[Cell]) -> Measure | None:
    """The lowest recognition among the runs of a defence, as far as it was measured."""
    measures = [utility.accuracy for cell in cells if (utility := cell.run.result.utility) is not None]
    known = [measure for measure in measures if measure.value is not None]
    return min(known, key=lambda measure: measure.value or 0.0, default=None)
