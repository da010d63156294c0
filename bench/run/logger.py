"""Training curves and final figures to TensorBoard, MLflow or Weights & Biases, through Lightning's loggers.

They get what ``events.jsonl`` gets: of every task its figures at the examples seen, and in the end every measure of the
result. Nothing depends on them: a logger that breaks down is left out for the rest of the run, which says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, MissingError
from bench.files import DISTRIBUTION
from bench.results import RunResult, measures
from bench.run.config import RunConfig

if TYPE_CHECKING:
    from lightning_fabric.loggers.logger import Logger  # takes as long to import as torch

#: Name of a logger -> packages that it needs, which the extra of its name installs.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "pytorch_lightning"),
    "wandb": ("wandb", "pytorch_lightning"),
}

#: What MLflow refuses in the name of a figure.
_REFUSED = re.compile(r"[^\w\-./ ]+")


def check_logger(name: str | None) -> None:
    """Whether the logger can be had.

    Raises:
        MissingError: its packages are not installed.
    """
    missing = [package for package in _NEEDS.get(name or "", ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingError(f"--logger {name} needs {' and '.join(missing)}: pip install '{DISTRIBUTION}[{name}]'")


class Tracker:
    """Hands what a run logs to the logger that was asked for, if any was.

    Args:
        config: of the run.
        tell: called with one line if the logger breaks down.
    """

    def __init__(self, config: RunConfig, tell: Callable[[str], None]) -> None:
        self.logger: Logger | None = None
        self.name = config.logger
        self._config, self._tell = config, tell

    def start(self, run_id: str, directory: Path) -> None:
        """Start the logger.

        Args:
            run_id: what the run is called there.
            directory: the run's folder; files of TensorBoard and W&B lie in it. MLflow's go to
                ``MLFLOW_TRACKING_URI``, else into ``mlflow.db`` beside the runs, which share it.

        Raises:
            BenchError: it does not start.
        """
        if self.name is None:
            return
        try:
            self.logger = _LOGGERS[self.name](run_id, directory)
            _ = self.logger.experiment  # type: ignore[attr-defined]  # connects: later would be too late to say no
        except Exception as error:  # whatever a service, its client or the network may raise
            self.logger = None
            raise BenchError(f"--logger {self.name} does not start: {error}") from error

    def event(self, event: str, *, task: str = "", done: float = 0, total: float = 0, **figures: Any) -> None:
        """Log the figures of a task's progress at ``done`` of ``total``; of other events nothing."""
        if event == "progress" and figures:
            numbers = _named({f"{task}/{name}": value for name, value in figures.items()})
            self._safely(lambda logger: logger.log_metrics(numbers, step=int(done)))

    def finish(self, result: RunResult) -> None:
        """Log every measure of a result, and the configuration; nothing more can be logged then."""
        final = {place: measure.value for place, measure in measures(result) if measure.value is not None}
        config = self._config.model_dump(mode="json")

        def log(logger: Logger) -> None:
            logger.log_hyperparams(config, *([_named(final)] if self.name == "tensorboard" else []))
            if self.name != "tensorboard":  # which has logged them with the configuration
                logger.log_metrics(_named(final), step=0)
            logger.finalize("success" if result.status == "success" else "failed")
            if self.name == "wandb":
                logger.experiment.finish(exit_code=int(result.status != "success"))  # type: ignore[attr-defined]

        self._safely(log)
        self.logger = None

    def _safely(self, log: Callable[[Logger], None]) -> None:
        if self.logger is None:
            return
        try:
            log(self.logger)
        except Exception as error:  # whatever a service, its client or the network may raise
            self.logger = None
            self._tell(f"{self.name} was left out from here on: {type(error).__name__}: {error}")


def _named(numbers: Mapping[str, float]) -> dict[str, float]:
    return {_REFUSED.sub("-", name): value for name, value in numbers.items()}


def _tensorboard(run_id: str, directory: Path) -> Logger:
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    # The curves of an earlier try would be drawn through those of this one.
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    return TensorBoardLogger(directory, name="tensorboard", version="")


def _mlflow(run_id: str, directory: Path) -> Logger:
    from pytorch_lightning.loggers import MLFlowLogger

    local = f"sqlite:///{(directory.parent / 'mlflow.db').resolve()}"
    address = os.environ.get("MLFLOW_TRACKING_URI", local)
    logger: Logger = MLFlowLogger(DISTRIBUTION, run_name=run_id, tracking_uri=address)
    return logger


def _wandb(run_id: str, directory: Path) -> Logger:
    from pytorch_lightning.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", DISTRIBUTION)
    logger: Logger = WandbLogger(name=run_id, project=project, save_dir=directory)
    return logger


_LOGGERS: Mapping[str, Callable[[str, Path], Logger]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
