"""Loggers: what TensorBoard, MLflow and W&B are told is what the run wrote; none of them decides what a run finds."""

import json
import sys

import pytest
import tiny_runs
from run_folders import write_run
from tiny_runs import events, pipeline

from bench.errors import BenchError, MissingError
from bench.results import RunResult, measures
from bench.run import logger
from bench.run.archive import load_run
from bench.run.config import resolve
from bench.run.pipeline import Pipeline
from bench.run.store import run_id

TINY = {"defense": "none", "attack": "unet"}


def config(out, **settings):
    return resolve({**tiny_runs.TINY, **TINY, "out": out, **settings}, {})


def scalars(folder):
    """Name -> (step, value) of everything in TensorBoard's files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def compute(self, store, processes, log):
    """In place of a run: two trainings whose figures are reported, and a result that somebody else's run had."""
    bars = self._stages(log).bars
    for task in ("train provider recogniser on x+y", "fit [unet]"):
        with bars.task(task) as report:
            for done in range(1, 201):
                report(done, 200, loss=10 / done, epoch=done // 50)
    return load_run(self.config.out / "given").result.model_copy(update={"run_id": store.run_id})


def test_tensorboard_is_told_what_the_run_wrote(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    write_run(tmp_path / "given", samples=False)
    monkeypatch.setattr(Pipeline, "_compute", compute)
    for _ in range(2):  # the same command again starts anew
        cell = pipeline(tmp_path, **TINY, logger="tensorboard")
        result, directory = cell.run(), cell.directory
        told = scalars(directory / "tensorboard")
        curves = {}
        for event in events(directory, "progress"):
            name = event["task"].translate(str.maketrans("[]+", "---"))
            curves.setdefault(f"{name}/loss", []).append((event["done"], pytest.approx(event["loss"])))
        assert len(curves) == 2
        assert all(len(curve) >= 40 for curve in curves.values())
        assert {name: told[name] for name in curves} == curves
        final = {place: [(0, pytest.approx(m.value))] for place, m in measures(result) if m.value is not None}
        assert "recovery.ssim" in final
        assert {place: told[place] for place in final} == final
    assert any(name.startswith("tensorboard/") for name in load_run(directory).manifest.artefacts)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_computed(bench, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, out, err = bench("run", "--defense", "none", "--attack", "unet", "--logger", name)
    assert (code, out) == (5, "")
    assert len(err.splitlines()) == 1
    assert f"ppfr-bench[{name}]" in err


def test_an_unknown_logger_is_named_with_those_there_are(bench):
    code, _, err = bench("run", "--defense", "none", "--attack", "unet", "--logger", "paper")
    assert code == 2
    assert "tensorboard" in err


def test_a_logger_is_no_part_of_what_a_run_is_called(tmp_path):
    assert run_id(config(tmp_path)) == run_id(config(tmp_path, logger="tensorboard"))


class Frail:
    """A logger that breaks down at the second figure."""

    experiment = None

    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        if self.logged:
            raise ConnectionError("the server is gone")
        self.logged.append((metrics, step))

    log_hyperparams = finalize = None


def test_one_that_breaks_down_is_left_out_and_said(tmp_path, monkeypatch):
    frail, told = Frail(), []
    monkeypatch.setattr(logger, "_LOGGERS", {"mlflow": lambda *_: frail})
    tracker = logger.Tracker(config(tmp_path, logger="mlflow"), told.append)
    tracker.start("run", tmp_path)
    for step in (1, 2, 3):
        tracker.event("progress", task="fit [x]+y", done=step, total=3, loss=0.5)
        tracker.event("stage", stage="attack", key="k")
    tracker.finish(RunResult(run_id="run", status="error", error="x"))
    assert frail.logged == [({"fit -x-y/loss": 0.5}, 1)]
    [line] = told
    assert "the server is gone" in line


def test_one_that_does_not_start_ends_the_run_at_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(logger, "_LOGGERS", {"mlflow": refuse})
    monkeypatch.setattr("bench.run.pipeline.check_logger", lambda name: None)
    cell = pipeline(tmp_path, **TINY, logger="mlflow")
    with pytest.raises(BenchError, match="--logger mlflow does not start: no route to host"):
        cell.run()
    assert json.loads((cell.directory / "metrics.json").read_text())["status"] == "error"


def test_what_is_installed_is_not_missing():
    logger.check_logger(None)
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(MissingError):
            logger.check_logger("tensorboard")
    else:
        logger.check_logger("tensorboard")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_the_others_are_told_the_same(tmp_path, monkeypatch, name):
    pytest.importorskip("pytorch_lightning")
    package = pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lost = []
    (tmp_path / "runs" / "run").mkdir(parents=True)
    tracker = logger.Tracker(config(tmp_path / "runs", logger=name), lost.append)
    tracker.start("run", tmp_path / "runs" / "run")
    for step in (10, 20):
        tracker.event("progress", task="fit", done=step, total=20, loss=1 / step)
    tracker.finish(RunResult(run_id="run", status="success"))
    assert lost == []
    if name == "wandb":
        assert list((tmp_path / "runs" / "run" / "wandb").rglob("*.wandb"))
        return
    client = package.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "ppfr-bench"]
    [run] = client.search_runs([experiment.experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "fit/loss")] == [
        (10, 0.1),
        (20, 0.05),
    ]
    assert run.info.status == "FINISHED"
    assert run.data.params["defense"] == "none"
