"""The gate's tables on the terminal: everything is there, and no name is taken for markup."""

from rich.console import Console

from bench.gate.difference import Difference, FigureChange, Setting
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport
from reports.gate_table import render_difference, render_gate


def text(renderable, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


def verdict(**changed):
    given = {
        "figure": "recovery.ssim",
        "role": "privacy",
        "higher_is_better_for": "utility",
        "baseline": 0.7,
        "now": 0.8,
        "change": 0.1,
        "ci95": (0.08, 0.12),
        "tolerance": 0.02,
        "margin": 0.05,
        "detectable": 0.06,
        "victims": "same victims",
        "outcome": "regress",
    }
    return FigureVerdict(**{**given, **changed})


def report(cells, outcome="regress", extra=()):
    return GateReport(
        outcome=outcome, exit_code=1, baseline="b", alpha=0.01, alpha_pass=0.05, cells=cells, extra=list(extra)
    )


def test_every_column_and_note():
    unmeasured = verdict(
        figure="recovery.lpips",
        now=None,
        change=None,
        ci95=None,
        detectable=None,
        outcome="inconclusive",
        note="no [x]",
    )
    cell = CellVerdict(
        cell="a / b", run="r", outcome="regress", figures=[verdict(blind=True, improved=True), unmeasured], notes=["n"]
    )
    missing = CellVerdict(cell="c / d", run=None, outcome="missing", notes=["no run of this cell was given"])
    shown = text(render_gate(report([cell, missing], outcome="missing", extra=["e / f: of no cell"])))
    for part in (
        "a / b in r: regress",
        "+0.08 to +0.12",
        "regress, improved, blind",
        "recovery.lpips: no [x]",
        "no run of this cell was given",
        "not judged: e / f: of no cell",
        "MISSING (1 regress, 1 missing)",
    ):
        assert part in shown, part


def test_names_are_no_markup():
    name = "[bold]x[/nonsense]"
    cell = CellVerdict(cell=name, run=name, outcome="regress", figures=[verdict(figure=name)], notes=[name])
    assert text(render_gate(report([cell], extra=[name]))).count(name) >= 4
    found = Difference(
        first=name,
        second="s",
        settings=[Setting(kind="asked", name=name, first=name, second=None)],
        figures=[FigureChange(figure=name, higher_is_better_for="utility", first=0.1, second=None)],
        warnings={name: [name]},
    )
    assert text(render_difference(found)).count(name) >= 5
