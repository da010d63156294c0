"""Normalisation statistics over the batches of all processes, so that several train as one would.

Without it every process normalises with the mean and variance of its own part of the batch, and the course of a
training depends on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.recognition.processes import Processes
from bench.recognition.recogniser import InputNormalisation


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
        x = input.float()
        mean, variance, count = _moments(x, self.processes)
        assert self.running_mean is not None
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
