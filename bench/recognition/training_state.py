"""An unfinished training on disk: all that its next epoch, or step, depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric

from bench.errors import BenchError, DataError
from bench.recognition.checkpoint import load_tensors, save_tensors
from bench.recognition.history import History
from bench.recognition.learner import Learner, processes_of

T = TypeVar("T")

#: Least seconds between two saves within an epoch. What takes long to write is written more seldom.
SAVE_SECONDS = 60.0
#: Share of the time that saving within an epoch may take.
SAVE_SHARE = 0.05


class TrainingState:
    """Saves and resumes a training: weights, momentum, loss scale and history.

    ``training.safetensors`` is written last, by the first process, and names the place: whoever is killed before leaves
    the previous state complete.

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
        self._device = fabric.device
        self._complete = ""
        self._saved, self._took = time.perf_counter(), 0.0

    def due(self) -> bool:
        """Whether it is time to save within an epoch; every process calls it and is told the same."""
        waited = time.perf_counter() - self._saved
        due = torch.tensor(float(waited >= max(SAVE_SECONDS, self._took / SAVE_SHARE)), device=self._device)
        return bool(self._processes.maximum(due))

    def save(self, history: History, reached: Mapping[str, Any] | None = None) -> None:
        """Write the state after an epoch, or within one; every process calls it.

        Args:
            history: so far.
            reached: what the batches have to know to go on within the epoch; None after its last one.

        Raises:
            BenchError: a file cannot be written.
        """
        began, first = time.perf_counter(), self._processes.rank == 0
        details = {
            "training": self._identity,
            **history.state_dict(within=reached is not None),
            "loss_scale": self._precision.state_dict(),
        }
        if reached is not None:
            details["reached"] = dict(reached)
        tag = _tag(details)
        # What a killed attempt at this place left, perhaps in another number of processes, must not mix with ours.
        self._together(lambda: self._learner.forget_more(self.folder, self._complete) if first else None)
        self._together(lambda: self._learner.save_more(self.folder, tag))
        self._together(lambda: save_tensors(self.file, self._learner.tensors(), details) if first else None)
        if first:
            self._learner.forget_more(self.folder, tag)
        self._complete, self._saved = tag, time.perf_counter()
        self._took = self._saved - began

    def resume(self, history: History) -> dict[str, Any] | None:
        """Load what is there, if anything; every process calls it.

        Returns:
            What :meth:`save` was told of the place within an epoch, or None.

        Raises:
            DataError: it is damaged or of another training.
        """
        return self._together(lambda: self._load(history))

    def _load(self, history: History) -> dict[str, Any] | None:
        if not self.file.is_file():
            return None
        tensors, details = load_tensors(self.file)
        if details.get("training") != self._identity:
            raise DataError(
                f"{self.file} belongs to a training with other options, data or seed; delete it or choose another "
                "folder"
            )
        try:
            self._learner.load_tensors(tensors)
            self._complete = _tag(details)
            self._learner.load_more(self.folder, self._complete)
            if details["loss_scale"]:
                self._precision.load_state_dict(details["loss_scale"])
            history.load_state_dict(details)
            return dict(details["reached"]) if "reached" in details else None
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"checkpoint {self.file} is damaged: {error}; delete it to start again") from error

    def _together(self, action: Callable[[], T]) -> T:
        """Do it in every process; if one fails, all do, and none waits for the others."""
        failure: BenchError | None = None
        try:
            result = action()
        except BenchError as error:
            failure = error
        problem = self._processes.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if problem is not None:
            raise BenchError(problem)
        return result


def _tag(details: Mapping[str, Any]) -> str:
    """What this place is called, in the names of files: finished epochs, and batches of the one under way."""
    epochs = len(details["losses"])
    return f"{epochs}-{details['reached']['position']}" if "reached" in details else f"{epochs}"
