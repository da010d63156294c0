"""The main job at preset ``quick``, through the installed command, as CI runs it."""

import json
import os
import subprocess
import sys

import pytest

#: Top-level layout of a successful result; a change here is a change of the schema.
KEYS = {
    "schema",
    "protocol",
    "run_id",
    "status",
    "error",
    "warnings",
    "defense",
    "attack",
    "evaluator",
    "teacher",
    "dataset",
    "utility",
    "recovery",
    "linkage",
    "state_inference",
    "inversion",
    "template",
    "strength",
    "attacks",
    "worst_case",
    "throughput",
    "seconds",
    "cached",
    "evaluators",
    "recognisers",
    "failed",
    "worst_case_test",
    "peak_memory",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BENCH_")}
    command = [sys.executable, "-m", "bench", "run", "--defense", "partialface", "--attack", "unet"]
    done = subprocess.run(
        [*command, "--preset", "quick", "--json", "--out", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # off a terminal, progress is silent
    result = json.loads(done.stdout)
    assert set(result) == KEYS
    assert result["status"] == "success"
    assert result["defense"]["states"] == 18
    assert result["defense"]["representation_shape"] == [27, 64, 64]

    recovery = result["recovery"]
    ssim = {name: floor["ssim"]["value"] for name, floor in recovery["floors"].items()}
    own, ceiling = recovery["ssim"]["value"], recovery["ceiling"]["ssim"]["value"]
    # Even unconverged, the attack beats knowing nothing, and an unprotected face gives more away.
    assert max(ssim["grey"], ssim["noise"]) < own < ceiling
    assert ceiling > 0.8
    low, high = recovery["ssim"]["ci95"]
    assert low < own < high
    assert recovery["lpips"]["value"] is not None or "AlexNet" in recovery["lpips"]["reason"]

    utility = result["utility"]
    assert utility["unprotected"]["auc"]["value"] > 0.6  # chance is 0.5
    assert utility["auc"]["value"] > 0.55
    assert result["dataset"]["identities"].keys() == {"provider", "public", "evaluator", "victims"}
    assert any("synthetic" in warning for warning in result["warnings"])
    folder = tmp_path / "runs" / result["run_id"]
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert (folder / "samples" / "contact-sheet.png").stat().st_size > 10_000
