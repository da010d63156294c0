"""What GitHub Actions reads: annotations on the log, and the Markdown of the step summary.

Names in a run come from whoever made the run; here they must neither start another workflow command nor become markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.gate.outputs.lines import cell_lines, number
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Outcome

_ICON: dict[Outcome, str] = {
    "pass": "✅",
    "inconclusive": "❔",
    "regress": "❌",
    "broken attack": "💥",
    "failed": "❌",
    "missing": "❌",
}
_COLUMNS = ("", "figure", "baseline", "now", "change", "95 % interval", "tolerated", "a pass rules out", "detectable")
_MARKUP = frozenset("\\`*_{}[]()<>#+!|~&@:$\"'")


def workflow_commands(report: GateReport) -> Iterator[str]:
    """One workflow command per line: an error for what stops the job, a warning for what could not be decided."""
    for cell in report.cells:
        level = "warning" if cell.outcome == "inconclusive" else "error"
        lines = cell_lines(cell)
        if lines:
            title = _property(f"privacy gate: {cell.outcome}")
            yield f"::{level} title={title}::{_data(cell.cell + chr(10) + chr(10).join(lines))}"
        elif any(figure.improved for figure in cell.figures):
            yield f"::notice title=privacy gate::{_data(cell.cell + chr(10) + chr(10).join(cell.notes))}"
    for line in report.extra:
        yield f"::notice title=privacy gate::{_data(line)}"


def append_summary(report: GateReport, path: Path) -> None:
    """Append the summary to the file that ``GITHUB_STEP_SUMMARY`` names; other steps append to it too."""
    with path.open("a", encoding="utf-8") as file:
        file.write(summary(report))


def summary(report: GateReport) -> str:
    """The report as Markdown."""
    parts = [f"## {_ICON[report.outcome]} Privacy gate: {report.outcome}\n", f"Baseline {_text(report.baseline)}\n"]
    parts += [part for cell in report.cells for part in _cell(cell)]
    parts += [f"- {_text(line)}\n" for line in report.extra]
    return "\n".join(parts) + "\n"


def _cell(cell: CellVerdict) -> Iterator[str]:
    yield f"### {_ICON[cell.outcome]} {_text(cell.cell)}: {cell.outcome}\n"
    if cell.run:
        yield f"Run {_text(cell.run)}\n"
    if cell.figures:
        rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(_row(figure) for figure in cell.figures)]
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if cell.notes:
        yield "\n".join(f"- {_text(note)}" for note in cell.notes) + "\n"


def _row(figure: FigureVerdict) -> tuple[str, ...]:
    interval = f"{figure.ci95[0]:+.3g} to {figure.ci95[1]:+.3g}" if figure.ci95 else "-"
    return (
        _ICON[figure.outcome],
        _text(figure.figure),
        number(figure.baseline),
        number(figure.now),
        "-" if figure.change is None else f"{figure.change:+.3g}",
        interval,
        number(figure.tolerance),
        number(figure.margin),
        number(figure.detectable),
    )


def _text(text: str) -> str:
    """Plain text in Markdown and in HTML: one line, and everything that could be markup as a character reference."""
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in " ".join(text.split()))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
