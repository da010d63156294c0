"""What the terminal shows: every figure with its neighbours, and dashes with reasons."""

from pathlib import Path

import pytest
from rich.console import Console

from bench.gate.compare import Difference, FigureChange, Setting
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport
from bench.results import (
    AttackInfo,
    AttackResult,
    DatasetInfo,
    DefenseInfo,
    EvaluatorInfo,
    Identity,
    Linkage,
    Measure,
    PlannedStage,
    Quality,
    Quartiles,
    Recovery,
    RunPlan,
    RunResult,
    StateInference,
    StrengthCurve,
    StrengthPoint,
    Throughput,
    Utility,
    Verification,
)
from bench.sweep.cells import CellState, KeyFigure, SweepState
from reports.terminal import figure, render_difference, render_gate, render_plan, render_result, render_sweep


def measure(value, ci=None):
    return Measure(value=value, ci95=ci, n=10, direction="utility", reason=None if value is not None else "no")


def quality(ssim):
    identity = Identity(type1_tar=measure(0.5), type2_tar=measure(0.25), rank1=measure(0.125), cosine=measure(0.5))
    return Quality(
        ssim=measure(ssim, (ssim - 0.01, ssim + 0.01)),
        psnr=measure(20.0),
        psnr_aligned=measure(21.0),
        ms_ssim=measure(0.9),
        lpips=Measure(value=None, direction="privacy", reason="no weights here"),
        identity=identity,
    )


def verification(accuracy):
    return Verification(
        accuracy=measure(accuracy), auc=measure(0.9), eer=measure(0.1), tar_at_far={"1e-2": measure(0.6)}, pairs=100
    )


@pytest.fixture
def result():
    speed = Throughput(
        images_per_second=Quartiles(median=100, q1=90, q3=110),
        latency_ms=Quartiles(median=3, q1=2, q3=4),
        batch=64,
        repeats=5,
        dtype="float32",
        device="cpu",
    )
    return RunResult(
        run_id="r",
        status="success",
        warnings=["synthetic faces"],
        defense=DefenseInfo(
            name="partialface",
            options={},
            representation_shape=(27, 64, 64),
            views=3,
            states=18,
            entropy_bits=4.17,
            bytes_per_face=442368,
        ),
        attack=AttackInfo(name="unet", options={}, knowledge="whitebox", saturated=False, states_covered=True),
        evaluator=EvaluatorInfo(name="judge", sha256=None, accuracy=0.99, threshold=0.3, far_at_threshold=0.01),
        dataset=DatasetInfo(
            name="synthetic", synthetic=True, image_size=64, identities={}, images={}, pairs=100, probes=10, skipped=0
        ),
        utility=Utility(**verification(0.91).model_dump(), unprotected=verification(0.97)),
        recovery=Recovery(**quality(0.812).model_dump(), floors={"mean_face": quality(0.333)}, ceiling=quality(0.987)),
        throughput={"protect": speed},
        seconds={"data": 3.0},
    )


def text(renderable):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


def test_everything_is_there(result):
    shown = text(render_result(result, Path("runs/r")))
    for part in (
        "partialface, 18 states (4.17 bits) against unet (whitebox) on synthetic faces",
        "91.0",  # accuracy
        "97.0",  # unprotected
        "0.812 ±0.010",
        "floor: mean face",
        "0.333",
        "ceiling",
        "0.987",
        "type II %",
        "442,368 bytes",
        "LPIPS: no weights here",
        "warning: synthetic faces",
        "runs/r",
    ):
        assert part in shown, part


def curve(unsaturated, gain):
    points = [
        StrengthPoint(budget=budget, values={"ssim": measure(ssim), "type1_tar": measure(0.25)})
        for budget, ssim in ((1000, 0.7), (2000, 0.8))
    ]
    return StrengthCurve(
        axis="steps",
        points=points,
        gain_of_last_doubling={"ssim": gain},
        tolerance={"ssim": 0.005},
        unsaturated=unsaturated,
    )


def test_a_strength_curve_and_its_verdict(result):
    shown = text(
        render_result(result.model_copy(update={"strength": curve(True, measure(0.1, (0.08, 0.12)))}), Path("r"))
    )
    for part in ("budget of steps", "1,000", "0.700", "0.800", "25.0", "still gaining: a lower bound; SSIM +0.100"):
        assert part in shown, part
    assert "[+0.080, +0.120] (counts above 0.005)" in shown
    unjudged = result.model_copy(update={"strength": curve(None, measure(None))})
    assert "last doubling: not judged (no)" in text(render_result(unjudged, Path("r")))


def test_the_worst_case_stands_below_the_attacks(result):
    both = {}
    for name, ssim in (("linear", 0.777), ("unet", 0.8)):
        recovery = result.recovery.model_copy(update=dict(quality(ssim)))
        both[name] = AttackResult(attack=result.attack.model_copy(update={"name": name}), recovery=recovery)
    alone = {"attack": None, "recovery": None, "attacks": both, "worst_case": result.recovery}
    lines = text(render_result(result.model_copy(update=alone), Path("r")))
    order = [
        lines.index(part) for part in ("against linear, unet", "Attack linear", "0.777", "Attack unet", "Worst case")
    ]
    assert order == sorted(order)


def test_state_inference_stands_beside_guessing(result):
    inference = StateInference(faces=measure(0.62, (0.6, 0.64)), channels=measure(0.9), chance=1 / 18)
    shown = text(render_result(result.model_copy(update={"state_inference": inference}), Path("r")))
    assert "62.0 ±2.0 % of the interceptions (guessing: 5.6 %)" in shown
    assert "90.0 % of the channels" in shown


def test_queries_are_told(result):
    asker = result.attack.model_copy(update={"details": {"queries_per_victim": 6800.5, "fit_queries": 1000}})
    shown = text(render_result(result.model_copy(update={"attack": asker}), Path("r")))
    assert "unet: 6,800.5 score queries per victim, 1,000 embedding queries while it was fitted" in shown
    assert "queries" not in text(render_result(result, Path("r")))


def test_a_linkage_run_shows_who_can_be_told_apart(result):
    linkage = Linkage(
        protected_plain=verification(0.83),
        protected_protected=verification(0.72),
        plain=verification(0.97),
        rank1=measure(0.375, (0.25, 0.5)),
        d_sys={"protected_protected": measure(0.444), "protected_plain": measure(0.555)},
    )
    update = {"recovery": None, "evaluator": None, "utility": None, "linkage": linkage}
    shown = text(render_result(result.model_copy(update=update), Path("r")))
    for part in (
        "Linkage of the victims (100 pairs)",
        "protected against plain",
        "83.0",
        "72.0",
        "ceiling: plain against plain",
        "97.0",
        "rank-1 among plain faces: 37.5 ±12.5 %",
        "protected protected 0.444, protected plain 0.555",
    ):
        assert part in shown, part
    assert "SSIM" not in shown


def test_a_run_without_utility_shows_the_rest(result):
    shown = text(render_result(result.model_copy(update={"utility": None}), Path("r")))
    assert "Recognition of the victims" not in shown
    assert "0.812" in shown


def test_figures_that_older_results_do_not_have_are_dashes(result):
    identity = result.recovery.identity
    assert identity.rank5 is None
    assert figure("rank5", identity.rank5) == "-"
    newer = identity.model_copy(update={"rank5": measure(0.375), "knn_distance": measure(1.234)})
    recovery = result.recovery.model_copy(update={"identity": newer})
    shown = text(render_result(result.model_copy(update={"recovery": recovery}), Path("r")))
    assert "37.5" in shown
    assert "1.234" in shown


def test_a_failed_run_is_one_line(result):
    assert "error" in text(render_result(RunResult(run_id="r", status="error", error="x"), Path("r")))


def test_figures():
    assert figure("ssim", measure(0.5)) == "0.500"
    assert figure("rank1", measure(0.125, (0.1, 0.2))) == "12.5 ±7.5"
    assert figure("psnr", measure(20.126)) == "20.13"
    assert figure("lpips", measure(None)) == "-"


def test_names_cannot_inject_markup(result):
    hostile = result.model_copy(update={"run_id": "[red]x[/red]", "defense": None})
    assert "[red]x[/red]" in text(render_result(hostile, Path("r")))


def test_plan():
    plan = RunPlan(
        run_id="r",
        device="cpu",
        precision="32-true",
        config={"seed": 0},
        stages=[
            PlannedStage(name="data", what="render faces", cached=True),
            PlannedStage(name="attack", what="train", cached=False, seconds=61.4),
        ],
        seconds=61.4,
    )
    shown = text(render_plan(plan))
    assert "61 s" in shown
    assert "render faces" in shown
    assert "estimate: 61 s in all, on cpu" in shown


def gate_text(renderable, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


def verdict(**changed):
    given = {
        "figure": "recovery.ssim",
        "role": "privacy",
        "direction": "utility",
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
    shown = gate_text(render_gate(report([cell, missing], outcome="missing", extra=["e / f: of no cell"])))
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
    assert gate_text(render_gate(report([cell], extra=[name]))).count(name) >= 4
    found = Difference(
        first=name,
        second="s",
        settings=[Setting(kind="asked", name=name, first=name, second=None)],
        figures=[FigureChange(figure=name, direction="utility", first=0.1, second=None)],
        warnings={name: [name]},
    )
    assert gate_text(render_difference(found)).count(name) >= 5


def sweep_text(cells, width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render_sweep(SweepState(sweep="ab", directory="runs/sweeps/ab", cells=cells)))
    return console.export_text()


def cell(**changed):
    return CellState(
        **{"defense": "none", "attack": "unet", "knowledge": "whitebox", "seed": 0, "run_id": "r", **changed}
    )


def sweep_measure(value):
    return Measure(value=value, direction="utility", reason=None if value is not None else "no weights")


def test_figures_stand_beside_their_neighbours():
    figures = {
        "ssim": KeyFigure(value=sweep_measure(0.5), floor=sweep_measure(0.25), ceiling=sweep_measure(0.75)),
        "accuracy": KeyFigure(value=sweep_measure(0.9), ceiling=sweep_measure(0.97)),
    }
    done = cell(status="success", directory="runs/r", figures=figures, warnings=["synthetic faces"], unsaturated=True)
    shown = sweep_text([done, cell(seed=1)])
    assert "0.500 (0.250 to 0.750)" in shown
    assert "90.0 (97.0)" in shown
    assert "success *" in shown
    assert "* unsaturated" in shown
    assert "warning: synthetic faces" in shown
    assert "2 cells: 1 pending, 1 success" in shown
    assert "runs/sweeps/ab/sweep.json" in shown
    assert "linkage" not in shown  # no cell has it


def test_why_a_cell_has_no_figures():
    shown = sweep_text(
        [
            cell(status="failed", error="the loss is [not] finite", directory="runs/r"),
            cell(status="refused", seed=1, error="needs more"),
            cell(status="success", seed=2, figures={"ssim": KeyFigure(value=sweep_measure(None))}),
        ]
    )
    assert "failed: unet (whitebox) on none, seed 0: the loss is [not] finite" in shown
    assert "refused: unet (whitebox) on none, seed 1: needs more" in shown
    assert "–" in shown


def test_a_warning_of_some_cells_names_them():
    cells = [cell(status="success", seed=seed, warnings=["noisy"] if seed < 2 else []) for seed in range(3)]
    assert "warning: unet (whitebox) on none, seed 0 and 1 more: noisy" in sweep_text(cells)
