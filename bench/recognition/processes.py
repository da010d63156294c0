"""The processes that train together: who holds what, and what they tell each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.errors import BenchError
from bench.nets.recogniser import InputNormalisation

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch

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
        return next((told for told in problems if told is not None), None)

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


class _Sum(torch.autograd.Function):
    """The sum over processes. Each one's loss depends on it, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.processes.sum(gradients[0].clone()), None


def _moments(x: Tensor, processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel of (N, C, ...) over all processes, (C,), and how many values each has."""
    dimensions = [d for d in range(x.ndim) if d != 1]
    count = processes.sum(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device))
    scale = count.to(x.dtype).reciprocal()
    mean: Tensor = _Sum.apply(x.sum(dimensions) * scale, processes)
    centred = x - mean.view(1, -1, *[1] * (x.ndim - 2))
    # In two passes: the mean of squares less the square of the mean would cancel.
    variance: Tensor = _Sum.apply(centred.square().sum(dimensions) * scale, processes)
    return mean, variance, count


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    processes: Processes

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        x = input.to(self.running_mean.dtype)
        mean, variance, count = _moments(x, self.processes)
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance * (count / (count - 1)).to(variance.dtype)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        shape = (1, -1, *[1] * (x.ndim - 2))
        factor = torch.rsqrt(variance + self.eps)
        factor = factor if self.weight is None else factor * self.weight
        normed = (x - mean.view(shape)) * factor.view(shape)
        return (normed if self.bias is None else normed + self.bias.view(shape)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape (N, C, ...): the layer this one stands in for has taken it."""


class _SharedInputNormalisation(InputNormalisation):
    processes: Processes

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, _ = _moments(x, self.processes)
        return mean, variance


@contextmanager
def shared_statistics(module: nn.Module, processes: Processes) -> Iterator[None]:
    """Within the block, batch norms and the input normalisation of ``module`` measure the batches of all processes.

    Exact up to rounding, whatever the number of images in each process. Names and values of the layers stay as they
    are: only what they compute changes, and changes back. CUDA devices use :class:`torch.nn.SyncBatchNorm`.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for layer in module.modules() if processes.size > 1 else ():
            kind: type[nn.Module] | None = None
            if isinstance(layer, InputNormalisation):
                kind = _SharedInputNormalisation
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                cuda = layer.running_mean is not None and layer.running_mean.is_cuda
                kind = nn.SyncBatchNorm if cuda else _SharedBatchNorm
            if kind is not None:
                changed.append((layer, type(layer)))
                layer.__class__ = kind
                layer.processes = processes  # type: ignore[assignment]
                layer.process_group = None  # type: ignore[assignment]  # of SyncBatchNorm: all processes
        yield
    finally:
        for layer, original in changed:
            layer.__class__ = original
            del layer.processes, layer.process_group


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Within the block, layers under :func:`shared_statistics` measure this process's batches, and exchange nothing."""
    layers = [layer for layer in module.modules() if isinstance(getattr(layer, "processes", None), Processes)]
    before: list[tuple[nn.Module, type[nn.Module], Any]] = [(layer, type(layer), layer.processes) for layer in layers]
    try:
        for layer in layers:
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__class__ = _SharedBatchNorm  # type: ignore[assignment]
            layer.processes = Processes()  # type: ignore[assignment]
        yield
    finally:
        for layer, kind, processes in before:
            layer.__class__, layer.processes = kind, processes


def processes_of(fabric: Fabric) -> Processes:
    """The processes among which a launched Fabric trains."""
    return Processes(fabric.global_rank, fabric.world_size)
