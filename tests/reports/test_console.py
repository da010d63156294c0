"""What the terminal shows: every figure with its neighbours, and dashes with reasons."""

from pathlib import Path

import pytest
from rich.console import Console

from bench.results import (
    AttackInfo,
    DatasetInfo,
    DefenseInfo,
    EvaluatorInfo,
    Identity,
    Measure,
    PlannedStage,
    Quality,
    Quartiles,
    Recovery,
    RunPlan,
    RunResult,
    Throughput,
    Utility,
    Verification,
)
from reports.console import figure, render_plan, render_result


def measure(value, ci=None):
    return Measure(
        value=value, ci95=ci, n=10, higher_is_better_for="utility", reason=None if value is not None else "no"
    )


def quality(ssim):
    identity = Identity(type1_tar=measure(0.5), type2_tar=measure(0.25), rank1=measure(0.125), cosine=measure(0.5))
    return Quality(
        ssim=measure(ssim, (ssim - 0.01, ssim + 0.01)),
        psnr=measure(20.0),
        psnr_aligned=measure(21.0),
        ms_ssim=measure(0.9),
        lpips=Measure(value=None, higher_is_better_for="privacy", reason="no weights here"),
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
