"""An unfinished training on disk: all that its next epoch depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lightning_fabric import Fabric

from bench.errors import BenchError, DataError
from bench.recognition.checkpoint import load_tensors, save_tensors
from bench.recognition.learner import Learner, processes_of


class History(Protocol):
    """What a training has behind it."""

    losses: list[float]
    accuracies: list[float]
    seconds: float
    done: int


class TrainingState:
    """Saves and resumes a training: weights, momentum, loss scale and history.

    ``training.safetensors`` is written last, by the first process, and names the epoch: whoever is killed before leaves
    the previous epoch's state complete.

    Args:
        folder: where it lies, the same for all processes.
        identity: digest of everything that decides the course of the training.
        learner: recogniser, head and optimiser.
        fabric: precision and processes.
    """

    def __init__(self, folder: Path, identity: str, learner: Learner, fabric: Fabric) -> None:
        self.folder = folder
        self.file = folder / "training.safetensors"
        self._identity = identity
        self._learner = learner
        self._precision = fabric.strategy.precision
        self._processes = processes_of(fabric)

    def save(self, history: History) -> None:
        """Write the state after an epoch; every process calls it.

        Raises:
            BenchError: a file cannot be written.
        """
        epoch, first = len(history.losses), self._processes.rank == 0
        # What a killed attempt at this epoch left, perhaps in another number of processes, must not mix with ours.
        self._together(lambda: self._learner.forget_more(self.folder, epoch - 1) if first else None)
        self._together(lambda: self._learner.save_more(self.folder, epoch))
        details = {
            "training": self._identity,
            "losses": history.losses,
            "accuracies": history.accuracies,
            "seconds": history.seconds,
            "done": history.done,
            "loss_scale": self._precision.state_dict(),
        }
        self._together(lambda: save_tensors(self.file, self._learner.tensors(), details) if first else None)
        if first:
            self._learner.forget_more(self.folder, epoch)

    def resume(self, history: History) -> None:
        """Load what is there, if anything; every process calls it.

        Raises:
            DataError: it is damaged or of another training.
        """
        self._together(lambda: self._load(history))

    def _load(self, history: History) -> None:
        if not self.file.is_file():
            return
        tensors, details = load_tensors(self.file)
        if details.get("training") != self._identity:
            raise DataError(
                f"{self.file} belongs to a training with other options, data or seed; delete it or choose another "
                "folder"
            )
        try:
            self._learner.load_tensors(tensors)
            self._learner.load_more(self.folder, len(details["losses"]))
            if details["loss_scale"]:
                self._precision.load_state_dict(details["loss_scale"])
            history.losses = [float(value) for value in details["losses"]]
            history.accuracies = [float(value) for value in details["accuracies"]]
            history.seconds = float(details["seconds"])
            history.done = int(details["done"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"checkpoint {self.file} is damaged: {error}; delete it to start again") from error

    def _together(self, action: Callable[[], None]) -> None:
        """Do it in every process; if one fails, all do, and none waits for the others."""
        failure: BenchError | None = None
        try:
            action()
        except BenchError as error:
            failure = error
        problem = self._processes.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if problem is not None:
            raise BenchError(problem)
