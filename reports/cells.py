"""Orders runs for comparison: which are comparable at all, which attack the same defence, and what each is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.run.archive import Run

#: Options named in a label at most; provenance has them all.
_SHOWN_OPTIONS = 3


@dataclass(frozen=True)
class Cell:
    """A run under the names that set it apart from the others of its report.

    Attributes:
        run: the run.
        defense: name of the defence, with the options that tell it from others of that name.
        attack: name of the attack, in the same way.
        seed: of the run.
    """

    run: Run
    defense: str
    attack: str
    seed: int

    @property
    def knowledge(self) -> str:
        """The rung of the ladder."""
        return _plain(self.run.manifest.config.get("knowledge", "?"))

    @property
    def label(self) -> str:
        """Everything that tells this run from the others, in one line."""
        return f"{self.attack} ({self.knowledge}) on {self.defense}"


@dataclass(frozen=True)
class Setting:
    """Runs that may be compared: of one protocol version, dataset, image size and judge.

    Attributes:
        protocol: version of the protocol.
        title: dataset and image size.
        synthetic: whether any of the faces were made up.
        cells: the runs, by defence, in the order given.
    """

    protocol: str
    title: str
    synthetic: bool
    cells: tuple[Cell, ...]

    @property
    def defenses(self) -> dict[str, list[Cell]]:
        """The runs of each defence."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.defense, []).append(cell)
        return groups

    @property
    def measured(self) -> list[Cell]:
        """The runs that have figures."""
        return [cell for cell in self.cells if not cell.run.failed]


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Group ``runs`` by what makes them comparable, each with the shortest labels that tell them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_comparable(run), sort_keys=True, default=str), []).append(run)
    titles = _labels([(_title(group[0]), _comparable(group[0])) for group in groups.values()])
    return [_setting(title, group) for title, group in zip(titles, groups.values(), strict=True)]


def _comparable(run: Run) -> dict[str, Any]:
    """What two runs must share before one figure may stand beside the other."""
    config = run.manifest.config
    evaluator = config.get("evaluator")
    return {
        "protocol": run.manifest.protocol,
        "dataset": config.get("dataset"),
        "data": Path(str(config["data_root"])).name if config.get("data_root") else None,
        "image_size": config.get("image_size"),
        "evaluator": Path(str(evaluator)).name if evaluator else config.get("evaluator_backbone"),
        **_mapping(config.get("dataset_options")),
    }


def _title(run: Run) -> str:
    config = run.manifest.config
    return f"{config.get('dataset', '?')}, {config.get('image_size', '?')} px, protocol {run.manifest.protocol}"


def _setting(title: str, runs: Sequence[Run]) -> Setting:
    resolved = {_asked(run): run.result.defense.options for run in runs if run.result.defense is not None}
    defenses = _labels([(_name(run, "defense"), resolved.get(_asked(run), _options(run, "defense"))) for run in runs])
    attacks = _labels([(_name(run, "attack"), _attack_options(run)) for run in runs])
    cells = [
        Cell(run, defense, attack, int(run.manifest.config.get("seed", 0)))
        for run, defense, attack in zip(runs, defenses, attacks, strict=True)
    ]
    order = {name: place for place, name in enumerate(dict.fromkeys(defenses))}
    cells.sort(key=lambda cell: order[cell.defense])
    return Setting(runs[0].manifest.protocol, title, any(run.synthetic for run in runs), tuple(cells))


def _name(run: Run, part: str) -> str:
    return str(run.manifest.config.get(part, "?"))


def _options(run: Run, part: str) -> dict[str, Any]:
    return _mapping(run.manifest.config.get(f"{part}_options"))


def _asked(run: Run) -> str:
    """The defence as it was asked for: what a failed run knows of it, too."""
    asked = [_name(run, "defense"), _options(run, "defense"), run.manifest.config.get("preset")]
    return json.dumps(asked, sort_keys=True, default=str)


def _attack_options(run: Run) -> dict[str, Any]:
    config = run.manifest.config
    budget = {name: config.get(name) for name in ("preset", "queries", "budget")}
    return {**budget, **_options(run, "attack")}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _labels(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names, followed by the options in which things of one name differ."""
    found = []
    for name, options in named:
        others = [other for same, other in named if same == name]
        keys = dict.fromkeys(key for other in others for key in other)
        # repr: JSON has no order for values of different kinds, and 1 is not "1".
        differing = [key for key in keys if len({repr(other.get(key)) for other in others}) > 1]
        own = [f"{key}={options[key]}" for key in differing if options.get(key) not in (None, {})]
        shown = own[:_SHOWN_OPTIONS] + ["…"] * (len(own) > _SHOWN_OPTIONS)
        found.append(_plain(f"{name} ({', '.join(shown)})" if own else name))
    return found


def _plain(value: Any) -> str:
    """``value`` on one line, without characters that cannot be shown."""
    return " ".join("".join(one if one.isprintable() else " " for one in str(value)).split()) or "?"
