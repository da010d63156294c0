"""Verdicts as text: lines, workflow commands of GitHub, Markdown and JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

from bench.files import write_text
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Verdict


def figure_line(figure: FigureVerdict) -> str:
    """Everything that is known of one figure.

    Example:
        >>> figure_line(FigureVerdict(figure="ssim", role="privacy", direction="utility", baseline=0.7,
        ...     now=0.8, change=0.1, ci95=(0.08, 0.12), tolerance=0.02, margin=0.05, outcome="regress"))
        'ssim regress: 0.7 -> 0.8, change +0.1 [+0.08, +0.12], tolerated 0.02, a pass rules out 0.05'
    """
    head = f"{figure.figure} {figure.outcome}: {number(figure.baseline)} -> {number(figure.now)}"
    parts = [head]
    if figure.change is not None:
        interval = f" [{figure.ci95[0]:+.3g}, {figure.ci95[1]:+.3g}]" if figure.ci95 else ""
        parts.append(f"change {figure.change:+.3g}{interval}")
    parts += [f"tolerated {figure.tolerance:.3g}", f"a pass rules out {figure.margin:.3g}"]
    if figure.detectable is not None:
        parts.append(f"detectable {figure.detectable:.3g}")
    if figure.note:
        parts.append(figure.note)
    return ", ".join(parts)


def cell_lines(cell: CellVerdict) -> list[str]:
    """What is wrong with a run: its bad figures and its notes; of a run that passes, nothing."""
    if cell.outcome == "pass":
        return []
    return [figure_line(figure) for figure in cell.figures if figure.outcome != "pass"] + cell.notes


def number(value: float | None, digits: str = ".4g") -> str:
    """Four significant digits, or as many as asked for; a dash where there is no figure."""
    return "-" if value is None else f"{value:{digits}}"


def interval(ends: tuple[float, float] | None) -> str:
    """The ends of the interval of a change; without brackets, which are markup in some places."""
    return "-" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}"


#: Headings of :func:`cells`.
COLUMNS = ("figure", "baseline", "now", "change", "95 % interval", "tolerated", "rules out", "detectable")


def cells(figure: FigureVerdict) -> tuple[str, ...]:
    """A figure as a row of a table."""
    return (
        figure.figure,
        number(figure.baseline),
        number(figure.now),
        number(figure.change, "+.3g"),
        interval(figure.ci95),
        *(number(value, ".2g") for value in (figure.tolerance, figure.margin, figure.detectable)),
    )


_ICON: dict[Verdict, str] = dict.fromkeys(get_args(Verdict), "❌") | {
    "pass": "✅",
    "inconclusive": "❔",
    "broken attack": "💥",
}
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
        verdicts = ((_ICON[figure.outcome], _text(figure.figure), *cells(figure)[1:]) for figure in cell.figures)
        rows = [("", *COLUMNS), ("---",) * (len(COLUMNS) + 1), *verdicts]
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if cell.notes:
        yield "\n".join(f"- {_text(note)}" for note in cell.notes) + "\n"


def _text(text: str) -> str:
    """Plain text in Markdown and in HTML: one line, and everything that could be markup as a character reference."""
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in " ".join(text.split()))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


#: Characters that XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(report: GateReport, path: Path) -> None:
    """Write the file in one step."""
    write_text(path, junit(report))


def junit(report: GateReport) -> str:
    """The document. What could not be decided is an ``error``, every other bad outcome a ``failure``."""
    root = ET.Element("testsuites", name="bench gate")
    for cell in report.cells:
        suite = ET.SubElement(root, "testsuite", name=_legal(cell.cell))
        if not cell.figures:
            _case(suite, cell, "the cell", cell.outcome, "; ".join(cell.notes))
        for figure in cell.figures:
            _case(suite, cell, figure.figure, figure.outcome, figure_line(figure))
        for tag, attribute in (("failure", "failures"), ("error", "errors")):
            suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
        suite.set("tests", str(len(suite.findall("testcase"))))
        if cell.figures and cell.notes:
            ET.SubElement(suite, "system-out").text = _legal("\n".join(cell.notes))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, cell: CellVerdict, name: str, outcome: Verdict, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=_legal(cell.run or cell.cell), name=_legal(name))
    if outcome == "pass":
        return
    tag = "error" if outcome == "inconclusive" else "failure"
    ET.SubElement(case, tag, type=outcome, message=_legal(message))


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
