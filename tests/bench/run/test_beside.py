"""Two trainings of a run at a time: who makes a stage changes nothing, and no process is left behind."""

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_runs import TINY_UNET, events, made, pipeline

from bench.run import pipeline as pipeline_module
from bench.run.beside import Beside, is_worth_it
from bench.run.config import resolve
from bench.run.stage import StageRunner

RUN = {
    "defense": "partialface",
    "attack": "unet",
    "attack_options": {"unet": {**TINY_UNET, "images": "64"}},
    "probes": 4,
    "image_size": 24,
    "dataset_options": {"identities": 28, "images_per_identity": 4},
}
#: What is no result of a run: names and times.
UNTOLD = {"run_id", "seconds", "throughput", "peak_memory", "cached"}


def figures(result):
    return {name: value for name, value in json.loads(result.to_json()).items() if name not in UNTOLD}


def curves(directory):
    """What a curve is written down of."""
    return {event["task"] for event in events(directory, "progress") if "loss" in event}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the run gives in one process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cell = pipeline(tmp_path_factory.mktemp("alone"), **RUN)
    result = cell.run()
    torch.set_num_threads(threads)
    return result, sorted(made(cell.directory)), curves(cell.directory)


@pytest.fixture
def processes(monkeypatch):
    """The second processes of the runs to come."""
    seen = []

    class Watched(Beside):
        def __enter__(self):
            entered = super().__enter__()
            seen.append(psutil.Process(self._process.pid))
            return entered

    monkeypatch.setattr(pipeline_module, "Beside", Watched)
    return seen


def until(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_the_second_process_makes_is_taken_and_the_same(tmp_path, monkeypatch, set_threads, processes, expected):
    do, threads = StageRunner.do, set()

    def after_the_others(self, job):
        # The first training here starts when the last one has been made there: it has some seconds to start.
        if self.beside and not threads:
            until(lambda: list(Path(tmp_path / "cache").glob("attack-unet-none-*/files.json")))
            threads.add(torch.get_num_threads())
        return do(self, job)

    monkeypatch.setattr(StageRunner, "do", after_the_others)
    set_threads(2)
    cell = pipeline(tmp_path, **RUN)
    result = cell.run(beside=True)
    assert (torch.get_num_threads(), threads) == (2, {1})
    alone, stages, seen = expected
    assert figures(result) == figures(alone)
    assert sorted(made(cell.directory)) == stages
    assert result.cached == []
    assert result.peak_memory["beside_bytes"] > 2**27
    assert "attack-unet-none" in {e["stage"] for e in events(cell.directory, "stage") if e.get("beside")}
    assert [e for e in events(cell.directory, "beside") if "error" in e] == []
    assert curves(cell.directory) == seen
    assert not processes[0].is_running()


def test_a_second_process_that_is_killed_is_no_loss(tmp_path, monkeypatch, set_threads, processes, expected):
    enter = pipeline_module.Beside.__enter__

    def killed(self):
        entered = enter(self)
        self._process.kill()
        return entered

    monkeypatch.setattr(pipeline_module.Beside, "__enter__", killed)
    set_threads(2)
    cell = pipeline(tmp_path, **RUN)
    alone, stages, _ = expected
    assert figures(cell.run(beside=True)) == figures(alone)
    assert sorted(made(cell.directory)) == stages


def test_it_ends_with_a_run_that_is_interrupted(tmp_path, monkeypatch, set_threads, processes):
    do = StageRunner.do

    def interrupted(self, job):
        if self.beside:
            until(lambda: processes[0].cpu_times().user > 0.5)  # it is at its imports
            raise KeyboardInterrupt
        return do(self, job)

    monkeypatch.setattr(StageRunner, "do", interrupted)
    set_threads(2)
    with pytest.raises(KeyboardInterrupt):
        pipeline(tmp_path, **RUN).run(beside=True)
    assert not processes[0].is_running()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("removed", "needed"),
    [
        ("*-unet-none-*", {"attack-unet-none", "recover-unet-none"}),
        ("attack-unet-*", {"attack-unet-partialface"}),  # what the other one recovers is there
    ],
)
def test_there_is_none_for_a_single_training(tmp_path, set_threads, processes, removed, needed):
    set_threads(2)
    cell = pipeline(tmp_path, **RUN)
    cell.run()
    for folder in (tmp_path / "cache").glob(f"{removed}/"):
        shutil.rmtree(folder)
    assert {stage.name for stage in cell.plan().stages if not stage.cached} == needed
    cell.run(beside=True)
    assert processes == []
    assert set(made(cell.directory)) == needed


@pytest.mark.parametrize(
    ("settings", "device", "threads", "environment", "worth"),
    [
        ({}, "cpu", 2, {}, True),
        ({}, "cpu", 1, {}, False),
        ({}, "cuda", 2, {}, False),
        ({}, "cpu", 2, {"OMP_NUM_THREADS": "2"}, False),
        ({"preset": "quick"}, "cpu", 2, {}, False),
        ({"resume": False}, "cpu", 2, {}, False),
    ],
)
def test_where_two_are_made_at_a_time(monkeypatch, set_threads, settings, device, threads, environment, worth):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=8 * 2**30))
    set_threads(threads)
    config = resolve({"defense": "partialface", "attack": "unet", **settings}, {})
    assert is_worth_it(config, torch.device(device)) == worth
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**30))
    assert not is_worth_it(config, torch.device(device))
