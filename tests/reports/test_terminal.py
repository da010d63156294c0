"""What the terminal shows: every figure, with its neighbours, and no name that acts as markup."""

import pytest
from rich.console import Console
from run_folders import inversion, measure, template_protection, write_run

from bench.gate.compare import Difference, FigureChange, Setting
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport
from bench.results import NO_BETTER, Measure, PlannedStage, RunPlan, RunResult, Verification, read_result
from bench.sweep.cells import CellState, KeyFigure, SweepState
from reports.plan import render_plan
from reports.terminal import figure, render_difference, render_gate, render_result, render_sweep


def text(renderable):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


@pytest.fixture
def shown(tmp_path):
    """Make a run and show its result, after some changes to it."""

    def show(made=None, **update):
        result = read_result(write_run(tmp_path / "run", **(made or {})))
        return text(render_result(result.model_copy(update=update), tmp_path / "run"))

    return show


def assert_in_order(shown, *parts):
    place = 0
    for part in parts:
        assert part in shown[place:], part
        place += shown[place:].index(part)


def test_everything_is_there(shown, tmp_path):
    assert_in_order(
        shown(),
        "partialface, 18 states (4.17 bits) against unet (whitebox) on synthetic faces, 64 px, 8 victim images",
        "Recognition of the victims (100 pairs)", "90.0 ±2.0", "97.0 ±2.0",
        "Recovery", "SSIM", "unet", "0.700 ±0.010", "floor: mean face", "0.400", "ceiling", "0.990",
        "Identity leakage under judge (98.0 % of plain pairs told apart)", "type II %", "unet", "50.0 ±10.0",
        "judge judge: threshold 0.300 at FAR 1.00%",
        "State inference", "60.0 ±1.0 % of the interceptions (guessing: 5.6 %)", "90.0 ±1.0 % of the channels",
        "Throughput on cpu, batch 64; 442,368 bytes", "null: LPIPS: no weights", "warning: synthetic faces",
        f"files: {tmp_path / 'run'}",
    )  # fmt: skip


def test_further_protocols_stand_in_the_table_of_recognition(shown):
    assert_in_order(
        shown({"protocols": {"cfp_fp": (0.81, 0.96), "agedb_30": (0.72, 0.95)}}),
        "Recognition of the victims (100 pairs), and of cfp_fp (100), agedb_30 (100)", "TAR@1e-1 %", "90.0 ±2.0",
        "97.0 ±2.0", "cfp_fp: protected", "81.0 ±2.0", "cfp_fp: unprotected", "96.0 ±2.0", "agedb_30: protected",
    )  # fmt: skip


def test_templates_and_galleries_stand_below_recognition(shown):
    assert_in_order(
        shown({"galleries": True}),
        "Templates, 1:1: TAR in % at FAR", "1e-4", "ijbc: protected", "80.0 ±1.0", "ijbc: unprotected", "95.0 ±1.0",
        "1:N: rank-1 in %", "all", "100", "ijbc: protected", "70.0", "among 100 of folder: protected", "50.0", "60.0",
        "1:N: TPIR in % at FPIR", "1e-1", "ijbc: protected", "60.0 ±1.0", "among 100 of folder: unprotected", "80.0",
    )  # fmt: skip


def test_a_strength_curve_and_its_verdict(shown):
    assert_in_order(
        shown({"strength": True}), "Strength: what leaks", "SSIM", "200", "0.200", "800", "0.800",
        "last doubling: still gaining: a lower bound; SSIM +0.400 [+0.390, +0.410] (counts above 0.005)",
    )  # fmt: skip


def test_a_gain_that_could_not_be_judged_says_why(shown, tmp_path):
    curve = read_result(write_run(tmp_path / "other", strength=True)).strength
    unjudged = curve.model_copy(update={"gain_of_last_doubling": {"ssim": measure(None)}, "unsaturated": None})
    assert "last doubling: not judged (no weights)" in shown(strength=unjudged)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({}, "unet: better than every floor (SSIM +0.030 [+0.010, +0.050] against mean face); saturated; states"),
        ({"above_floor": False, "saturated": None}, f"unet: {NO_BETTER} (SSIM -0.010 [-0.030, +0.010] against"),
        ({"above_floor": False, "saturated": None}, "face); saturation not judged; states covered"),
        ({"above_floor": None, "saturated": False}, "unet: not held against the floors; unsaturated: a lower bound"),
    ],
)  # fmt: skip
def test_every_verdict_is_told_the_weak_and_the_missing_too(shown, made, told):
    assert told in shown(made)


def test_a_broken_attack_is_called_so(shown, tmp_path):
    info = read_result(write_run(tmp_path / "other")).attack.model_copy(update={"broken": True})
    assert "unet: broken; better than every floor" in shown(attack=info)


def test_a_broken_attack_shows_what_it_got_where_nothing_protects(shown, tmp_path):
    info = read_result(write_run(tmp_path / "other")).attack
    broken = info.model_copy(update={"broken": True, "plain_test": info.floor_test})
    told = "unet: broken (on unprotected faces: SSIM +0.030 [+0.010, +0.050] against mean face); better"
    assert told in shown(attack=broken)


@pytest.mark.parametrize(
    ("accuracy", "withheld", "told"),
    [
        (0.98, None, "judge judge: threshold"),
        (0.61, None, "judge judge: too weak to judge, 61.0 % of plain pairs told apart; threshold"),
        (0.61, "why", "judge judge: too weak to judge, 61.0 % of plain pairs told apart; its figures are withheld; "),
    ],
)
def test_a_judge_that_is_too_weak_is_called_so(shown, tmp_path, accuracy, withheld, told):
    judge = read_result(write_run(tmp_path / "other")).evaluator
    measured = judge.accuracy.model_copy(update={"value": accuracy})
    assert told in shown(evaluator=judge.model_copy(update={"accuracy": measured, "withheld": withheld}))


def test_the_worst_case_stands_below_the_attacks(shown):
    assert_in_order(
        shown({"attack": "linear,unet"}), "against linear, unet", "Attack linear", "linear", "Attack unet", "unet",
        "Worst case of all attacks", "worst case", "0.700", "recover linear",
    )  # fmt: skip


def test_queries_are_told(shown, tmp_path):
    info = read_result(write_run(tmp_path / "other")).attack
    asker = info.model_copy(
        update={"details": {"queries_per_victim": 6800.5, "protection_queries": 1000, "protection_map": "one"}}
    )
    assert_in_order(
        shown(attack=asker),
        "unet: 6,800.5 score queries per victim, 1,000 pictures sent through the client while it was fitted",
        "unet: what the client does, by its answers: one",
    )


def test_a_linkage_run_shows_who_can_be_told_apart(shown):
    linked = shown({"attack": "linkage", "linkage": True}, utility=None)
    assert_in_order(
        linked, "Linkage of the victims (100 pairs)", "protected against plain", "80.0", "70.0",
        "ceiling: plain against plain", "95.0", "rank-1 among plain faces: 30.0 ±1.0 %", "protected plain 0.400",
    )  # fmt: skip
    assert "PSNR" not in linked
    assert "Recognition of the victims" not in linked


def nothing(reason):
    """A verification of no pairs."""
    null = Measure(value=None, direction="leakage", reason=reason)
    return Verification(accuracy=null, auc=null, eer=null, tar_at_far={"1e-2": null}, pairs=0)


@pytest.fixture
def recovered(tmp_path):
    """Linkage of recovered faces, each of which was recovered once."""
    linked = read_result(write_run(tmp_path / "linked", attack="linkage", linkage=True)).linkage
    return linked.model_copy(update={"judge": "dlib", "protected_protected": nothing("once")})


def test_a_recovery_run_shows_what_its_faces_link(shown, recovered):
    told = shown(linkage=recovered)
    assert_in_order(
        told, "Recovery (victims", "Linkage of the victims by their recovered faces, under dlib (100 pairs)",
        "recovered against plain", "80.0", "ceiling: plain against plain", "95.0", "rank-1 among plain faces",
    )  # fmt: skip
    assert "recovered against recovered" not in told
    assert "once" not in told


def test_why_recovered_faces_link_nothing_is_told_once(shown, recovered):
    told = shown(linkage=recovered.model_copy(update={"protected_plain": nothing("withheld"), "plain": nothing("x")}))
    assert "Linkage of the victims" not in told
    assert told.count("withheld") == 1
    assert "null: linkage: withheld" in told


def test_template_protection_and_its_inversion(shown):
    told = shown({"template": template_protection(), "inversion": inversion(0.6, records=3)})
    assert_in_order(
        told, "Template protection (100 pairs", "own key", "98.0", "90.0", "10.0", "stolen key", "85.0", "42.5",
        "unknown key", "52.0", "1.1 ±0.1 %", "0.2 ±0.1 %", "97.0 ±1.0 %", "99.0 ±1.0 %",
        "D_sys 0.200", "0.048", "0.50 ±0.01 bits (TMR at most 42.4 %",
        "Inversion (3 templates, with keys)", "0.710 ±0.010", "0.130", "60.0", "30.0", "55.0", "15.0",
        "D_sys 0.330", "0.25 ±0.01 bits (TMR at most 19.9 %", "D_sys 0.440",
    )  # fmt: skip
    assert "Recovery (victims" not in told


def test_a_template_figure_that_could_not_be_measured_says_why(shown):
    missing = {"renewed_far_1e3": measure(None), "maximal": measure(None)}
    undone = inversion(key=False).model_copy(update=missing)
    told = shown({"template": template_protection(key_stored=True), "inversion": undone})
    assert_in_order(
        told, "1 template, without keys", "55.0 ±1.0 % at FAR 1e-2, - % at 1e-3",
        "null: pass renewed @1e-3: no weights", "null: maximal linkability inverted: no weights",
    )  # fmt: skip


def test_the_attack_that_links_best_stands_with_the_worst_case(shown, tmp_path, recovered):
    parts = read_result(write_run(tmp_path / "two", attack="linear,unet")).attacks
    worse = recovered.model_copy(update={"protected_plain": recovered.plain})
    linked = {"linear": parts["linear"].model_copy(update={"linkage": worse}),
              "unet": parts["unet"].model_copy(update={"linkage": recovered})}  # fmt: skip
    assert "linked best by linear: 95.0" in shown({"attack": "linear,unet"}, attacks=linked)


def test_the_method_of_a_linkage_attack_is_named_with_the_others(shown, tmp_path):
    info = read_result(write_run(tmp_path / "other", attack="linkage", linkage=True)).attack
    methods = {
        "recover": {"recovery": "linear", "accuracy": 0.951, "auc": 0.99, "cosine": 0.9},
        "distil": {"skipped": "recovered faces come within 0.02 of plain ones"},
    }
    details = {"method": "recover", "methods": methods, "teacher_accuracy": 0.96}
    told = shown({"attack": "linkage", "linkage": True}, attack=info.model_copy(update={"details": details}))
    assert_in_order(
        told, "linkage: by recover; held-out public people told apart: recover (linear) 95.1%",
        "distil skipped: recovered faces come", "96.0%",
    )  # fmt: skip


def test_a_failed_run_is_one_line_without_markup(tmp_path):
    assert "[red]x[/red]: error" in text(render_result(RunResult(run_id="[red]x[/red]", status="error"), tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "spread", "expected"),
    [
        ("ssim", 0.5, 0.01, "0.500 ±0.010"),
        ("rank1", 0.125, 0.075, "12.5 ±7.5"),
        ("psnr", 20.126, 0, "20.13 ±0.00"),
        ("lpips", None, 0, "-"),
    ],
)
def test_figures_are_rounded_as_declared(name, value, spread, expected):
    assert figure(name, measure(value, spread)) == expected
    assert figure(name, measure(value, spread), bounds=False) == expected.partition(" ")[0]
    assert figure(name, None) == "-"


def test_plan():
    stages = [
        PlannedStage(name="data", what="render [faces]", cached=True),
        PlannedStage(name="attack", what="train", cached=False, seconds=61.4),
    ]
    plan = RunPlan(run_id="r", device="cpu", precision="32-true", config={"seed": 0}, stages=stages, seconds=61.4)
    assert_in_order(text(render_plan(plan)), "seed", "render [faces]", "yes", "61 s", "estimate: 61 s in all, on cpu")


# -- the gate --------------------------------------------------------------------------------------


def verdict(**changed):
    given = {
        "figure": "recovery.ssim", "role": "privacy", "direction": "leakage", "baseline": 0.7, "now": 0.8,
        "change": 0.1,
        "ci95": (0.08, 0.12), "tolerance": 0.02, "margin": 0.05, "detectable": 0.06, "victims": "same victims",
        "outcome": "regress",
    }  # fmt: skip
    return FigureVerdict(**{**given, **changed})


def gate_text(cells, outcome="regress", extra=()):
    report = GateReport(
        outcome=outcome, exit_code=1, baseline="b", alpha=0.01, alpha_pass=0.05, cells=cells, extra=list(extra)
    )
    return text(render_gate(report))


def test_every_column_and_note():
    absent = dict.fromkeys(("now", "change", "ci95", "detectable"))
    unmeasured = verdict(figure="recovery.lpips", **absent, outcome="inconclusive", note="no [x]")
    judged = [verdict(blind=True, improved=True), unmeasured]
    cell = CellVerdict(cell="a / b", run="r", outcome="regress", figures=judged, notes=["n"])
    missing = CellVerdict(cell="c / d", run=None, outcome="missing", notes=["no run of this cell was given"])
    assert_in_order(
        gate_text([cell, missing], outcome="missing", extra=["e / f: of no cell"]),
        "a / b in r: regress", "+0.08 to +0.12", "regress, improved, blind", "recovery.lpips: no [x]",
        "no run of this cell was given", "not judged: e / f: of no cell", "MISSING (1 regress, 1 missing)",
    )  # fmt: skip


def test_names_are_no_markup():
    name = "[bold]x[/nonsense]"
    cell = CellVerdict(cell=name, run=name, outcome="regress", figures=[verdict(figure=name)], notes=[name])
    assert gate_text([cell], extra=[name]).count(name) >= 4
    difference = Difference(
        first=name,
        second="s",
        settings=[Setting(kind="asked", name=name, first=name, second=None)],
        figures=[FigureChange(figure=name, direction="leakage", first=0.1, second=None)],
        warnings={name: [name]},
    )
    assert text(render_difference(difference)).count(name) >= 5


# -- a sweep ---------------------------------------------------------------------------------------


def sweep_text(*cells):
    about = {"defense": "none", "attack": "unet", "knowledge": "whitebox", "run_id": "r"}
    states = [CellState(**{**about, "seed": seed, **cell}) for seed, cell in enumerate(cells)]
    return text(render_sweep(SweepState(sweep="ab", directory="runs/sweeps/ab", cells=states)))


def test_figures_stand_beside_their_neighbours():
    figures = {
        "ssim": KeyFigure(value=measure(0.5, 0), floor=measure(0.25, 0), ceiling=measure(0.75, 0)),
        "accuracy": KeyFigure(value=measure(0.9, 0), ceiling=measure(0.97, 0)),
    }
    done = {
        "status": "success",
        "directory": "runs/r",
        "figures": figures,
        "warnings": ["odd"],
        "unsaturated": True,
        "no_better": True,
    }
    shown = sweep_text(done, {})
    assert_in_order(
        shown, "2 cells: 1 pending, 1 success", "accuracy %", "SSIM", "success *", "90.0 (97.0)",
        "0.500 (0.250 to 0.750)", "* unsaturated", f"! {NO_BETTER}", "warning: odd", "runs/sweeps/ab/sweep.json",
    )  # fmt: skip
    assert "linkage" not in shown  # no cell has it


def test_why_a_cell_has_no_figures():
    shown = sweep_text(
        {"status": "failed", "error": "the loss is [not] finite", "directory": "runs/r"},
        {"status": "refused", "error": "needs more"},
        {"status": "success", "figures": {"ssim": KeyFigure(value=measure(None))}},
    )
    assert_in_order(
        shown, "–", "failed: unet (whitebox) on none, seed 0: the loss is [not] finite",
        "refused: unet (whitebox) on none, seed 1: needs more",
    )  # fmt: skip


def test_a_warning_of_some_cells_names_them():
    noisy = {"status": "success", "warnings": ["noisy"]}
    shown = sweep_text(noisy, noisy, {"status": "success"})
    assert "warning: unet (whitebox) on none, seed 0 and 1 more: noisy" in shown
