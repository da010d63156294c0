"""Contact sheets of a page: original, what was sent, and what each attack made of it, one row for each victim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measures import KINDS
from bench.run.archive import Victim
from reports.cells import Cell, Setting

#: Columns that are the same for every attack on a defence.
_SHARED = ("original", "sent")
_ROLES = {"worst": "worst victim", "median": "median victim", "best": "best victim"}
_FIRST = "first"


class Picture(NamedTuple):
    """A picture of a sheet: its file, what it shows in words, and a note below."""

    source: Path
    alt: str
    note: str = ""


class SheetRow(NamedTuple):
    """A victim: which one, its figures, a picture for each column or None where the run kept none."""

    role: str
    caption: str
    pictures: Sequence[Picture | None]


class Sheet(NamedTuple):
    """A table of pictures; ``title`` says when the faces are synthetic."""

    title: str
    columns: Sequence[str]
    rows: Sequence[SheetRow]


def sheets(setting: Setting, *, embed_faces: bool) -> list[Sheet]:
    """The sheets of a setting: for each defence the victims that all its runs show, then each run's extremes.

    Args:
        setting: its runs.
        embed_faces: whether real faces may be shown; synthetic ones always are.
    """
    made: list[Sheet] = []
    runs = [(label, cell) for label, cell in setting.runs if may_show(cell, embed_faces=embed_faces)]
    for defense, cells in setting.defenses.items():
        made += _side_by_side(defense, [cell for cell in cells if may_show(cell, embed_faces=embed_faces)])
        for label, cell in runs:
            if cell.defense == defense:
                made += _of_run(label, cell)
    return made


def strip(cell: Cell, *, embed_faces: bool) -> list[tuple[str, Picture]]:
    """Original, what is sent, and what the attack makes of it, of the first victim: the same of all runs on them.

    Each under its heading; empty where there are none, or they must not be shown.
    """
    samples = cell.run.samples
    if samples is None or not samples.victims or not may_show(cell, embed_faces=embed_faces):
        return []
    victim = next((victim for victim in samples.victims if _FIRST in victim.roles), samples.victims[0])
    last = next((column for column in (cell.name, "recovered", *samples.columns[2:]) if column in samples.columns), "")
    pictures = {column: _picture(cell, cell.label, victim, column, "first victim") for column in (*_SHARED, last)}
    headings = {cell.name: "recovered"}
    return [(headings.get(column, column), picture) for column, picture in pictures.items() if picture is not None]


def may_show(cell: Cell, *, embed_faces: bool) -> bool:
    """Whether there are pictures of a run, and they may stand on a page."""
    return cell.run.samples is not None and (cell.run.synthetic or embed_faces)


def _faces(cell: Cell) -> str:
    return "synthetic face" if cell.run.synthetic else "face"


def _title(text: str, cell: Cell) -> str:
    return f"{text} (synthetic faces)" if cell.run.synthetic else text


def _of_run(label: str, cell: Cell) -> Iterable[Sheet]:
    """Worst, median and best victim of one run; of a run that kept only a ready sheet, that sheet."""
    samples = cell.run.samples
    assert samples is not None
    rows = []
    for role, name in _ROLES.items():
        victim = next((victim for victim in samples.victims if role in victim.roles), None)
        if victim is not None:
            pictures = [_picture(cell, label, victim, column, name) for column in samples.columns]
            rows.append(SheetRow(name, victim.caption, pictures))
    if rows:
        yield Sheet(_title(label, cell), samples.columns, rows)
    elif samples.sheet is not None and not samples.victims:
        alt = f"Contact sheet of {label}: original, sent and recovered {_faces(cell)}s, one row for each victim"
        row = SheetRow("first victims", "", [Picture(samples.sheet, alt)])
        yield Sheet(_title(label, cell), ["original, sent, recovered"], [row])


def _picture(cell: Cell, label: str, victim: Victim, column: str, role: str, note: str = "") -> Picture | None:
    samples = cell.run.samples
    if samples is None or column not in victim.files:
        return None
    what = {"original": "original", "sent": f"what {cell.defense} sends of the"}.get(column, f"{column} of the")
    by = "" if column in _SHARED else f" by {label}"
    alt = f"{role}: {what} {_faces(cell)}{by}" + (f"; {victim.caption}" if by and victim.caption else "")
    return Picture(samples.folder / victim.files[column], alt, note)


def _side_by_side(defense: str, cells: Sequence[Cell]) -> Iterable[Sheet]:
    """The first victims under every attack; only attacks on the same victims stand side by side."""
    groups: dict[tuple[bytes, ...], list[tuple[Cell, str, list[Victim]]]] = {}
    for cell in cells:
        samples = cell.run.samples
        if samples is None or cell.result is None or cell.result.recovery is None:
            continue
        first = [victim for victim in samples.victims if _FIRST in victim.roles]
        # Of several attacks each has a column under its name.
        column = cell.name if cell.name in samples.columns else "recovered"
        if first and column in samples.columns and all("original" in victim.files for victim in first):
            originals = tuple((samples.folder / victim.files["original"]).read_bytes() for victim in first)
            groups.setdefault(originals, []).append((cell, column, first))
    for group in groups.values():
        if len(group) < 2:
            continue
        (cell, _, first), rows = group[0], []
        for place, victim in enumerate(first):
            name = f"victim {place + 1}"
            pictures = [_picture(cell, cell.label, victim, column, name) for column in _SHARED]
            pictures += [
                _picture(other, other.label, victims[place], column, name, _figures(other, victims[place]))
                for other, column, victims in group
            ]
            rows.append(SheetRow(name, "", pictures))
        attacks = [f"{other.attack} ({other.knowledge})" for other, _, _ in group]
        title = _title(f"The same victims under every attack on {defense}", cell)
        yield Sheet(title, [*_SHARED, *attacks], rows)


def _figures(cell: Cell, victim: Victim) -> str:
    """SSIM and cosine of one victim, from the raw values."""
    rows = cell.run.rows(cell.name)
    row = None if rows is None else rows[rows["image"] == victim.image]
    if row is None or row.empty:
        return ""
    return ", ".join(
        f"{KINDS[name].heading} {float(row.iloc[0][name]):.2f}" for name in ("ssim", "cosine") if name in row
    )
