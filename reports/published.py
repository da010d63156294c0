"""Figures that papers printed (``published.toml``), matched to what was measured by the names of defence and attack.

And tables of theirs: which figures stand in which, filled in :mod:`reports.papers`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

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
        values: name of a figure -> value; ``accuracy`` is on LFW.
        packs: further verification pack -> accuracy; ``ijbb`` and ``ijbc`` -> TAR at FAR 1e-4.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    defense: str
    attack: str | None = None
    knowledge: str | None = None
    values: dict[str, float]
    packs: dict[str, float] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, entry: dict[str, object]) -> dict[str, object]:
        """The figures of an entry stand in the file beside its other keys."""
        values = {key: value for key, value in entry.items() if key in KINDS}
        return {**{key: value for key, value in entry.items() if key not in KINDS}, "values": values}

    def measure(self, name: str) -> Measure | None:
        """The figure ``name``; papers give no interval."""
        return Measure(value=self.values[name], direction=KINDS[name].direction) if name in self.values else None


class PaperTable(BaseModel):
    """A table of a paper: which figures of its own it prints.

    Attributes:
        title: what it is of.
        attack: the attack of its figures; None of a table of recognition.
        knowledge: the rung of that attack; None for any.
        columns: figures of :data:`bench.measures.KINDS`, or verification packs (``lfw``, ``ijbc``).
        rows: defences by their names in this suite, or as the paper calls those that it lacks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    source: Source
    title: str
    attack: str | None = None
    knowledge: str | None = None
    columns: tuple[str, ...]
    rows: tuple[str, ...]

    def value(self, defense: str, column: str) -> float | None:
        """What the paper printed of a defence in a column; None where it printed nothing."""
        for figure in published():
            if figure.source == self.source and figure.defense == defense:
                known = figure.values if column in KINDS else {"lfw": figure.values.get("accuracy"), **figure.packs}
                if (value := known.get(column)) is not None:
                    return value
        return None


@cache
def _document() -> tuple[dict[str, Source], dict[str, Any]]:
    document = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    return {entry["id"]: Source.model_validate(entry) for entry in document["sources"]}, document


@cache
def published() -> tuple[Figure, ...]:
    """Every figure in ``published.toml``."""
    sources, document = _document()
    return tuple(Figure.model_validate({**entry, "source": sources[entry["source"]]}) for entry in document["figures"])


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Every table in ``published.toml``, by its name."""
    sources, document = _document()
    tables = (PaperTable.model_validate({**entry, "source": sources[entry["source"]]}) for entry in document["tables"])
    return {table.id: table for table in tables}


def matching(defense: object, attacks: Iterable[str]) -> list[Figure]:
    """What was printed of the defence of that name: under one of ``attacks``, or of its recognition alone."""
    return [figure for figure in published() if figure.defense == defense and figure.attack in (None, *attacks)]
