"""Cells as Ray tasks, on a real cluster of two workers on this machine: one is killed, and nothing is run twice."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import sweep_at_work
from filelock import FileLock
from sweep_at_work import calls, endless, every_end, grid, light, sweep, until_a_loss

from bench.errors import BenchError, UsageError
from bench.sweep.cells import Cell, expand
from bench.sweep.journal import opened
from bench.sweep.ray import Origin, RayWorkers


@pytest.fixture
def origin(tmp_path):
    return Origin.here(tmp_path / "lock")


def test_whoever_is_kept_out_by_the_lock_is_trusted(origin):
    with FileLock(origin.lock):
        assert origin.problem() is None
        assert "runs other code" in dataclasses.replace(origin, code="another").problem()


def test_locks_that_keep_nobody_out(origin):
    origin.lock.touch()  # nobody holds it: as if locks did not reach from one machine to another
    assert "not kept out by the lock" in origin.problem()


def test_files_that_are_not_there(origin, tmp_path):
    assert "does not see" in origin.problem()
    assert "has no folder" in dataclasses.replace(origin, folder=tmp_path / "no").problem()


def test_entering(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    origin = Origin.here(Path("runs/lock"))
    assert origin.lock == tmp_path / "runs" / "lock"
    monkeypatch.chdir("/")
    origin.enter()
    assert Path.cwd() == tmp_path


def test_a_machine_is_asked_without_an_import_of_torch():
    code = "import sys, bench.sweep.ray; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


ray = pytest.importorskip("ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(sweep_at_work.__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """What the processes of Ray inherit."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets lie there: their paths must be short
    with pytest.MonkeyPatch.context() as patch:
        # Workers import what the tests import.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment):
    """A cluster of two machines with one CPU each, the second of which a test may kill."""
    machine = {"num_cpus": 1, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        made.add_node(**machine)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def over(cluster, out, runner, **changes):
    return sweep(out, runner, engine="ray", address=cluster.address, **changes)


def statuses(state):
    return [(cell.status, cell.attempts) for cell in state.cells]


def test_every_way_to_end(cluster, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    state = over(cluster, tmp_path, every_end, defenses="none", seeds="0,1,2,3,4", retries=1).run()
    assert statuses(state) == [("success", 1), ("failed", 1), ("failed", 2), ("success", 1), ("success", 2)]
    assert state.cells[1].error == "the loss is not finite"
    assert state.cells[2].error.startswith("the Ray worker was lost: ")
    assert state.cells[3].error is None
    assert calls(tmp_path) == ["none 0", "none 3", "none 4"]  # killed workers are replaced, nothing is run twice
    assert not ray.is_initialized()  # the driver has left, the cluster stands
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_no_machine_has_and_machines_that_cannot_be_trusted(cluster, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no machine of the Ray cluster has 2 CPUs"):
        over(cluster, tmp_path, light, cpus_per_cell=2).run()
    monkeypatch.setattr(Origin, "here", lambda lock: Origin(Path.cwd(), lock.parent / "elsewhere" / "lock", ""))
    with pytest.raises(BenchError, match="does not see"):
        over(cluster, tmp_path, light).run()
    assert not ray.is_initialized()
    assert not calls(tmp_path)


def test_no_cluster(tmp_path):
    with pytest.raises(BenchError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        sweep(tmp_path, light, engine="ray", address="127.0.0.1:1").run()


def test_stopping_cancels_what_runs(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.sweep.ray.GRACE", 120.0)  # on a busy machine; it ends as soon as all are cancelled
    cells = [Cell(config) for config in expand(grid(tmp_path, defenses="none"))]
    with opened(cells) as journal:
        workers = RayWorkers(endless, journal.lock, address=cluster.address, cpus=1, gpus=0)
        assert workers.slots == 2
        for cell in cells:
            workers.start(cell)
        while len(calls(tmp_path, "began")) < 2:
            assert workers.wait() == []
        workers.stop()
    assert len(calls(tmp_path, "cancelled")) == 2  # each wrote down that it was
    assert not ray.is_initialized()


def test_a_machine_that_is_lost_in_the_middle(cluster, tmp_path):
    """Comes after the others: half of the cluster is gone then."""
    lost = threading.Thread(target=lose_a_machine, args=(cluster, tmp_path))
    lost.start()
    state = over(cluster, tmp_path, until_a_loss, defenses="none").run()
    lost.join()
    assert sorted(statuses(state)) == [("success", 1), ("success", 2)]
    assert calls(tmp_path) == ["none 0", "none 1"]


def lose_a_machine(cluster, out):
    """Kill the second machine, abruptly, when each runs a cell."""
    deadline = time.monotonic() + 240
    while len(calls(out, "began")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    machine = cluster.worker_nodes.copy().pop()
    (raylet,) = machine.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    cluster.remove_node(machine, allow_graceful=False)
    for worker in workers:  # they would outlive it by a second, and finish
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers, timeout=20)
    (out / "lost").touch()


def test_a_cluster_of_its_own(tmp_path):
    """Without an address. It comes last: a process that starts one forgets how to talk to another."""
    state = sweep(tmp_path, light, engine="ray", defenses="none", seeds="0").run()
    assert statuses(state) == [("success", 1)]
    assert not ray.is_initialized()
