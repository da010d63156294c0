"""The baseline file: what each cell's figures are expected to be, the scores behind them, and what is tolerated.

It is meant to be committed and reviewed. Tolerances and margins may be edited by hand; scores may not.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bench import __version__
from bench.errors import DataError, MissingError, UsageError
from bench.files import write_text
from bench.gate.comparison import Variance, between_runs, moderated, pool, quantile, victims_variance
from bench.gate.scores import (
    FIGURES,
    CellKey,
    Role,
    RunScores,
    StoredModel,
    as_text,
    cell_key,
    first_problem,
    run_scores,
)
from bench.measures import LARGEST, Direction
from bench.results import PROTOCOL_VERSION
from bench.run.archive import Run

BASELINE_VERSION = "2"


class Expected(StoredModel):
    """One figure of a cell."""

    value: float = Field(description="mean over the baseline's runs")
    role: Role = Field(description="whom the gate protects with it")
    direction: Direction = Field(description="what a higher value means")
    rate: bool = Field(False, description="whether it is a share of trials")
    absolute: float = Field(ge=0, description="harmful change that is tolerated, in the figure's unit")
    relative: float = Field(0.0, ge=0, description="what is tolerated besides, as a share of the value")
    margin: float = Field(ge=0, description="a pass rules out a harmful change of this, or of the tolerance if larger")
    paired_margin: float | None = Field(
        None, ge=0, description="the margin of a run whose seed is one of the baseline's; null: the same"
    )
    seed_sd: float = Field(
        ge=0, le=LARGEST, description="standard deviation between seeds, beyond the choice of victims"
    )
    seed_df: float = Field(gt=0, description="its degrees of freedom")
    repeat_sd: float = Field(
        ge=0, le=LARGEST, description="standard deviation between runs of one seed that were trained anew"
    )
    repeat_df: float = Field(gt=0, description="its degrees of freedom")
    limit: float | None = Field(None, description="the value at which everything is lost")

    @property
    def tolerance(self) -> float:
        """What is tolerated, in the figure's unit."""
        return self.absolute + self.relative * abs(self.value)

    @property
    def guarded(self) -> bool:
        """Whether a pass rules out the loss of all that is left."""
        return self.limit is None or self.excluded < abs(self.limit - self.value)

    @property
    def harm_sign(self) -> int:
        """+1 where a rise does harm, -1 where a fall does.

        Leaking more harms privacy; recognising less harms utility; and a canary is harmed when its attack gets less.
        """
        return 1 if (self.direction in ("leakage", "cost")) == (self.role != "canary") else -1

    @property
    def excluded(self) -> float:
        """What a pass rules out: the margin, and what somebody tolerates beyond it."""
        return max(self.margin, self.tolerance)

    def of(self, *, paired: bool) -> Expected:
        """What holds for a run of a seed of the baseline if it is ``paired``, else for one of another seed."""
        if not paired or self.paired_margin is None:
            return self
        return self.model_copy(update={"margin": self.paired_margin})

    def between(self, *, paired: bool) -> Variance:
        """Variance between runs: of one seed if they are ``paired``, else of several."""
        sd, df = (self.repeat_sd, self.repeat_df) if paired else (self.seed_sd, self.seed_df)
        return Variance(sd**2, df)


class Cell(StoredModel):
    """One cell: what it is, what its figures are, and the runs that say so."""

    key: CellKey
    resolved: dict[str, str] = Field(
        {}, description="all options of defence and attack as they stood: a changed default is told, not judged"
    )
    figures: dict[str, Expected]
    runs: list[RunScores] = Field(min_length=1)

    @model_validator(mode="after")
    def _figures_follow(self) -> Self:
        for name, expected in self.figures.items():
            lacking = [run.run_id for run in self.runs if name not in run.figures]
            if lacking:
                raise ValueError(f"{name}: run {lacking[0]} has no scores of it")
            mean = sum(run.figures[name].value for run in self.runs) / len(self.runs)
            if abs(mean - expected.value) > 1e-4 * max(1.0, abs(mean)):
                raise ValueError(f"{name}: the value {expected.value:g} is not the mean of its runs, {mean:g}")
        return self


class Baseline(StoredModel):
    """The file."""

    schema_: Literal["2"] = Field("2", alias="schema", description="version of this format")
    protocol: str = Field(PROTOCOL_VERSION, description="of the results; others cannot be compared")
    made_by: str = Field(__version__, description="version of the suite")
    alpha: float = Field(
        0.002, gt=0, lt=0.5, description="chance, per run, that anything is called a regression that is none"
    )
    alpha_pass: float = Field(
        0.05, gt=0, lt=0.5, description="chance that a harmful change of a figure's margin passes"
    )
    cells: list[Cell] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, document: Any) -> Any:
        """Version 1 said whom a higher value suits, utility or privacy, which is no direction."""
        if not isinstance(document, dict) or document.get("schema") != "1":
            return document
        document = copy.deepcopy(document) | {"schema": BASELINE_VERSION}
        try:
            for cell in document["cells"]:
                for name, figure in cell["figures"].items():
                    del figure["higher_is_better_for"]
                    figure["direction"] = FIGURES[name].direction
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is not a baseline of schema 1 either: {error!r}") from None
        return document

    @model_validator(mode="after")
    def _cells_differ(self) -> Self:
        seen = set()
        for cell in self.cells:
            if (document := cell.key.model_dump_json()) in seen:
                raise ValueError(f"the cell {cell.key.label} is there twice")
            seen.add(document)
        return self

    def to_json(self) -> str:
        """The document as stored: indented, with lists of scores on one line."""
        document = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1)
        # Strings of JSON hold no line feed, so only a list's own layout can match.
        return re.sub(r'\[\n\s+(?:(?:null|[-\w.+"]+),?\n\s*)+\]', _on_one_line, document) + "\n"


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Write the file in one step."""
    write_text(path, baseline.to_json())


def read_baseline(path: Path) -> Baseline:
    """A baseline file.

    Raises:
        MissingError: it is not there or cannot be read.
        DataError: it is not a baseline, or was damaged; one line says where.
    """
    try:
        return Baseline.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise MissingError(f"baseline {path} does not exist: make one with `bench baseline RUN... -o {path}`") from None
    except OSError as error:
        raise MissingError(f"baseline {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"baseline {path} cannot be used: {first_problem(error)}") from None


def _on_one_line(match: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]")


#: Chance that a run of unchanged code and another seed does not pass.
_UNDECIDED = 1e-3


def make_baseline(runs: Sequence[Run], earlier: Baseline | None = None) -> Baseline:
    """The baseline of some runs; runs that differ by nothing but their seed make one cell of each attack.

    Args:
        runs: successful runs of one protocol.
        earlier: a baseline that is replaced: of cells and figures that are in both, its tolerances are kept.

    Raises:
        UsageError: a run failed or was given twice, or its protocol is not this version's.
        DataError: a run's files contradict each other.
    """
    cells: dict[str, tuple[CellKey, str, list[Run]]] = {}
    for run in runs:
        check_protocol(run, PROTOCOL_VERSION)
        if run.failed or run.result.failed:
            why = run.result.error or "; ".join(run.result.failed.values())
            raise UsageError(f"{run.directory} failed ({why}): a baseline needs runs that succeeded")
        for attack in run.attacks:
            key = cell_key(run, attack)
            cells.setdefault(key.model_dump_json(), (key, attack, []))[2].append(run)
    kept = {cell.key.model_dump_json(): cell.figures for cell in earlier.cells} if earlier else {}
    made = [_cell(key, attack, of_it, kept.get(document, {})) for document, (key, attack, of_it) in cells.items()]
    return Baseline(cells=made, **(earlier.model_dump(include={"alpha", "alpha_pass"}) if earlier else {}))


def check_protocol(run: Run, protocol: str) -> None:
    """Refuse a run of another protocol version.

    Raises:
        UsageError: its figures cannot be compared.
    """
    if run.manifest.protocol != protocol:
        raise UsageError(
            f"{run.directory} is of protocol version {run.manifest.protocol}, not {protocol}: their figures cannot be "
            "compared; run it, or make the baseline, with one version"
        )


def resolved_options(run: Run, attack: str) -> dict[str, str]:
    """All options of defence and attack as they stood in a run, as text."""
    defense, part = run.result.defense, run.attacks[attack]
    options = {f"-o {k}": v for k, v in as_text(defense.options).items()} if defense else {}
    return options | ({f"-a {k}": v for k, v in as_text(part.attack.options).items()} if part else {})


def _cell(key: CellKey, attack: str, runs: Sequence[Run], kept: Mapping[str, Expected]) -> Cell:
    scores = [run_scores(run, attack)[0] for run in runs]
    seen = set()
    for run in scores:  # a run given twice would make runs look more alike than they are
        if (content := run.model_dump_json(exclude={"run_id"})) in seen:
            raise UsageError(f"{key.label}: two runs of seed {run.seed} are one and the same; give it once")
        seen.add(content)
    names = [name for name in FIGURES if all(name in run.figures for run in scores)]
    if not any(FIGURES[name].role == "privacy" and name != "defense.entropy_bits" for name in names):
        raise DataError(f"{key.label}: no privacy figure was measured, so there is nothing to guard")
    scores = [run.model_copy(update={"figures": {name: run.figures[name] for name in names}}) for run in scores]
    figures = {name: _expected(name, scores, len(names)) for name in names}
    for name in figures.keys() & kept.keys():
        tolerated = kept[name].model_dump(include={"absolute", "relative"})
        figures[name] = figures[name].model_copy(update=tolerated)
    return Cell(key=key, resolved=resolved_options(runs[0], attack), figures=figures, runs=scores)


def _expected(name: str, runs: Sequence[RunScores], tests: int) -> Expected:
    figure, guard = FIGURES[name], FIGURES[name].guard
    seeds = len({(run.seed, run.source) for run in runs})
    by_seed = between_runs(name, runs, rate=figure.rate, same_seed=False)
    by_repeat = between_runs(name, runs, rate=figure.rate, same_seed=True)
    seed = moderated(by_seed, seeds, guard.seed_sd)
    repeat = moderated(by_repeat, len(runs) - seeds + 1, guard.repeat_sd)
    margin, paired_margin = (
        _rounded(max(guard.tolerance, _margin(total, tests, alpha=Baseline.model_fields["alpha_pass"].default)))
        for total in (_of_another_seed(name, runs, seed), _of_the_same_seed(name, runs, repeat))
    )
    return Expected(
        value=sum(run.figures[name].value for run in runs) / len(runs),
        role=figure.role,
        direction=figure.direction,
        rate=figure.rate,
        absolute=guard.tolerance,
        margin=margin,
        paired_margin=paired_margin,
        seed_sd=_rounded(math.sqrt(seed.value)),
        seed_df=seed.df,
        repeat_sd=_rounded(math.sqrt(repeat.value)),
        repeat_df=repeat.df,
        limit=guard.limit,
    )


def _margin(total: Variance, tests: int, *, alpha: float) -> float:
    """The least margin with which a run of the same code passes almost surely, of whose change this is the variance.

    With the standard error ``s`` of such a run's change, which is 0 on average, the upper bound of the change is below
    ``(t_(1-alpha) + t_(1-u)) s`` with probability ``1 - u``; ``u`` is the chance not to pass, shared among the figures.
    """
    return (quantile(1 - alpha, total.df) + quantile(1 - _UNDECIDED / tests, total.df)) * math.sqrt(total.value)


def _of_another_seed(name: str, runs: Sequence[RunScores], seed: Variance) -> Variance:
    """Of the change of a run of another seed, whatever its victims."""
    alone = [victims_variance(name, [(run, 1.0)], rate=FIGURES[name].rate) for run in runs]
    known = [part for part in alone if part is not None]
    if not known:
        return Variance(0.0, math.inf)
    more = 1 + 1 / len(runs)
    people = Variance(more * sum(part.value for part in known) / len(known), pool(known).df)
    return pool([people, Variance(more * seed.value, seed.df)])


def _of_the_same_seed(name: str, runs: Sequence[RunScores], repeat: Variance) -> Variance:
    """Of the change of a run of one of the seeds that was trained anew, hence of the same victims."""
    pairs = [pair for pair in itertools.combinations(runs, 2) if len({(run.seed, run.source) for run in pair}) == 1]
    parts = [victims_variance(name, [(a, 1.0), (b, -1.0)], rate=FIGURES[name].rate) for a, b in pairs]
    known = [part for part in parts if part is not None]
    # Where nothing was trained anew, people are assumed to differ in it by as much as runs do.
    people = Variance(sum(part.value for part in known) / len(known), pool(known).df) if known else repeat
    return pool([people, Variance(2 * repeat.value, repeat.df)])


def _rounded(value: float) -> float:
    """Up, to two significant digits: nobody should read more into it."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.3g}")


if __name__ == "__main__":  # writes the shipped JSON schema
    target = Path(__file__).parents[1] / "schema" / f"baseline-{BASELINE_VERSION}.json"
    write_text(target, json.dumps(Baseline.model_json_schema(by_alias=True), indent=2) + "\n")
