"""What differs between two runs: the document that ``bench compare --json`` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.results import Direction


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Setting(_Model):
    """One setting that differs; None where a run does not have it."""

    kind: Literal["asked", "resolved", "machine"]
    name: str
    first: str | None
    second: str | None


class FigureChange(_Model):
    """One figure in both runs.

    Attributes:
        figure: its place in ``metrics.json``.
        higher_is_better_for: which way it reads.
        first, second: its values; None where a run has none.
        change: ``second - first``.
        ci95: 95 % interval over people; of the victims' choice alone, without what another training would change.
        victims: whether both are of the same people, so that the interval is paired.
    """

    figure: str
    higher_is_better_for: Direction
    first: float | None
    second: float | None
    change: float | None = None
    ci95: tuple[float, float] | None = None
    victims: str | None = None


class Difference(_Model):
    """``bench compare A B --json``."""

    first: str
    second: str
    settings: list[Setting]
    figures: list[FigureChange]
    warnings: dict[str, list[str]]
