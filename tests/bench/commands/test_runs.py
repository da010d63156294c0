"""`bench runs`, `bench show` and `bench rm` on run folders as reports read them."""

import io
import json

import pytest
from run_folders import write_run


@pytest.fixture
def store(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"run-{seed}", seed=seed, samples=False)
    (tmp_path / "runs" / "cache").mkdir()
    return tmp_path / "runs"


def test_the_runs_of_a_folder(bench, store, monkeypatch):
    code, out, _ = bench("runs", "--json")
    assert code == 0
    assert {row["run"] for row in json.loads(out)} == {"run-0", "run-1"}
    assert all(row["status"] == "success" for row in json.loads(out))
    monkeypatch.setenv("BENCH_OUT", str(store))
    monkeypatch.chdir("/")
    assert "run-1" in bench("runs")[1]
    assert bench("runs", "nowhere")[0] == 5


def test_a_run_is_shown_as_when_it_ended(bench, store):
    code, out, _ = bench("show", store / "run-0", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((store / "run-0" / "metrics.json").read_text())
    assert "SSIM" in bench("show", store / "run-0")[1]


def test_only_runs_are_deleted_and_only_with_consent(bench, store, monkeypatch):
    code, _, err = bench("rm", "--yes", store / "run-0", store / "cache")
    assert (code, "not a run directory" in err) == (5, True)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = bench("rm", store / "run-0")
    assert (code, "--yes" in err) == (2, True)  # nobody is there to be asked
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert bench("rm", store / "run-0")[:2] == (0, "")
    assert (store / "run-0").is_dir()
    code, out, _ = bench("rm", "--yes", store / "run-0", "--json")
    assert (code, json.loads(out)) == (0, {"files": [str(store / "run-0")]})
    assert sorted(path.name for path in store.iterdir()) == ["cache", "run-1"]


def test_a_run_that_failed_says_why(bench, tmp_path):
    write_run(tmp_path / "runs" / "failed", error="the disk is full", samples=False)
    code, out, _ = bench("show", tmp_path / "runs" / "failed")
    assert (code, "error: the disk is full" in " ".join(out.split())) == (0, True)


def test_what_a_run_from_elsewhere_says_does_not_reach_the_terminal_as_commands(bench, tmp_path):
    folder = write_run(tmp_path / "r", error="\x1b]0;owned\x07 \x1b[2J and more")
    for command in (("show", folder), ("runs", tmp_path)):
        code, out, err = bench(*command)
        assert (code, "\x1b" in out + err, "\x07" in out + err) == (0, False, False)
    assert r"\x1b[2J and more" in bench("show", folder)[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"config": {"seed": "\x1b[2J" + 9999 * "a"}}))
    code, _, err = bench("show", folder)
    assert (code, "\x1b" in err, len(err.splitlines())) == (5, False, 1)
