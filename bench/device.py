"""Chooses device and precision, through Lightning Fabric."""

from __future__ import annotations

import logging
import re

import torch
from lightning_fabric import Fabric

from bench.errors import UsageError
from bench.recognition.options import resolve_precision


def make_fabric(device: str, precision: str) -> Fabric:
    """A single-device Fabric.

    Args:
        device: ``auto`` (CUDA, then MPS, then CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``auto`` or a Fabric precision such as ``32-true``, ``bf16-mixed``, ``16-mixed``.

    Raises:
        UsageError: an unknown device, or one that is not here.
    """
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
    devices: int | list[int] = 1
    if kind == "cuda":
        devices = [int(match[2] or 0)]
        if devices[0] >= torch.cuda.device_count():
            raise UsageError(f"no device cuda:{devices[0]} here: there are {torch.cuda.device_count()}")
    # It announces the precision on stderr; the manifest has it.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    resolved = resolve_precision(
        precision, torch.device(kind, devices[0]) if isinstance(devices, list) else torch.device(kind)
    )
    return Fabric(accelerator=kind, devices=devices, precision=resolved)
