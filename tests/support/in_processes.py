"""Runs a function in several connected processes and brings back what each returned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.recognition.processes import Processes


def in_processes(
    size: int, folder: Path, work: Callable[..., Any], *arguments: Any, patience: float = 60, lost: tuple[int, ...] = ()
) -> list[Any]:
    """``work(processes, *arguments)`` in each of ``size`` gloo processes; what they return, by rank.

    Args:
        folder: empty or not there yet.
        work: importable, from a module of tests/support.
        patience: seconds until a process takes another for lost.
        lost: ranks that end without a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(
        _member, (size, folder, work, arguments, patience), nprocs=size, start_method="forkserver", join=False
    )
    assert context is not None
    for process in context.processes:
        process.join(120)
    present = [rank for rank in range(size) if rank not in lost]
    if not all((folder / f"{rank}.pt").is_file() for rank in present):
        context.join(1)  # raises what went wrong
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in present]


def _member(rank: int, size: int, folder: Path, work: Callable[..., Any], arguments: Any, patience: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-point",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience),
    )
    result = work(Processes(rank, size), *arguments)
    torch.save(result, folder / f"{rank}.pt.part")
    (folder / f"{rank}.pt.part").rename(folder / f"{rank}.pt")
    dist.destroy_process_group()
