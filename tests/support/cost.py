"""What a backbone costs, parameters, floating-point operations, throughput; and what memory an operation needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.nets.recogniser import build_recogniser
from bench.run.launch import forget_peak, peak_bytes


@dataclass(frozen=True, slots=True)
class BackboneCost:
    """The size and work of a recogniser.

    Attributes:
        parameters: learned values.
        flops: floating-point operations of one image's forward pass; a multiply-accumulate counts as two. Matrix
            products and convolutions only, as is usual: norms, activations and softmax are left out.
    """

    parameters: int
    flops: int


def backbone_cost(backbone: str, representation_shape: tuple[int, int, int], embedding_size: int = 512) -> BackboneCost:
    """Parameters and operations of a recogniser of representations (C, h, w); nothing is computed."""
    with torch.device("meta"):
        recogniser = build_recogniser(backbone, representation_shape, embedding_size).eval()
    network = recogniser.backbone.to("meta")  # timm's networks are built elsewhere
    counter = FlopCounterMode(display=False)
    # Plain attention, which the counter sees whole: fused kernels are counted on some devices and versions only.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.empty(1, *representation_shape, device="meta"))
    return BackboneCost(recogniser.parameter_count, counter.get_total_flops())


def images_per_second(module: nn.Module, batch: torch.Tensor, *, rounds: int = 5, training: bool = False) -> float:
    """Median throughput of a module on a batch (N, C, h, w), over ``rounds`` passes after one that is not timed.

    With ``training`` of forward and backward passes, else of inference; the module is left in that mode.
    """
    module.train(training)
    rates = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            output = module(batch)
            if training:
                output.square().sum().backward()
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        if number:
            rates.append(len(batch) / (time.perf_counter() - start))
    return statistics.median(rates)


def added_bytes(operation: Callable[[], object]) -> int | None:
    """Resident bytes at the peak of ``operation`` beyond those before it; None where the system does not tell (Linux).

    Freed memory goes back to the system first: else what is taken from it again would not count.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it
    if not forget_peak():
        return None
    before = peak_bytes() or 0
    operation()
    return (peak_bytes() or 0) - before
