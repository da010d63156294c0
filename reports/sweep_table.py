"""The table of ``bench sweep`` on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.sweep.state import CellState, KeyFigure, Status, SweepState
from reports.measures import KINDS, MISSING, shown

_COLOUR: dict[Status, str] = {"success": "green", "failed": "red", "refused": "yellow", "running": "", "pending": ""}


def render_sweep(sweep: SweepState) -> RenderableType:
    """Every cell with its key figures, why some have none, the warnings of the runs, and where the runs lie."""
    counts = {status: sweep.count(status) for status in get_args(Status) if sweep.count(status)}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    parts: list[RenderableType] = [_table(sweep, f"{len(sweep.cells)} cells: {told}")]
    if any(cell.figures for cell in sweep.cells):
        note = "in brackets: best guess without an attack to unprotected faces (of accuracy: unprotected faces)"
        parts.append(Text(note, style="dim"))
    if any(cell.unsaturated for cell in sweep.cells):
        parts.append(Text("* unsaturated: the attack was still improving, its figures are lower bounds", style="dim"))
    parts += [Text(f"{cell.status}: {cell.name}: {cell.error}", style="red") for cell in sweep.cells if cell.error]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in _warnings(sweep)]
    parts += [Text(cell.directory, overflow="fold") for cell in sweep.cells if cell.directory]
    journal = Path(sweep.directory) / "sweep.json"
    parts.append(Text(f"sweep: {journal}"))
    return Group(*parts)


def _table(sweep: SweepState, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    names = [name for name in KINDS if any(name in cell.figures for cell in sweep.cells)]
    for heading in ("defence", "attack", "knowledge", "seed", "status"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(f"{KINDS[name].heading} {KINDS[name].unit}".strip(), justify="right", no_wrap=True)
    for cell in sweep.cells:
        status = Text(cell.status + (" *" if cell.unsaturated else ""), style=_COLOUR[cell.status])
        figures = (_figure(name, cell.figures.get(name)) for name in names)
        table.add_row(escape(cell.defense), escape(cell.attack), cell.knowledge, str(cell.seed), status, *figures)
    return table


def _figure(name: str, figure: KeyFigure | None) -> str:
    """The figure, and in brackets what it has to be read against."""
    if figure is None:
        return MISSING
    bounds = [shown(name, bound) for bound in (figure.floor, figure.ceiling) if bound is not None]
    return shown(name, figure.value) + (f" ({' to '.join(bounds)})" if bounds else "")


def _warnings(sweep: SweepState) -> Iterable[str]:
    """Each warning once, with the number of cells that have it where not all have."""
    measured = [cell for cell in sweep.cells if cell.status == "success"]
    for warning in dict.fromkeys(warning for cell in measured for warning in cell.warnings):
        holders = [cell for cell in measured if warning in cell.warnings]
        yield warning if len(holders) == len(measured) else f"{_some(holders)}: {warning}"


def _some(cells: list[CellState]) -> str:
    return cells[0].name if len(cells) == 1 else f"{cells[0].name} and {len(cells) - 1} more"
