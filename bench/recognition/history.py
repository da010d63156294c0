"""What a training has behind it: losses and accuracies of its epochs, and the sums of the one under way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.recognition.processes import Processes

#: Called as ``report(done, total, **fields)`` in images; the harness turns it into a progress bar and a log.
Report = Callable[..., None]


def no_report(done: int, total: int, **fields: float) -> None:
    """A :data:`Report` for callers that want none."""


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
