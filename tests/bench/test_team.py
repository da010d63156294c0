"""A run under torchrun: the first process does everything, the others only train along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = (
    *("run", "--defense", "none", "--attack", "linear", "--preset", "quick", "--head", "partial-fc", "--device", "cpu"),
    *("--image-size", "32", "--probes", "4", "--set", "training.epochs=2", "--set", "training.batch_size=16"),
    *("--set", "training.sample_rate=0.5", "--set", "dataset_options.identities=30"),
    *("--set", "dataset_options.images_per_identity=6", "--json"),
)


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "bench",
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    done = torchrun(tmp_path, *RUN)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one document: one process printed
    assert result["status"] == "success"
    (directory,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "cache")
    assert json.loads((directory / "metrics.json").read_text())["run_id"] == result["run_id"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["processes"], manifest["status"]) == (2, "success")
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("started") == 1
    trained = [event for event in events if event.get("task", "").startswith("train provider")]
    assert trained[-1]["done"] == trained[-1]["total"]
    details = _details(next((tmp_path / "runs" / "cache").glob("recogniser-provider-none-*/recogniser.safetensors")))
    assert details["processes"] == 2
    assert not list((tmp_path / "runs" / "cache").glob("*.partial"))


@pytest.mark.slow
def test_a_run_that_fails_ends_in_all_processes_with_one_line(tmp_path: Path) -> None:
    done = torchrun(tmp_path, *RUN, "--set", "training.learning_rate=1e30")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("bench: ")]
    assert len(said) == 1
    assert "training diverged" in said[0]
    assert json.loads(done.stdout)["status"] == "error"


def _details(file: Path) -> dict[str, object]:
    from bench.recognition.checkpoint import load_tensors

    details: dict[str, object] = load_tensors(file)[1]["details"]
    return details
