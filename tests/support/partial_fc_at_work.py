"""What the processes of the Partial FC tests do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.recognition.partial_fc import PartialFC, load_centres, save_centres
from bench.recognition.processes import LostProcess, Processes, noticing_lost_processes

CLASSES, DIMENSIONS, COUNT, STEPS = 23, 8, 13, 3
SGD = {"learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.05}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            5 * torch.randn(COUNT, DIMENSIONS, generator=generator).double(),
            torch.randint(0, CLASSES, (COUNT,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def start() -> Tensor:
    return torch.randn(CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(2)).double()


def make(processes: Processes | None, options: dict[str, float]) -> PartialFC:
    head = PartialFC(DIMENSIONS, CLASSES, **{"scale": 16.0, "margin": 0.3, **options}, processes=processes).double()  # type: ignore[arg-type]
    head.weight.copy_(start()[head.owned.start : head.owned.stop])
    return head


def train(processes: Processes, cases: list[dict[str, float]]) -> list[list[dict[str, Any]]]:
    """For each case and step: all that the head computed, of this process's part."""
    return [_train(make(processes, options)) for options in cases]


def _train(head: PartialFC) -> list[dict[str, Any]]:
    processes, seen = head.processes, []
    for embeddings, labels in batches():
        mine = slice(processes.rank, None, processes.size)  # of different sizes
        part = embeddings[mine].clone().requires_grad_()
        loss, hits = head(part, labels[mine])
        loss.backward()
        assert head.gradient is not None
        computed = {
            "loss": loss.detach(),
            "hits": hits,
            "rows": mine,
            "to_embeddings": part.grad,
            "sampled": head.sampled + head.owned.start,
            "gradient": head.gradient.clone(),
        }
        head.update(**SGD)
        seen.append(
            computed | {"weight": head.weight.clone(), "momentum": head.momentum.clone(), "overfull": head.overfull}
        )
    return seen


def refuse_labels(processes: Processes) -> str:
    """A label that is wrong in the last process only."""
    labels = torch.tensor([0, CLASSES if processes.rank == processes.size - 1 else 1])
    try:
        make(processes, {})(torch.randn(2, DIMENSIONS), labels)
    except ValueError as error:
        return str(error)
    return "accepted"


def store(processes: Processes, folder: Path) -> None:
    head = make(processes, {})
    head.momentum.copy_(2 * head.weight)
    save_centres(head, folder)
    processes.wait()


def read(processes: Processes, folder: Path) -> bool | str:
    expected, head = make(processes, {}).weight, make(processes, {})
    head.weight.zero_()
    try:
        load_centres(head, folder)
    except BenchError as error:
        return str(error)
    return torch.equal(head.weight, expected) and torch.equal(head.momentum, 2 * expected)


def lose_one(processes: Processes, silently: bool) -> tuple[str, float]:
    """The last process ends, or sleeps on, in the middle of a step."""
    head = make(processes, {})
    embeddings, labels = batches()[0]
    head(embeddings, labels)
    if processes.rank == processes.size - 1:
        if not silently:
            os._exit(1)
        time.sleep(3.5)
        os._exit(1)
    began = time.monotonic()
    try:
        with noticing_lost_processes(processes):
            head(embeddings, labels)
    except LostProcess as error:
        return str(error), time.monotonic() - began
    return "nothing noticed", 0.0
