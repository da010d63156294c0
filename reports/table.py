"""Tables as data: rows of named entries, which HTML, Markdown and LaTeX each write in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bench.measures import KINDS, MISSING, Measure, interval, shown


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table.

    Attributes:
        text: what is shown; anything, also what somebody wrote into a run to do harm.
        number: to sort by; None sorts by ``text``.
        interval: its confidence interval, ``[low, high]``.
        note: a few words below.
        best: whether it is the best of its column.
        link: address of more on it, on a page that has such.
    """

    text: str = MISSING
    number: float | None = None
    interval: str = ""
    note: str = ""
    best: bool = False
    link: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: the key of its entries, its heading, what it means, whether it holds numbers."""

    key: str
    heading: str
    meaning: str = ""
    numeric: bool = True

    @classmethod
    def of_text(cls, heading: str, meaning: str = "") -> Column:
        """A column of texts under their heading."""
        return cls(heading, heading, meaning, numeric=False)

    @classmethod
    def of_figure(cls, name: str) -> Column:
        """The column of a figure of :data:`bench.measures.KINDS`."""
        return cls(name, KINDS[name].label, KINDS[name].meaning)


@dataclass(frozen=True, slots=True)
class Row:
    """A row: what it has of the columns; ``kind`` decides how it is marked."""

    entries: Mapping[str, Entry]
    kind: Literal["measured", "worst", "published", "failed", "floor"] = "measured"

    def __getitem__(self, column: Column) -> Entry:
        return self.entries.get(column.key, Entry())


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
        kept = (c for c in self.columns if not c.numeric or any(row[c].number is not None for row in rows))
        return replace(self, columns=tuple(kept))

    def as_records(self) -> list[dict[str, str | float | None]]:
        """Rows as documents: of a column of numbers its number, of others the text with its note."""
        return [
            {
                column.key: entry.number
                if column.numeric
                else f"{entry.text} ({entry.note})"
                if entry.note
                else entry.text
                for column in self.columns
                for entry in [row[column]]
            }
            for row in (*self.rows, *self.foot)
        ]

    def filters(self) -> dict[str, list[str]]:
        """What the rows can be filtered by: what names them, and their kind."""
        keys = [column.key for column in self.columns[: self.headers]]
        values = {key: list(dict.fromkeys(row.entries[key].text for row in self.rows)) for key in keys}
        return {**values, "kind": list(dict.fromkeys(row.kind for row in self.rows))}


def measured(name: str, measure: Measure | None, *, note: str = "", best: bool = False) -> Entry:
    """The entry of a measure: its value in the unit of its column, its interval, and a note."""
    if measure is None or measure.value is None:
        return Entry()
    return Entry(shown(name, measure), KINDS[name].scale * measure.value, interval(name, measure), note, best)
