"""A run in several processes: the first does everything, and calls the others when there is a recogniser to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bench.device import make_shared_fabric
from bench.launch import Launch
from bench.recognition.learner import processes_of
from bench.recognition.processes import LostProcess, Processes, noticing_lost_processes

#: How long the others wait for the first to call them: it may run attacks for days between two trainings.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    """What the first process tells the others to train with it.

    Attributes:
        defense, options: name and resolved options of the defence.
        state: its fitted values.
        role: ``provider`` or ``evaluator``.
        folder: where the unfinished training lies.
    """

    defense: str
    options: Mapping[str, Any]
    state: Mapping[str, Tensor]
    role: str
    folder: Path


class Team:
    """The processes of ``launch``, connected. A process that ends is noticed by all others, whatever they wait for.

    Args:
        device, precision: as for :func:`bench.device.make_fabric`.
        launch: this process and the others; each makes a team.
    """

    def __init__(self, device: str, precision: str, launch: Launch) -> None:
        self.launch = launch
        with noticing_lost_processes(Processes(launch.rank, launch.size)):
            self.fabric = make_shared_fabric(device, precision, launch)
            self._control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def call(self, order: TrainingOrder | None) -> None:
        """In the first process: tell the others what to do now; None lets them go."""
        self._broadcast(order)

    def orders(self) -> Iterator[TrainingOrder]:
        """In the others: what the first one calls for, until it lets them go or ends (and says why itself)."""
        try:
            while (order := self._broadcast(None)) is not None:
                yield order
        except LostProcess:
            return

    def meet(self) -> None:
        """Return when all have come here, however long one of them reads its data."""
        with noticing_lost_processes(processes_of(self.fabric)):
            dist.barrier(group=self._control)  # type: ignore[arg-type, unused-ignore]

    def _broadcast(self, order: TrainingOrder | None) -> TrainingOrder | None:
        message = [order]
        with noticing_lost_processes(processes_of(self.fabric)):
            dist.broadcast_object_list(message, src=0, group=self._control)  # type: ignore[arg-type, unused-ignore]
        return message[0]
