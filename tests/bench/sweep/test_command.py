"""``bench sweep`` on the command line: one document or one table, exit codes, and what a report makes of it."""

import json
import sys

import pytest
from sweep_at_work import calls, failing, full, interrupted

import bench.sweep.sweep as sweep_module
from bench.sweep.cells import SweepState

GRID = ("sweep", "--defenses", "none,partialface", "--attacks", "unet", "--preset", "quick", "--device", "cpu")


@pytest.fixture
def bench(bench, monkeypatch):
    """The command with a runner in the pipeline's place."""

    def call(*arguments, runner=full):
        monkeypatch.setattr(sweep_module, "run_pipeline", lambda config, console=None: runner(config))
        return bench(*arguments)

    return call


def test_a_table_of_cells_and_the_folders_that_a_report_takes(bench, tmp_path):
    code, out, err = bench(*GRID, "--seeds", "0,1", "--out", "runs")
    assert code == 0, err
    assert err == ""
    assert "4 cells: 4 success" in out
    assert "0.700 (0.400 to 0.990)" in out
    directories = [line for line in out.splitlines() if line.startswith("runs/")]
    assert len(directories) == 4
    code, _, err = bench("report", *directories, "--out", "report")
    assert code == 0, err
    assert (tmp_path / "report").is_dir()


def test_one_json_document(bench):
    code, out, _ = bench(*GRID, "--json")
    assert code == 0
    document = json.loads(out)
    state = SweepState.model_validate(document)
    assert state.count("success") == 2
    assert document["cells"][0]["figures"]["ssim"]["value"]["ci95"] is not None


def test_a_failed_cell_is_exit_code_3(bench):
    arguments = (*GRID, "--seeds", "0,1", "--out", "runs")
    code, out, err = bench(*arguments, runner=failing)
    assert (code, err) == (3, "")
    assert "2 success, 2 failed" in out
    assert "failed: unet (whitebox) on none, seed 1: the loss is not finite" in out
    code, out, _ = bench(*arguments, "--json", runner=failing)
    assert (code, [cell["status"] for cell in json.loads(out)["cells"]].count("failed")) == (3, 2)


def test_dry_run_lists_the_cells_and_runs_none(bench, tmp_path):
    arguments = [*GRID, "--attacks", "unet,unet-ensemble", "--knowledge", "blackbox", "--dry-run"]
    code, out, _ = bench(*arguments)
    assert code == 0
    assert "4 cells: 2 pending, 2 refused" in out
    assert "does not grant" in out
    assert json.loads(bench(*arguments, "--json")[1])["cells"][0]["status"] == "pending"
    assert list(tmp_path.iterdir()) == []


def test_interruption(bench):
    code, out, err = bench(*GRID, "--seeds", "0,1", "--out", "runs", runner=interrupted)
    assert (code, out) == (130, "")
    assert "the same command goes on" in err
    code, out, _ = bench(*GRID, "--seeds", "0,1", "--out", "runs")
    assert code == 0
    assert calls("runs") == ["none 0", "none 1", "partialface 0", "partialface 1"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*GRID, "--defenses", "nothing"), 2, "unknown defence 'nothing'"),
        ((*GRID, "--address", "auto"), 2, "--engine ray"),
        ((*GRID, "--config", "no.toml"), 5, "no.toml does not exist"),
        ((*GRID, "--set", "training.epoch=3"), 2, "unknown key 'training.epoch'"),
    ],
)
def test_bad_input_is_one_line(bench, arguments, code, message):
    got, out, err = bench(*arguments)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_settings_of_a_run_reach_the_cells(bench):
    seen = []
    flags = ("--no-utility", "--budget", "k=1,2", "--head", "arcface", "--set", "training.epochs=7", "--probes", 9)
    assert bench(*GRID, *flags, "--out", "elsewhere", runner=lambda config: seen.append(config) or full(config))[0] == 0
    assert len(seen) == 2
    for config in seen:
        assert (config.utility, config.budget, config.probes, str(config.out)) == (False, "k=1,2", 9, "elsewhere")
        assert (config.training.head, config.training.epochs) == ("arcface", 7)


def test_ray_that_is_not_installed(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = bench(*GRID, "--engine", "ray")
    assert code == 5
    assert "pip install ppfr-bench[ray]" in err
