"""The processes that train together: who holds what, and what they tell each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import BenchError

#: How the backends of torch.distributed say that somebody no longer answers.
_LOST = re.compile(r"gloo|nccl|socket|connection (closed|reset|refused)|broken pipe|timed? ?out|store", re.IGNORECASE)


class LostProcess(BenchError):
    """Another process ended, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Processes:
    """One of ``size`` processes; a single one needs no ``torch.distributed``.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> range:
        """The part of 0..count-1 that is this process's: contiguous, and sizes differ by at most one."""
        small, larger = divmod(count, self.size)
        start = self.rank * small + min(self.rank, larger)
        return range(start, start + small + (self.rank < larger))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes, in the order of their ranks, and where this one's lie.

        The processes may bring different numbers of rows. Where ``tensor`` needs a gradient, each process gets back the
        sum of what all processes have for its rows: the gradient of one loss whose parts lie on several processes.
        """
        if self.size == 1:
            return tensor, slice(0, len(tensor))
        counts = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        counts[self.rank] = len(tensor)
        sizes = self.sum(counts).tolist()
        start = sum(sizes[: self.rank])
        gathered: Tensor = _Gather.apply(tensor, self, sizes)
        return gathered, slice(start, start + len(tensor))

    def agree(self, problem: str | None) -> str | None:
        """The first problem that any process has, told to all of them, so that all give up and none waits."""
        if self.size == 1:
            return problem
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, problem)
        return next((found for found in problems if found is not None), None)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.agree(None)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=operation)
        return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes, sizes: list[int]) -> Tensor:
        ctx.processes, ctx.start, ctx.count = processes, sum(sizes[: processes.rank]), len(tensor)
        # Collectives move equal shapes only.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        total = ctx.processes.sum(gradients[0].clone(memory_format=torch.contiguous_format))
        return total[ctx.start : ctx.start + ctx.count], None, None


@contextmanager
def noticing_lost_processes(processes: Processes) -> Iterator[None]:
    """Turn a failed exchange within the block into one line that a person can act on.

    Raises:
        LostProcess: another process ended or did not answer in time.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if processes.size == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        reason = " ".join(str(error).split())
        raise LostProcess(
            f"process {processes.rank} of {processes.size} lost another one ({reason[:200]}); look at that one's "
            "output, then give the same command again: training goes on from where it was last stored"
        ) from error
