"""The tables of ``bench gate``, ``bench baseline`` and ``bench compare`` on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.gate.baseline import Baseline
from bench.gate.difference import Difference, FigureChange
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Outcome

_COLOUR: dict[Outcome, str] = {
    "pass": "green",
    "inconclusive": "yellow",
    "regress": "red",
    "broken attack": "red",
    "failed": "red",
    "missing": "red",
}


_HEADINGS = ("baseline", "now", "change", "95 % interval", "tolerated", "rules out", "detectable")


def render_gate(report: GateReport) -> RenderableType:
    """Every run with its figures, what cannot be compared, and the outcome."""
    parts: list[RenderableType] = []
    for cell in report.cells:
        parts += _cell(cell)
    parts += [Text(f"not judged: {line}", style="yellow") for line in report.extra]
    counts = {
        outcome: sum(cell.outcome == outcome for cell in report.cells)
        for outcome in _COLOUR
        if any(cell.outcome == outcome for cell in report.cells)
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    parts.append(Text(f"{report.outcome.upper()} ({told})", style=f"bold {_COLOUR[report.outcome]}"))
    return Group(*parts)


def render_baseline(baseline: Baseline, path: str) -> RenderableType:
    """What was written: expected values, how much runs differ, what is tolerated and what a pass rules out."""
    parts: list[RenderableType] = []
    for cell in baseline.cells:
        table = _new_table(f"{cell.key.label}: {len(cell.runs)} {'run' if len(cell.runs) == 1 else 'runs'}")
        for heading in ("figure", "expected", "between seeds", "trained anew", "tolerated", "a pass rules out"):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for name, figure in cell.figures.items():
            spread = (figure.seed_sd, figure.repeat_sd, figure.tolerance)
            ruled_out = f"{figure.excluded:.2g}" if figure.guarded else "nothing"
            table.add_row(_short(name), f"{figure.value:.4g}", *(f"{value:.2g}" for value in spread), ruled_out)
        parts.append(table)
    parts.append(Text(f"written: {path}"))
    return Group(*parts)


def render_difference(found: Difference) -> RenderableType:
    """Settings that differ, then every figure."""
    parts: list[RenderableType] = []
    if found.settings:
        table = _new_table("What differs")
        for heading in ("", "setting", found.first, found.second):
            table.add_column(escape(heading), overflow="fold")
        for setting in found.settings:
            values = ("-" if value is None else value for value in (setting.first, setting.second))
            table.add_row(setting.kind, escape(setting.name), *(escape(value) for value in values))
        parts.append(table)
    table = _new_table("Figures: second minus first, with its interval over people")
    for heading in ("figure", "first", "second", "change", "95 % interval", "victims"):
        table.add_column(heading, justify="left" if heading in ("figure", "victims") else "right")
    for figure in found.figures:
        table.add_row(_short(figure.figure), *_change_cells(figure), style=_changed_style(figure))
    parts.append(table)
    for run, warnings in found.warnings.items():
        parts += [Text(f"{run}: {warning}", style="yellow") for warning in warnings]
    return Group(*parts)


def _cell(cell: CellVerdict) -> list[RenderableType]:
    parts: list[RenderableType] = []
    title = Text(f"{cell.cell}{f' in {cell.run}' if cell.run else ''}: ") + Text(cell.outcome, _COLOUR[cell.outcome])
    if cell.figures:
        table = _new_table(title)
        table.add_column("figure", overflow="fold")
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for figure in cell.figures:
            table.add_row(*_figure_cells(figure))
        parts.append(table)
    else:
        parts.append(title)
    own = [f"{one.figure}: {one.note}" for one in cell.figures if one.note and one.victims != "identical"]
    parts += [Text(f"  {note}", style="dim" if cell.outcome == "pass" else "") for note in [*own, *cell.notes]]
    return [*parts, Text()]


def _figure_cells(figure: FigureVerdict) -> tuple[str, ...]:
    verdict = f"[{_COLOUR[figure.outcome]}]{figure.outcome}[/]"
    verdict += "".join(f", {word}" for word in ("improved", "blind") if getattr(figure, word))
    if figure.victims == "identical":
        verdict += ", identical"
    return (
        _short(figure.figure),
        _number(figure.baseline),
        _number(figure.now),
        _signed(figure.change),
        _interval(figure.ci95),
        f"{figure.tolerance:.2g}",
        f"{figure.margin:.2g}",
        "-" if figure.detectable is None else f"{figure.detectable:.2g}",
        verdict,
    )


def _change_cells(figure: FigureChange) -> tuple[str, ...]:
    return (
        _number(figure.first),
        _number(figure.second),
        _signed(figure.change),
        _interval(figure.ci95),
        figure.victims or "-",
    )


def _changed_style(figure: FigureChange) -> str | None:
    """Bold where chance among the victims does not explain the change."""
    return "bold" if figure.ci95 is not None and not figure.ci95[0] <= 0 <= figure.ci95[1] else None


def _short(figure: str) -> str:
    """The place of a figure without the parts that go without saying."""
    return escape(figure.removeprefix("recovery.").replace("identity.", ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _interval(ends: tuple[float, float] | None) -> str:
    # Square brackets would be read as markup.
    return "-" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}"


def _new_table(title: str | Text) -> Table:
    title = Text(title) if isinstance(title, str) else title
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
