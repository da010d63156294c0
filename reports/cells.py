"""Orders attacks on defences for comparison: which may be compared, what each is called, and the worst case of all."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from bench.data.loaders import ROLES
from bench.gate.comparison import quantile
from bench.gate.scores import RunScores, Scores, as_text
from bench.measures import KINDS, leak
from bench.results import NO_BETTER, AttackResult, Measure
from bench.run.archive import Run

#: Options named in a label at most; provenance has them all.
_SHOWN_OPTIONS = 3


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that may be compared, each attack a cell, by defence.

    They are of one protocol, dataset, image size, evaluator, teacher, and recogniser of plain faces, where that was
    brought along. A setting is ``synthetic`` if any of its faces were made up.
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
    def rungs(self) -> dict[tuple[str, str], list[Cell]]:
        """The attacks on each defence by what the attacker knows, who knows more later on."""
        groups: dict[tuple[str, str], list[Cell]] = {}
        for defense, cells in self.defenses.items():
            for cell in sorted(cells, key=lambda cell: _height(cell.knowledge)):
                groups.setdefault((defense, cell.knowledge), []).append(cell)
        return groups

    @property
    def knowledge(self) -> list[str]:
        """The rungs of the ladder on which anybody attacked, who knows more later on."""
        return sorted({cell.knowledge for cell in self.cells}, key=lambda rung: (_height(rung), rung))

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


Of = TypeVar("Of", Setting, Cell)
Asked = ParamSpec("Asked")
Made = TypeVar("Made")


def once(make: Callable[Concatenate[Of, Asked], Made]) -> Callable[Concatenate[Of, Asked], Made]:
    """Make the same of a setting or a cell only once: pages, tables and figures all ask for it, and it goes with it."""

    @functools.wraps(make)
    def ask(of: Of, /, *args: Asked.args, **kwargs: Asked.kwargs) -> Made:
        made, asked = vars(of).setdefault("_made", {}), (make, args, *kwargs.items())
        if asked not in made:
            made[asked] = make(of, *args, **kwargs)
        found: Made = made[asked]
        return found

    return ask


_LADDER = ("blackbox", "whitebox", "oracle")


def _height(knowledge: str) -> int:
    return _LADDER.index(knowledge) if knowledge in _LADDER else len(_LADDER)


class Attempts(NamedTuple):
    """Runs to show, and attempts that say nothing more than these: killed or still running, and made anew later on."""

    kept: list[Run]
    killed: list[Run]
    superseded: list[Run]


def attempts(runs: Sequence[Run]) -> Attempts:
    """Sort ``runs``: one that failed is kept, unless a later one of the same settings has figures."""
    killed = [run for run in runs if run.failed and run.manifest.status in ("started", "cancelled")]
    ended = [run for run in runs if run not in killed]
    old = [run for run in ended if any(_replaces(later, run) for later in ended)]
    return Attempts([run for run in ended if run not in old], killed, old)


#: Settings that say where things lie or how fast they are done.
_PLACES = ("out", "resume", "logger", "device", "data_root", "evaluator", "teacher", "bootstrap", "batch_size")


def _replaces(later: Run, run: Run) -> bool:
    """Whether ``later`` has figures, and was asked for what ``run`` was; a setting of one alone came with a version."""
    if later.failed or later.manifest.started <= run.manifest.started or _comparable(later) != _comparable(run):
        return False
    one, other = (_requested(each.manifest.config) for each in (later, run))
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def _requested(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text; options of plug-ins as a whole, of which one that is absent has its default."""
    options = {key: value for key, value in config.items() if key.endswith("_options")}
    flat = as_text({key: value for key, value in config.items() if key not in (*options, *_PLACES)})
    return flat | {key: json.dumps(value, sort_keys=True, default=str) for key, value in options.items()}


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
    # Where there is one alone it sees plain faces, or else the other figures are not those of a brought recogniser.
    plain = config.get("plain_recogniser") or config.get("recogniser")
    return {
        "protocol": run.manifest.protocol,
        "dataset": config.get("dataset"),
        "data": Path(str(config["data_root"])).name if config.get("data_root") else None,
        **{role: named_data(config[role]) for role in ROLES if config.get(role)},
        "image_size": config.get("image_size"),
        "limit": config.get("limit"),
        "evaluator": [Path(str(file)).name for file in (evaluator if isinstance(evaluator, list) else [evaluator])]
        or config.get("evaluator_backbone"),
        "teacher": Path(str(config["teacher"])).name if config.get("teacher") else None,
        "plain recogniser": Path(str(plain)).name if plain else None,
        **_mapping(config.get("dataset_options")),
    }


def named_data(text: object) -> str:
    """``folder:photographs`` of ``folder:/home/somebody/photographs``: the rest is nobody's business."""
    name, _, root = str(text).partition(":")
    return f"{name}:{Path(root).name}" if root else name


def _title(run: Run) -> str:
    config = run.manifest.config
    dataset = str(config.get("victims") or config.get("dataset", "?")).partition(":")[0]
    return f"{dataset}, {config.get('image_size', '?')} px, protocol {run.manifest.protocol}"


def _setting(title: str, runs: Sequence[Run]) -> Setting:
    resolved = {_asked(run): run.result.defense.options for run in runs if run.result.defense is not None}
    parts = [(run, attack) for run in runs for attack in run.attacks]
    trained = _trained(runs)
    defenses = labels(
        [
            (_defense(run), resolved.get(_asked(run), _defense_options(run)) | trained.get(run.directory, {}))
            for run, _ in parts
        ]
    )
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


def _trained(runs: Sequence[Run]) -> dict[Path, dict[str, str]]:
    """Run -> how its recogniser was trained, as far as that differs from others behind a defence of that name.

    Recognition behind one and the leakage of another are not figures of one defence.
    """
    ways = {
        run.directory: as_text({name: run.manifest.config.get(name) for name in ("backbone", "training")})
        for run in runs
        if run.result.utility is not None
    }
    groups: dict[str, list[dict[str, str]]] = {}
    for run in (run for run in runs if run.directory in ways):
        groups.setdefault(_defense(run), []).append(ways[run.directory])
    varied = {name: _varied(group) for name, group in groups.items()}
    return {
        run.directory: {key: way for key, way in ways[run.directory].items() if key in varied[_defense(run)]}
        for run in runs
        if run.directory in ways
    }


def _varied(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all of ``options``, in order."""
    keys = dict.fromkeys(key for each in options for key in each)
    # repr: JSON has no order for values of different kinds, and 1 is not "1".
    return [key for key in keys if len({repr(each.get(key)) for each in options}) > 1]


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
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, options in named:
        groups.setdefault(name, []).append(options)
    varied = {name: _varied(group) for name, group in groups.items()}
    made = []
    for name, options in named:
        told = [f"{key}={options[key]}" for key in varied[name] if options.get(key) not in (None, {})]
        shown = told[:_SHOWN_OPTIONS] + ["…"] * (len(told) > _SHOWN_OPTIONS)
        made.append(_plain(f"{name} ({', '.join(shown)})" if told else name))
    return made


def _plain(value: Any) -> str:
    """``value`` on one line, without characters that cannot be shown."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split()) or "?"


# -- the worst case --------------------------------------------------------------------------------

#: Resamples of the interval of a pointwise worst case.
_REPLICATES = 1000
#: Of a normal distribution, for half the width of its 95 % interval.
_Z95 = 1.959964


@dataclass(frozen=True)
class Worst:
    """What leaks at worst by one figure, over seeds, and the attack to which most leaks on average.

    ``scores`` are those behind ``measure``, of each seed by person, for comparisons.
    """

    measure: Measure
    strongest: Cell
    scores: tuple[RunScores, ...]


def worst_case(cells: Sequence[Cell], name: str) -> Worst | None:
    """The worst case over all attacks on one defence, by the figure ``name``; None if no attack has it.

    Attacks of one seed on the same victims are combined victim by victim (the pointwise worst case); of others of one
    seed the one that leaks most counts. What that gives is averaged over the seeds that met the same attacks
    (:func:`over_seeds`); of seeds that met others, those count of which most leaks.
    """
    return _worst(cells[0], tuple(cells), name) if cells else None


@once
def _worst(first: Cell, cells: tuple[Cell, ...], name: str) -> Worst | None:
    measures = [(cell, cell.result.figure(name)) for cell in cells if cell.result is not None]
    known = [(cell, measure) for cell, measure in measures if measure is not None and measure.value is not None]
    seeds: dict[int, list[tuple[Cell, Measure]]] = {}
    for cell, measure in known:
        seeds.setdefault(cell.seed, []).append((cell, measure))
    alike: dict[frozenset[str], list[list[tuple[Cell, Measure]]]] = {}
    for group in seeds.values():
        alike.setdefault(frozenset(cell.attack for cell, _ in group), []).append(group)
    cases = []
    for groups in alike.values():
        parts = [_of_seed(group, name) for group in groups]
        strongest, _ = max((pair for group in groups for pair in group), key=lambda pair: leak(name, pair[1]))
        mean = over_seeds(name, [measure for measure, _ in parts])
        cases.append(Worst(mean, strongest, tuple(scores for _, scores in parts)))
    return max(cases, key=lambda case: leak(name, case.measure), default=None)


def _of_seed(known: Sequence[tuple[Cell, Measure]], name: str) -> tuple[Measure, RunScores]:
    """The worst case among attacks of one seed, and the raw scores behind it by person."""
    strongest, measure = max(known, key=lambda pair: leak(name, pair[1]))
    rows = strongest.run.rows(strongest.name)
    rows = rows[["image", "identity", name]] if rows is not None and name in rows else None
    for group in _same_victims([cell for cell, _ in known], name):
        if len(group) > 1:
            table = _pointwise(group, name)
            together = _mean(table, name)
            if leak(name, together) > leak(name, measure):
                measure, rows = together, table
    return measure, _by_person(strongest, name, measure, rows)


def _by_person(cell: Cell, name: str, measure: Measure, rows: pd.DataFrame | None) -> RunScores:
    dataset = cell.run.result.dataset
    source = json.dumps([dataset and [dataset.name, dataset.details]], sort_keys=True, default=str)
    known: dict[str, Any] = {"run_id": cell.run.manifest.run_id, "seed": cell.seed, "source": source}
    if rows is None or rows[name].isna().all():
        people = max(1, 0 if dataset is None else dataset.identities.get("victims", measure.n))
        low, high = measure.ci95 or (0.0, 0.0)
        # Where every resample gave the same, people who are all alike say no more than Laplace's rule lets them.
        se = (high - low) / (2 * _Z95) if measure.ci95 else 1 / (people + 2)
        return RunScores(**known, victims=people, figures={name: Scores(value=measure.value or 0.0, se=se)})
    groups = rows.dropna().groupby(rows["identity"].astype(str))[name].agg(["mean", "count"])
    means, counts = groups["mean"].astype(float), groups["count"].astype(int)
    value = float((means * counts).sum() / counts.sum())
    scores = Scores(value=value, means=means.tolist(), counts=counts.tolist())
    names = [f"{source}{person}" for person in groups.index]
    return RunScores(**known, victims=len(groups), people=names, figures={name: scores})


def over_seeds(name: str, measures: Sequence[Measure]) -> Measure:
    """The mean of a figure over seeds, with an interval that knows of people and of seeds.

    Each half of the interval is the root of the sum of two squares: the mean of that half over the runs' own intervals
    (seeds may share their victims, so that their number makes nobody surer of these), and half of Student's t interval
    of the mean of the seeds' values. Of one seed it is the run's own.
    """
    if len(measures) == 1:
        return measures[0]
    values = np.array([measure.value for measure in measures], dtype=float)
    mean, between = float(values.mean()), seed_half(values)
    ends = np.array([measure.ci95 or (measure.value, measure.value) for measure in measures], dtype=float)
    below, above = (values - ends[:, 0]).mean(), (ends[:, 1] - values).mean()
    low, high = mean - math.hypot(float(below), between), mean + math.hypot(float(above), between)
    least, most = KINDS[name].ends
    low, high = max(least, low), min(most, high)
    certain = low == high
    return Measure(
        value=mean,
        ci95=None if certain else (low, high),
        n=sum(measure.n for measure in measures),
        direction=KINDS[name].direction,
        reason="no confidence interval: every seed gives the same value" if certain else None,
    )


def seed_half(values: np.ndarray[Any, np.dtype[np.float64]], level: float = 0.975) -> float:
    """Half of Student's t interval of the mean of ``values``, one for each seed."""
    if len(values) < 2:
        return 0.0
    return quantile(level, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def _same_victims(cells: Sequence[Cell], name: str) -> list[list[pd.DataFrame]]:
    """The raw values of ``cells`` by ``name``, put together where they are of the same victims in the same order."""
    groups: dict[tuple[int, ...], list[pd.DataFrame]] = {}
    for cell in cells:
        rows = cell.run.rows(cell.name)
        if rows is not None and name in rows:
            groups.setdefault((cell.seed, *rows["image"].tolist()), []).append(rows)
    return list(groups.values())


def _pointwise(tables: Sequence[pd.DataFrame], name: str) -> pd.DataFrame:
    """The worst value of each victim."""
    values = pd.concat([table[name].reset_index(drop=True) for table in tables], axis=1)
    worst = values.max(axis=1) if KINDS[name].leaks > 0 else values.min(axis=1)
    first = tables[0].reset_index(drop=True)
    return first[["image", "identity"]].assign(**{name: worst.astype("float64")})


def _mean(rows: pd.DataFrame, name: str) -> Measure:
    """The mean over victims, with its interval over identities."""
    import torch

    from bench.metrics.bootstrap import mean_estimate

    estimate = mean_estimate(
        torch.tensor(rows[name].to_numpy(dtype="float64")),
        torch.tensor(pd.factorize(rows["identity"])[0]),
        torch.Generator().manual_seed(0),
        replicates=_REPLICATES,
    )
    return KINDS[name].measure(estimate)


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


class Recognition(NamedTuple):
    """Recognition behind a defence and without it."""

    protected: Measure
    unprotected: Measure


def recognition(cells: Sequence[Cell]) -> Recognition | None:
    """Accuracy behind a defence, the lowest of each seed's runs and averaged over seeds, and that without it.

    None where it was not measured.
    """
    lowest: dict[int, Recognition] = {}
    for cell in cells:
        if (utility := cell.run.result.utility) is None or utility.accuracy.value is None:
            continue
        known = lowest.get(cell.seed)
        if known is None or utility.accuracy.value < (known.protected.value or 0.0):
            lowest[cell.seed] = Recognition(utility.accuracy, utility.unprotected.accuracy)
    if not lowest:
        return None
    plain = [pair.unprotected for pair in lowest.values() if pair.unprotected.value is not None]
    protected = over_seeds("accuracy", [pair.protected for pair in lowest.values()])
    return Recognition(protected, over_seeds("accuracy", plain) if plain else next(iter(lowest.values())).unprotected)
