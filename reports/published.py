"""Figures that papers printed (``published.toml``), matched to what was measured by the names of defence and attack."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from bench.measures import KINDS
from bench.results import Measure


class Source(BaseModel):
    """A paper, where to find it, and under which conditions its figures arose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    citation: str
    conditions: str
    url: str | None = None

    @property
    def short(self) -> str:
        """What a table has room for: the venue and year, or the paper's number."""
        return self.citation.rpartition(", ")[2]


class Figure(BaseModel):
    """What one paper printed of one defence, in the units of :class:`bench.results.Measure`.

    Attributes:
        attack: the attack it was printed for; None for recognition without an attack.
        values: name of a figure -> value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    defense: str
    attack: str | None = None
    knowledge: str | None = None
    values: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, entry: dict[str, object]) -> dict[str, object]:
        """The figures of an entry stand in the file beside its other keys."""
        values = {key: value for key, value in entry.items() if key in KINDS}
        return {**{key: value for key, value in entry.items() if key not in KINDS}, "values": values}

    def measure(self, name: str) -> Measure | None:
        """The figure ``name``; papers give no interval."""
        return Measure(value=self.values[name], direction=KINDS[name].direction) if name in self.values else None


@cache
def published() -> tuple[Figure, ...]:
    """Everything in ``published.toml``."""
    document = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    sources = {entry["id"]: Source.model_validate(entry) for entry in document["sources"]}
    return tuple(Figure.model_validate({**entry, "source": sources[entry["source"]]}) for entry in document["figures"])


def matching(defense: object, attacks: Iterable[str]) -> list[Figure]:
    """What was printed of the defence of that name: under one of ``attacks``, or of its recognition alone."""
    return [figure for figure in published() if figure.defense == defense and figure.attack in (None, *attacks)]
