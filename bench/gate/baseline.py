"""The baseline file: what each cell's figures are expected to be, the scores behind them, and what is tolerated.

It is meant to be committed and reviewed. Tolerances and margins may be edited by hand; scores may not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from bench import __version__
from bench.errors import DataError, MissingError
from bench.files import write_text
from bench.gate.figures import Role, harm_sign
from bench.gate.scores import CellKey, RunScores, StoredModel
from bench.results import PROTOCOL_VERSION, Direction

BASELINE_VERSION = "1"


class Expected(StoredModel):
    """One figure of a cell.

    Attributes:
        value: mean over the baseline's runs.
        role: whom the gate protects with it.
        higher_is_better_for: which way it reads.
        rate: whether it is a share of trials.
        absolute, relative: a harmful change of up to ``absolute + relative * |value|`` is tolerated.
        margin: a pass rules out a harmful change of this size or more, or of the tolerance where that is larger.
        seed_sd, seed_df: standard deviation between runs of different seeds beyond the choice of victims, and its
            degrees of freedom.
        repeat_sd, repeat_df: the same between runs of one seed that were trained anew.
        limit: the value at which everything is lost.
    """

    value: float
    role: Role
    higher_is_better_for: Direction
    rate: bool = False
    absolute: float = Field(ge=0)
    relative: float = Field(0.0, ge=0)
    margin: float = Field(ge=0)
    seed_sd: float = Field(ge=0)
    seed_df: float = Field(gt=0)
    repeat_sd: float = Field(ge=0)
    repeat_df: float = Field(gt=0)
    limit: float | None = None

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
        """+1 where a rise does harm, -1 where a fall does."""
        return harm_sign(self.role, self.higher_is_better_for)

    @property
    def excluded(self) -> float:
        """What a pass rules out: the margin, and what somebody tolerates beyond it."""
        return max(self.margin, self.tolerance)


class Cell(StoredModel):
    """One cell: what it is, what its figures are, and the runs that say so.

    Attributes:
        resolved: all options of defence and attack as they stood, for people: a changed default is told, not judged.
    """

    key: CellKey
    resolved: dict[str, str] = Field(default_factory=dict)
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
    """The file.

    Attributes:
        schema_: version of this format.
        protocol: of the results; others cannot be compared.
        made_by: version of the suite.
        alpha: chance, per run, that anything is called a regression that is none.
        alpha_pass: chance that a harmful change of a figure's margin passes.
    """

    schema_: Literal["1"] = Field("1", alias="schema")
    protocol: str = PROTOCOL_VERSION
    made_by: str = __version__
    alpha: float = Field(0.002, gt=0, lt=0.5)
    alpha_pass: float = Field(0.05, gt=0, lt=0.5)
    cells: list[Cell] = Field(min_length=1)

    @model_validator(mode="after")
    def _cells_differ(self) -> Self:
        counts = Counter(cell.key.model_dump_json() for cell in self.cells)
        for cell in self.cells:
            if counts[cell.key.model_dump_json()] > 1:
                raise ValueError(f"the cell {cell.key.label} is there twice")
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
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "document"
        what = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"baseline {path} cannot be used: {where}: {what}") from None


def _on_one_line(match: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", match[0]).replace("[ ", "[").replace(" ]", "]")


if __name__ == "__main__":  # writes the shipped JSON schema
    target = Path(__file__).parents[1] / "schema" / f"baseline-{BASELINE_VERSION}.json"
    write_text(target, json.dumps(Baseline.model_json_schema(by_alias=True), indent=2) + "\n")
