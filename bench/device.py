"""Chooses device and precision, through Lightning Fabric, for one process or for several that train together."""

from __future__ import annotations

import logging
import re
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from bench.errors import UsageError
from bench.launch import Launch
from bench.recognition.options import Precision, resolve_precision

#: How long a process waits for another one within a training step before it takes it for lost.
PATIENCE = timedelta(minutes=10)


def make_fabric(device: str, precision: str, launch: Launch | None = None) -> Fabric:
    """A single-device Fabric.

    Args:
        device: ``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto`` or a Fabric precision such as ``32-true``, ``bf16-mixed``, ``16-mixed``.
        launch: of several processes, each takes the device of its number on its machine.

    Raises:
        UsageError: an unknown device, or one that is not here.
    """
    kind, number = _choose(device, launch or Launch())
    devices: int | list[int] = 1 if number is None else [number]
    return Fabric(accelerator=kind, devices=devices, precision=_precision(precision, kind, number))


def make_shared_fabric(device: str, precision: str, launch: Launch, patience: timedelta = PATIENCE) -> Fabric:
    """A Fabric for data-parallel training in the processes of ``launch``, launched: gloo on the CPU, NCCL on CUDA.

    Args:
        device, precision: as for :func:`make_fabric`.
        launch: this process and the others; each calls it.
        patience: how long one waits for another before it takes it for lost.

    Raises:
        UsageError: a device that several processes cannot share, or one that is not here.
    """
    kind, number = _choose(device, launch)
    if kind == "mps":
        raise UsageError("several processes need --device cpu or cuda: MPS is one device")
    fabric = Fabric(
        accelerator=kind,
        devices=launch.local_size,
        num_nodes=launch.size // launch.local_size,
        strategy=DDPStrategy(timeout=patience),
        precision=_precision(precision, kind, number),
    )
    fabric.launch()
    return fabric


def _choose(device: str, launch: Launch) -> tuple[str, int | None]:
    """Kind of device, and the number of a CUDA one."""
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
        return kind, None
    if match[2] and launch.size > 1:
        raise UsageError(
            f"--device {device} is one device: under torchrun use --device cuda, each process takes its own"
        )
    number = int(match[2] or launch.local_rank)
    if number >= torch.cuda.device_count():
        raise UsageError(f"no device cuda:{number} here: there are {torch.cuda.device_count()}")
    return kind, number


def _precision(precision: str, kind: str, number: int | None) -> Precision:
    # Fabric announces the precision on stderr; the manifest has it.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return resolve_precision(precision, torch.device(kind) if number is None else torch.device(kind, number))
