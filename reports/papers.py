"""``bench table``: a table of a paper filled from runs, what it printed beside what was measured, with the difference.

The two were earned on other data, by recognisers and attackers of other strength: a difference is no error of either.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.measures import KINDS, Measure
from bench.plugins import defenses
from bench.run.archive import Run
from bench.run.protocols import JANUS
from reports.cells import Cell, Setting, over_seeds, worst_case
from reports.published import PaperTable
from reports.summary import subject
from reports.table import Column, Entry, Row, Table, measured

#: False acceptance rate at which papers give the TAR on IJB-B and IJB-C.
_FAR = "1e-4"
_PACKS = {
    "lfw": "LFW", "cfp_fp": "CFP-FP", "agedb_30": "AgeDB", "cplfw": "CPLFW", "calfw": "CALFW",
    "ijbb": "IJB-B", "ijbc": "IJB-C",
}  # fmt: skip


def filled(paper: PaperTable, settings: Sequence[Setting]) -> list[Table]:
    """A table for each setting that has runs of any of its defences; one of what was printed alone where there is none.

    Of each defence there is a row of what was printed, and for each variant of it that was run rows of what was
    measured, of the difference, and, where there were further attacks on that rung, of the worst case. A defence counts
    as published where no option of it was given.
    """
    having = [setting for setting in settings if any(_of(setting, defense) for defense in paper.rows)]
    return [_table(paper, setting, number) for number, setting in enumerate(having or [None], start=1)]


def _table(paper: PaperTable, setting: Setting | None, number: int) -> Table:
    rows = []
    printed = {column: _printed(paper, column) for column in paper.columns}
    for defense in paper.rows:
        rows.append(
            _row(defense, "published", "", {c: entries[defense] for c, entries in printed.items()}, "published")
        )
        rows += _measured(paper, setting, defense)
    under = f", attacked by {paper.attack}" if paper.attack else ""
    under += f" ({paper.knowledge})" if paper.attack and paper.knowledge else ""
    where = f"Measured: {subject(setting)}" if setting is not None else "Measured: no run of these defences"
    caption = (
        f"{paper.title}{under}: {paper.source.citation} ({paper.source.conditions}). {where}. "
        "Other data, recognisers and attackers: the difference is of all of these, not of the defence alone."
    )
    columns = (*map(Column.of_text, ("defence", "of")), *map(_column, paper.columns))
    return Table(f"{paper.id}-{number}", caption, columns, tuple(rows), headers=2)


def _column(name: str) -> Column:
    if name in KINDS:
        return Column.of_figure(name)
    meaning = f"TAR at FAR {_FAR} of templates." if name in JANUS else KINDS["accuracy"].meaning
    return Column(name, f"{_PACKS.get(name, name)}, %", meaning)


def _kind(column: str) -> str:
    """The figure that a column is of."""
    return column if column in KINDS else "tar_at_far" if column in JANUS else "accuracy"


def _row(defense: str, of: str, note: str, entries: dict[str, Entry], kind: str) -> Row:
    named = {"defence": Entry(defense), "of": Entry(of, note=note)}
    return Row({**named, **entries}, "published" if kind == "published" else "worst" if kind == "worst" else "measured")


def _printed(paper: PaperTable, column: str) -> dict[str, Entry]:
    """What was printed of each defence in a column, with as many digits as the longest of them."""
    values = {defense: paper.value(defense, column) for defense in paper.rows}
    scale = KINDS[_kind(column)].scale
    numbers = {defense: round(scale * value, 6) for defense, value in values.items() if value is not None}
    digits = max((len(f"{number:.6f}".rstrip("0").partition(".")[2]) for number in numbers.values()), default=0)
    return {
        defense: Entry(f"{numbers[defense]:.{digits}f}", numbers[defense]) if defense in numbers else Entry()
        for defense in paper.rows
    }


def _of(setting: Setting, defense: str) -> dict[str, list[Cell]]:
    """The cells of a defence under options of its own, by label."""
    return {
        label: cells
        for label, cells in setting.defenses.items()
        if cells[0].run.manifest.config.get("defense") == defense
    }


def _measured(paper: PaperTable, setting: Setting | None, defense: str) -> list[Row]:
    known = {} if setting is None else _of(setting, defense)
    published = {
        label: cells for label, cells in known.items() if not cells[0].run.manifest.config.get("defense_options")
    }
    rows = []
    for label, cells in published.items():
        met = [
            cell
            for cell in cells
            if paper.attack is None
            or (cell.name == paper.attack and paper.knowledge in (None, cell.knowledge) and cell.result is not None)
        ]
        got = {column: _got(met, column) for column in paper.columns}
        if all(measure is None for measure in got.values()):
            continue
        entries = {column: measured(_kind(column), measure) for column, measure in got.items()}
        seeds = len({cell.seed for cell in met})
        rows.append(_row(label, "measured", f"mean of {seeds} seeds" if seeds > 1 else "", entries, "measured"))
        differing = {column: _difference(paper, defense, column, measure) for column, measure in got.items()}
        rows.append(_row(label, "difference", "", differing, "measured"))
    for label, cells in published.items() if paper.attack else ():
        on_rung = [cell for cell in cells if paper.knowledge in (None, cell.knowledge)]
        if len({cell.name for cell in on_rung if cell.result is not None} - {paper.attack}):
            worst = {column: _got(on_rung, column) for column in paper.columns}
            by = ", ".join(dict.fromkeys(cell.attack for cell in on_rung))
            rows.append(_row(label, "worst case", f"by {by}", {c: measured(c, m) for c, m in worst.items()}, "worst"))
    if not any(row.entries["of"].text == "measured" for row in rows):
        rows.insert(0, _row(defense, "measured", _why_not(paper, defense, known, published), {}, "measured"))
    return rows


def _why_not(paper: PaperTable, defense: str, known: dict[str, list[Cell]], published: dict[str, list[Cell]]) -> str:
    """Why nothing was measured of a row."""
    if defense not in defenses():
        return "not in this suite"
    if published:
        if paper.attack:
            return f"no run by {paper.attack}" + (f" at {paper.knowledge}" if paper.knowledge else "")
        return "no run with recognition on these packs"
    return f"no run of its defaults, {len(known)} with other options" if known else "no run"


def _got(cells: Sequence[Cell], column: str) -> Measure | None:
    """What was measured in a column, over seeds; None where it was not."""
    if column in KINDS:
        worst = worst_case(cells, column)
        return None if worst is None else worst.measure
    by_seed: dict[int, Measure] = {}
    for cell in cells:
        measure = _recognised(cell.run, column)
        if measure is not None and measure.value is not None:
            held = by_seed.get(cell.seed, measure)
            by_seed[cell.seed] = min(held, measure, key=lambda one: one.value or 0.0)
    return over_seeds(_kind(column), list(by_seed.values())) if by_seed else None


def _recognised(run: Run, pack: str) -> Measure | None:
    """Recognition behind the defence of a run on one verification pack."""
    utility, dataset = run.result.utility, run.result.dataset
    if utility is None:
        return None
    if pack in JANUS:
        templates = utility.templates.get(pack)
        return None if templates is None else templates.protected.tar_at_far.get(_FAR)
    if dataset is not None and dataset.details.get("pack") == f"{pack}.bin":
        return utility.accuracy
    protocol = utility.protocols.get(pack)
    return None if protocol is None else protocol.protected.accuracy


def _difference(paper: PaperTable, defense: str, column: str, measure: Measure | None) -> Entry:
    printed = paper.value(defense, column)
    if printed is None or measure is None or measure.value is None:
        return Entry()
    kind = KINDS[_kind(column)]
    number = kind.scale * (measure.value - printed)
    return Entry(f"{number:+.{kind.decimals}f}", number)
