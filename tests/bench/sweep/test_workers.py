"""Cells in processes of their own: killed ones are tried again, shared stages are made once, Ctrl-C leaves nobody."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sweep_at_work
from sweep_at_work import calls, endless, every_end, exits, sharing, sweep

import bench.sweep.workers as pool_module
from bench.sweep.cells import Cell, expand
from bench.sweep.sweep import _next
from bench.sweep.workers import Pool

SUPPORT = Path(sweep_at_work.__file__)


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch):
    monkeypatch.setattr(pool_module, "START", "forkserver")


def statuses(state):
    return [(cell.status, cell.attempts) for cell in state.cells]


@pytest.mark.slow
def test_every_way_to_end(tmp_path):
    state = sweep(tmp_path, every_end, defenses="none", seeds="0,1,2,3,4", jobs=2, retries=1).run()
    assert statuses(state) == [("success", 1), ("failed", 1), ("failed", 2), ("success", 1), ("success", 2)]
    assert state.cells[1].error == "the loss is not finite"
    assert "was killed (SIGKILL): out of memory?" in state.cells[2].error
    assert state.cells[3].error is None  # it was lost after its work: not run again
    assert state.cells[4].error is None
    assert calls(tmp_path) == ["none 0", "none 3", "none 4"]  # a killed worker takes nobody with it
    state = sweep(tmp_path, exits, defenses="none", seeds="5,6", jobs=2, retries=0).run()
    assert {cell.error for cell in state.cells} == {"the worker process ended with exit code 7 and without a result"}


@pytest.mark.slow
def test_two_cells_that_need_one_stage_at_the_same_time(tmp_path):
    """The first makes it, the other waits and finds it whole. Each has as many threads as it may."""
    state = sweep(tmp_path, sharing, defenses="none", jobs=2, cpus_per_cell=2).run()
    assert statuses(state) == [("success", 1)] * 2
    assert len(calls(tmp_path, "made")) == 1
    assert calls(tmp_path, f"{min(2, os.cpu_count())} threads") == ["none 0", "none 1"]
    assert sorted(path.name for path in (tmp_path / "cache").glob("stage-shared*")) == [
        "stage-shared",
        "stage-shared.lock",
    ]


def start_endless(tmp_path, method="forkserver"):
    """A sweep of two endless cells in a process group of its own, once both run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[2]), str(SUPPORT.parent)])}
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT), str(tmp_path), method],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(calls(tmp_path, "began")) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("spawn", lambda pid: os.killpg(pid, signal.SIGINT)),  # as a terminal sends it: to all of them
        ("forkserver", lambda pid: os.kill(pid, signal.SIGTERM)),  # as a scheduler may: to the first alone
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_what_ends_a_sweep_ends_every_worker_in_order(tmp_path, method, end):
    process, children = start_endless(tmp_path, method)
    end(process.pid)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line.partition(b";")[0] for line in stderr.splitlines()] == [b"bench: interrupted"]
    assert len(calls(tmp_path, "cancelled")) == 2  # each wrote down that it was
    assert not psutil.wait_procs(children, timeout=10)[1]
    (journal,) = tmp_path.glob("sweeps/*/sweep.json")
    assert journal.read_text().count('"status": "pending"') == 4


@pytest.mark.slow
def test_workers_end_when_the_sweep_is_killed(tmp_path):
    process, children = start_endless(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert len(calls(tmp_path, "cancelled")) == 2


@pytest.mark.slow
def test_a_worker_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "GRACE", 0.1)
    pool = Pool(endless, 1, 1)
    (cell,) = (Cell(config) for config in expand(sweep_at_work.grid(tmp_path, defenses="none", seeds="0")))
    pool.start(cell)
    ((_, process),) = pool._workers.values()
    while not calls(tmp_path, "began"):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)
    pool.stop()
    assert process.exitcode == -signal.SIGKILL
    assert not calls(tmp_path, "cancelled")


def test_cells_that_would_wait_for_each_other_are_not_started_together(tmp_path):
    cells = [Cell(config) for config in expand(sweep_at_work.grid(tmp_path, attacks="unet,linear", seeds="0"))]
    first, second, third, _ = cells
    assert _next(cells, []) is first
    assert _next(cells[1:], [first]) is third
    assert _next([second], [first]) is second
