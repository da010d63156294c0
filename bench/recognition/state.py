"""An unfinished training on disk: all that its next epoch, or step, depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bench.errors import BenchError, DataError
from bench.files import replacing
from bench.nets.checkpoints import FORMAT, load_tensors
from bench.nets.recogniser import Recogniser
from bench.progress import Report
from bench.recognition.processes import Processes, processes_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch

    from bench.recognition.learner import Learner  # imports it


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write named tensors, from any device, to a safetensors file with this ``header``, beside and renamed.

    Raises:
        BenchError: the file cannot be written.
    """
    # A channels_last weight is stored in logical order: loading copies it into whatever layout the module has.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, metadata=None if header is None else dict(header))
    except (OSError, SafetensorError) as error:
        raise BenchError(f"cannot write {path}: {error}; free some space or choose another --out") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], details: Mapping[str, Any]) -> None:
    """Write tensors and a JSON object to one file: :func:`write_tensors`.

    Raises:
        BenchError: the file cannot be written.
    """
    write_tensors(path, tensors, {"format": FORMAT, "details": json.dumps(details)})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors: names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def resumed(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives, kept in a file for a run that goes on where one was killed.

    It is made anew where the file is not what was written, with a warning.

    Raises:
        BenchError: the file cannot be written.
    """
    if path.is_file():
        with contextlib.suppress(DataError):
            tensors, details = load_tensors(path)
            if details.get("sha256") == digest(tensors):
                return tensors
        logging.getLogger("bench").warning("bench: %s is not what was written: made anew", path)
    made = make()
    save_tensors(path, made, {"sha256": digest(made)})
    return load_tensors(path)[0]


def save_recogniser(recogniser: Recogniser, path: Path, details: Mapping[str, Any] | None = None) -> None:
    """Write a recogniser's weights and what it was built from.

    Args:
        details: a JSON object to keep along (losses, options, ...).

    Raises:
        BenchError: the file cannot be written.
    """
    save_tensors(
        path, recogniser.state_dict(), {"spec": recogniser.spec.model_dump(mode="json"), "details": dict(details or {})}
    )


class History:
    """Sums of the epoch under way, its finiteness check, and the history of those behind it.

    Args:
        total: images of all epochs.
        report: is told a few times a second at most.
        processes: whose sums these are.

    Attributes:
        losses, accuracies: means of the finished epochs.
        seconds: spent on the finished epochs, and before a training went on within one.
        done: images trained on.
    """

    def __init__(self, total: int, report: Report, processes: Processes) -> None:
        self.total = total
        self.report = report
        self.processes = processes
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.seconds = 0.0
        self.done = 0
        self._left = (0.0, 0.0, 0)
        self._reported = -math.inf

    def start_epoch(self, epoch: int) -> None:
        """Start summing, from what was left off within the epoch if this is the one."""
        self._epoch = epoch
        (self._loss, self._hits, self._count), self._left = self._left, (0.0, 0.0, 0)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._started = time.perf_counter()

    def add(self, loss: Tensor, hits: Tensor, count: int) -> None:
        """Note one step over ``count`` images; both tensors stay on the device until the next look."""
        self._pending.append((loss * len(hits), hits.sum()))
        self._count += count
        self.done += count

    def look(self, step: int, steps: int, rate: float) -> None:
        """Fetch the losses noted since the last look, add those of the other processes, check and report them.

        Raises:
            BenchError: one of them is not finite, in any process.
        """
        losses = self.processes.sum(torch.stack([loss for loss, _ in self._pending]).double()).cpu()
        finite = torch.isfinite(losses)
        if not finite.all():
            culprit = step - len(losses) + 1 + int((~finite).int().argmax())
            raise BenchError(
                f"training diverged: the loss is not finite at epoch {self._epoch + 1}, step {culprit + 1} of {steps} "
                f"(learning rate {rate:.3g}); try a lower learning_rate, a longer warmup_epochs, "
                "clip_gradient_norm=5 or precision=32-true"
            )
        self._loss += float(losses.sum())
        self._hits += float(self.processes.sum(torch.stack([hits for _, hits in self._pending]).sum()))
        self._pending.clear()
        now = time.perf_counter()
        if now - self._reported >= 0.25 or step + 1 == steps:
            self._reported = now
            self.report(
                self.done,
                self.total,
                epoch=self._epoch + 1,
                loss=self._loss / self._count,
                accuracy=self._hits / self._count,
                learning_rate=rate,
                images_per_second=self.done / max(self.seconds + now - self._started, 1e-9),
            )

    def state_dict(self, *, within: bool) -> dict[str, Any]:
        """What a training that goes on has to know: JSON.

        Args:
            within: whether the epoch under way is part of it; then nothing may have been added since the last look.
        """
        state: dict[str, Any] = {"losses": self.losses, "accuracies": self.accuracies, "done": self.done}
        if not within:
            return state | {"seconds": self.seconds}
        sums = {"loss": self._loss, "hits": self._hits, "count": self._count}
        return state | {"seconds": self.seconds + time.perf_counter() - self._started, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        self.losses = [float(value) for value in state["losses"]]
        self.accuracies = [float(value) for value in state["accuracies"]]
        self.seconds, self.done = float(state["seconds"]), int(state["done"])
        if "sums" in state:
            sums = state["sums"]
            self._left = (float(sums["loss"]), float(sums["hits"]), int(sums["count"]))

    def finish_epoch(self) -> None:
        """Turn the sums into the epoch's means."""
        self.losses.append(self._loss / self._count)
        self.accuracies.append(self._hits / self._count)
        self.seconds += time.perf_counter() - self._started


T = TypeVar("T")

#: Least seconds between two saves within an epoch. What takes long to write is written more seldom.
SAVE_SECONDS = 60.0
#: Share of the time that saving within an epoch may take.
SAVE_SHARE = 0.05


class TrainingState:
    """Saves and resumes a training: weights, momentum, loss scale and history.

    ``training.safetensors`` is written last, by the first process, and names the point reached: whoever is killed
    before leaves the previous state complete.

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
        # What a training killed at this point left, perhaps in another number of processes, must not mix with ours.
        self._together(lambda: self._learner.drop_shards(self.folder, but=self._complete) if first else None)
        self._together(lambda: self._learner.save_shard(self.folder, tag))
        self._together(lambda: save_tensors(self.file, self._learner.tensors(), details) if first else None)
        if first:
            self._learner.drop_shards(self.folder, but=tag)
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
            self._learner.load_shard(self.folder, self._complete)
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
