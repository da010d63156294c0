"""The report as JUnit XML: a suite per run, a case per figure, for any CI that shows test results."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from bench.files import write_text
from bench.gate.outputs.lines import figure_line
from bench.gate.verdict import CellVerdict, GateReport, Outcome

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


def _case(suite: ET.Element, cell: CellVerdict, name: str, outcome: Outcome, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=_legal(cell.run or cell.cell), name=_legal(name))
    if outcome == "pass":
        return
    tag = "error" if outcome == "inconclusive" else "failure"
    ET.SubElement(case, tag, type=outcome, message=_legal(message))


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
