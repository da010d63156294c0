"""Verdicts as text: lines, workflow commands of GitHub, Markdown and JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import get_args
from xml.etree import ElementTree as ET

from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Verdict


def figure_line(figure: FigureVerdict) -> str:
    """Everything that is known of one figure.

    Example:
        >>> figure_line(FigureVerdict(figure="ssim", role="privacy", direction="utility", baseline=0.7,
        ...     now=0.8, change=0.1, ci95=(0.08, 0.12), tolerance=0.02, margin=0.05, outcome="regress"))
        'ssim regress: 0.7 -> 0.8, change +0.1 [+0.08, +0.12], tolerated 0.02, a pass rules out 0.05'
    """
    change = None if figure.change is None else f"change {figure.change:+.3g}"
    if change and figure.ci95:
        change += f" [{figure.ci95[0]:+.3g}, {figure.ci95[1]:+.3g}]"
    parts = [
        f"{figure.figure} {figure.outcome}: {number(figure.baseline)} -> {number(figure.now)}",
        change,
        f"tolerated {figure.tolerance:.3g}",
        f"a pass rules out {figure.margin:.3g}",
        None if figure.detectable is None else f"found in 90 % {figure.detectable:.3g}",
        figure.note,
    ]
    return ", ".join(part for part in parts if part)


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
COLUMNS = ("figure", "baseline", "now", "change", "95 % interval", "tolerated", "rules out", "found in 90 %")


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
        if lines := cell_lines(cell):
            yield _command(level, f"privacy gate: {cell.outcome}", cell.cell, *lines)
        elif any(figure.improved for figure in cell.figures):
            yield _command("notice", "privacy gate", cell.cell, *cell.notes)
    for line in report.extra:
        yield _command("notice", "privacy gate", line)


def _command(level: str, title: str, *lines: str) -> str:
    title, text = (
        part.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for part in (title, "\n".join(lines))
    )
    return f"::{level} title={title.replace(':', '%3A').replace(',', '%2C')}::{text}"


def summary(report: GateReport) -> str:
    """The report as Markdown."""
    parts = [f"## {_ICON[report.outcome]} Privacy gate: {report.outcome}\n", f"Baseline {_text(report.baseline)}\n"]
    for cell in report.cells:
        parts.append(f"### {_ICON[cell.outcome]} {_text(cell.cell)}: {cell.outcome}\n")
        if cell.run:
            parts.append(f"Run {_text(cell.run)}\n")
        if cell.figures:
            verdicts = ((_ICON[figure.outcome], _text(figure.figure), *cells(figure)[1:]) for figure in cell.figures)
            rows = [("", *COLUMNS), ("---",) * (len(COLUMNS) + 1), *verdicts]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
        if cell.notes:
            parts.append("\n".join(f"- {_text(note)}" for note in cell.notes) + "\n")
    parts += [f"- {_text(line)}\n" for line in report.extra]
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Plain text in Markdown and in HTML: one line, and everything that could be markup as a character reference."""
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in " ".join(text.split()))


#: Characters that XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: GateReport) -> str:
    """The document. What could not be decided is an ``error``, every other bad outcome a ``failure``."""
    root = ET.Element("testsuites", name="bench gate")
    for cell in report.cells:
        cases = [(figure.figure, figure.outcome, figure_line(figure)) for figure in cell.figures]
        cases = cases or [("the cell", cell.outcome, "; ".join(cell.notes))]
        tags = ["error" if outcome == "inconclusive" else "failure" for _, outcome, _ in cases if outcome != "pass"]
        counts = {"failures": tags.count("failure"), "errors": tags.count("error"), "tests": len(cases)}
        suite = _element(root, "testsuite", name=cell.cell, **{name: str(count) for name, count in counts.items()})
        for name, outcome, message in cases:
            case = _element(suite, "testcase", classname=cell.run or cell.cell, name=name)
            if outcome != "pass":
                _element(case, tags.pop(0), type=outcome, message=message)
        if cell.figures and cell.notes:
            _element(suite, "system-out").text = _ILLEGAL.sub("\ufffd", "\n".join(cell.notes))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _element(parent: ET.Element, tag: str, **attributes: str) -> ET.Element:
    return ET.SubElement(parent, tag, {name: _ILLEGAL.sub("\ufffd", text) for name, text in attributes.items()})
