"""Chooses device and precision, through Lightning Fabric, for one process or for several that train together."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import UsageError
from bench.recognition.processes import LostProcess, Processes, noticing_lost_processes, processes_of
from bench.run.launch import FreeCores, Launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 faster than in float32.

    CUDA from Ampere on; processors with AVX512-BF16 or AMX. A processor that only emulates bfloat16 is slower in it
    than in float32, which is why oneDNN's own 'supported' is not asked.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Private in torch 2.6 to 2.x and without a public counterpart: absent simply means float32.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in probes)
    return False


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """The Fabric precision that ``precision`` stands for on ``device``.

    Raises:
        ValueError: an unknown name.
    """
    match precision:
        case "auto":
            return "bf16-mixed" if native_bfloat16(device) else "32-true"
        case "32-true" | "bf16-mixed" | "16-mixed":
            return precision
    raise ValueError(f"unknown precision {precision!r}: auto, 32-true, bf16-mixed or 16-mixed")


def use_free_cores(free: FreeCores, remembered: int | None = None) -> str | None:
    """Let torch use no more threads than cores were free since ``free`` was made; at least one.

    Threads that share an operation wait for the slowest of them, which may have to wait for a neighbour: two threads
    beside two busy processes on two cores take ten times as long as one. The number changes results by rounding, so a
    run that goes on takes the one that is ``remembered`` of it. Where ``OMP_NUM_THREADS`` sets it, nothing is changed.

    Returns:
        What to tell the person who waits, where some of the threads are left out.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    had, counted = torch.get_num_threads(), free.count()
    if remembered is not None:
        threads = min(had, remembered)
    else:
        threads = had if counted is None else min(had, max(1, round(counted)))
    torch.set_num_threads(threads)
    if threads == had:
        return None
    return f"{threads} of {had} threads, as other processes keep cores busy (OMP_NUM_THREADS sets their number)"


def synchronise(device: torch.device) -> None:
    """Wait until everything launched on ``device`` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


#: How long a process waits for another one within a training step before it takes it for lost.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Machine:
    """What one process computes on, and how.

    Attributes:
        device: CUDA's and MPS's are numbered.
        precision: as Fabric calls it.
    """

    device: torch.device
    precision: Precision

    @functools.cached_property
    def fabric(self) -> Fabric:
        """Lightning Fabric for it. Its import takes longer than torch's: plans do without."""
        devices: int | list[int] = 1 if self.device.index is None else [self.device.index]
        return _make(accelerator=self.device.type, devices=devices, precision=self.precision)


def choose_machine(device: str, precision: str, launch: Launch | None = None) -> Machine:
    """The device and the precision that these settings stand for here.

    Args:
        device: ``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: as for :func:`resolve_precision`.
        launch: of several processes, each takes the device of its number on its machine.

    Raises:
        UsageError: an unknown device, or one that is not here.
    """
    chosen = _choose(device, launch or Launch())
    return Machine(chosen, resolve_precision(precision, chosen))


def make_shared_fabric(device: str, precision: str, launch: Launch, patience: timedelta = PATIENCE) -> Fabric:
    """A Fabric for data-parallel training in the processes of ``launch``, launched: gloo on the CPU, NCCL on CUDA.

    Each of them calls it, and waits for another at most for ``patience`` before it takes it for lost.

    Raises:
        UsageError: a device that several processes cannot share, or one that is not here.
    """
    with _without_torchmetrics():
        from lightning_fabric.strategies.ddp import DDPStrategy  # as long an import as Fabric

    machine = choose_machine(device, precision, launch)
    if machine.device.type == "mps":
        raise UsageError("several processes need --device cpu or cuda: MPS is one device")
    fabric = _make(
        accelerator=machine.device.type,
        devices=launch.local_size,
        num_nodes=launch.size // launch.local_size,
        strategy=DDPStrategy(timeout=patience),
        precision=machine.precision,
    )
    fabric.launch()
    return fabric


@contextmanager
def _without_torchmetrics() -> Iterator[None]:
    """Within, torchmetrics cannot be imported, unless it is already.

    Fabric asks for its version by importing it, if it is installed, and with it matplotlib, torchvision and half of
    scipy: as long as torch, for a callback that nobody here uses.
    """
    if "torchmetrics" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules  # None stands for what is not installed
    modules["torchmetrics"] = None
    try:
        yield
    finally:
        del modules["torchmetrics"]


def _make(**settings: Any) -> Fabric:
    with _without_torchmetrics():
        from lightning_fabric import Fabric

    # Fabric announces the precision on stderr; the manifest has it.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return Fabric(**settings)


def _choose(device: str, launch: Launch) -> torch.device:
    match = re.fullmatch(r"(auto|cpu|mps|cuda)(?::(\d+))?", device)
    if match is None or (match[2] and match[1] != "cuda"):
        raise UsageError(f"unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps")
    kind = match[1]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here: use --device cpu or auto (bench doctor says what was found)")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("no MPS device here: use --device cpu or auto")
    if kind != "cuda":
        return torch.device(kind, 0) if kind == "mps" else torch.device(kind)
    if match[2] and launch.size > 1:
        raise UsageError(
            f"--device {device} is one device: under torchrun use --device cuda, each process takes its own"
        )
    number = int(match[2] or launch.local_rank)
    if number >= torch.cuda.device_count():
        raise UsageError(f"no device cuda:{number} here: there are {torch.cuda.device_count()}")
    return torch.device(kind, number)


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


class ConnectedProcesses:
    """The processes of ``launch``, connected. A process that ends is noticed by all others, whatever they wait for.

    Each of them makes one, with ``device`` and ``precision`` as for :func:`choose_machine`.
    """

    def __init__(self, device: str, precision: str, launch: Launch) -> None:
        with noticing_lost_processes(Processes(launch.rank, launch.size)):
            self.fabric = make_shared_fabric(device, precision, launch)
            self._control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def orders(self) -> Iterator[TrainingOrder]:
        """In the others: what the first one calls for, until it lets them go or ends (and says why itself)."""
        try:
            while (order := self.call(None)) is not None:
                yield order
        except LostProcess:
            return

    def meet(self) -> None:
        """Return when all have come here, however long one of them reads its data."""
        with noticing_lost_processes(processes_of(self.fabric)):
            dist.barrier(group=self._control)  # type: ignore[arg-type, unused-ignore]

    def call(self, order: TrainingOrder | None) -> TrainingOrder | None:
        """In the first process: tell the others what to do now, None to let them go. In them: what they are told."""
        message = [order]
        with noticing_lost_processes(processes_of(self.fabric)):
            dist.broadcast_object_list(message, src=0, group=self._control)  # type: ignore[arg-type, unused-ignore]
        return message[0]
