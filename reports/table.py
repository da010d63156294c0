"""Tables as data; HTML, Markdown, LaTeX and CSV each write them in their own way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from bench.measures import KINDS, MISSING, interval, shown
from bench.results import Measure


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table.

    Attributes:
        text: what is shown; anything, also what somebody wrote into a run to do harm.
        number: to sort by; None sorts by ``text``.
        interval: its confidence interval, ``[low, high]``.
        note: a few words below.
        best: whether it is the best of its column.
    """

    text: str
    number: float | None = None
    interval: str = ""
    note: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, what it means, whether it holds numbers."""

    heading: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """A row; ``kind`` decides how it is marked, ``keys`` what it can be filtered by."""

    entries: tuple[Entry, ...]
    kind: Literal["measured", "worst", "published", "failed", "floor"] = "measured"
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption, which says when faces are synthetic.

    Attributes:
        name: unique within a report; letters, digits and dashes.
        caption: what it shows.
        columns: the first ``headers`` of them name the row.
        rows: may be sorted and filtered.
        foot: rows that stay where they are.
        headers: how many columns name the row.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    foot: tuple[Row, ...] = ()
    headers: int = 1

    def without_empty_columns(self) -> Table:
        """This table without the columns of numbers in which no row has one."""
        rows = (*self.rows, *self.foot)
        kept = [
            place
            for place, column in enumerate(self.columns)
            if not column.numeric or any(row.entries[place].number is not None for row in rows)
        ]

        def cut(row: Row) -> Row:
            return replace(row, entries=tuple(row.entries[place] for place in kept))

        columns = tuple(self.columns[place] for place in kept)
        return replace(self, columns=columns, rows=tuple(map(cut, self.rows)), foot=tuple(map(cut, self.foot)))


def measured(name: str, measure: Measure | None, *, note: str = "", best: bool = False) -> Entry:
    """The entry of a measure: its value in the unit of its column, its interval, and a note."""
    if measure is None or measure.value is None:
        return Entry(MISSING, None)
    number = KINDS[name].scale * measure.value
    return Entry(shown(name, measure), number, interval(name, measure), note, best)


def column(name: str) -> Column:
    """The column of the figure ``name``."""
    kind = KINDS[name]
    return Column(kind.label, kind.meaning)
