"""`bench observe` and `bench score`, from the export of a run to a submission beside it."""

import json

import numpy as np
import pytest
from pixel_judge import write_pixel_judge
from tiny_runs import pipeline


@pytest.fixture
def run(tmp_path):
    judge = write_pixel_judge(tmp_path / "judge.onnx")
    cell = pipeline(tmp_path / "runs", defense="pixelate", attack="linear", utility=False, evaluator=[judge])
    cell.run()
    return cell.directory


@pytest.mark.slow
def test_what_was_observed_is_answered_and_scored(bench, run):
    code, out, _ = bench("observe", run, "--out", "observed.npz", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["arrays"]["faces"][1:] == [3, 32, 32]
    code, out, _ = bench("observe", run, "--out", "observed.npz")
    assert (code, told["observed"] in out, "whitebox" in out) == (0, True, True)
    with np.load("observed.npz") as observed:
        count = len(observed["representations"])
        np.savez("mine.npz", faces=np.full((count, 3, 32, 32), 0.5), observed=observed["observed"])
    code, out, _ = bench("score", "--recovered", "mine.npz", "--run", run, "--name", "grey-1", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["attack"]["name"] == "submitted:grey-1"
    assert (run.parent / result["run_id"] / "manifest.json").is_file()
    assert "submitted:grey-1" in bench("show", run.parent / result["run_id"])[1]
    assert bench("score", "--recovered", "mine.npz", "--run", run)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("observe", "nowhere", "--out", "observed.npz"), 5, "manifest.json cannot be read"),
        (("observe", "nowhere", "--out", "observed.txt"), 2, "must end in .npz"),
        (("score", "--recovered", "mine.npz", "--run", "nowhere"), 5, "manifest.json cannot be read"),
        (("score", "--recovered", "mine.npz", "--run", "nowhere", "--name", "a b"), 2, "name a submission"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(bench, arguments, code, message):
    ended, _, err = bench(*arguments)
    assert (ended, message in err, err.count("\n")) == (code, True, 1)
