"""Settings for the whole suite."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

import bench as _  # noqa: F401  (sets what torch reads from the environment when it is imported)

# What a script starts in its background is deaf to Ctrl-C, and so is all that is started from there; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test that waits for busy neighbours has found nothing.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Imported once a worker, by the server from which tests fork processes: that takes longer than what these do.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "bench.recognition.training", "defenses.none", "sweep_at_work", "bench.sweep.workers"]
)


def pytest_configure(config):
    """How many threads there are is settled before a test imports torch, and child processes inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # One worker a core: more threads would only get in each other's way.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    elif not config.getoption("numprocesses", default=None) and hasattr(os, "sched_getaffinity"):
        # The number that it would be, so that no command takes fewer beside busy neighbours: runs are compared bit for
        # bit. Workers would inherit it.
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Each worker starts with tests that lie together, and so makes what a module shares once in all, not once each."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_collection_modifyitems(config, items):
    """Each worker's share of the tests, one after the other here, begins with modules of slow tests.

    What is left to be stolen at the end is short then, and workers end together.
    """
    if not (workers := getattr(config, "workerinput", {}).get("workercount")):
        return
    modules = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    shares, sizes = {}, [0] * workers
    for path in sorted(modules, key=lambda path: path not in slow):
        shares[path] = sizes.index(min(sizes))
        sizes[shares[path]] += modules[path]
    items.sort(key=lambda item: (shares[item.path], item.path not in slow))


@pytest.fixture(scope="session")
def real_faces_root() -> Path:
    """The folder with real faces, in InsightFace's layout; without one the test is skipped."""
    root = os.environ.get("BENCH_DATA_ROOT")
    if not root:
        pytest.skip("BENCH_DATA_ROOT is not set")
    return Path(root)


@pytest.fixture(scope="session", autouse=True)
def _speed_in_passing():
    """No test of a run asks how fast anything is."""
    from runs_at_work import speed_in_passing

    speed_in_passing()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What a person keeps in the cache folder is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def set_threads():
    """Sets torch's number of threads, for this test alone."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Run the command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("BENCH_", "GITHUB_"))]:
        monkeypatch.delenv(name)

    def call(*arguments):
        from bench import cli

        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call
