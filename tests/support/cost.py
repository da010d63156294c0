"""What a backbone costs: parameters, floating-point operations, throughput."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.nets.recogniser import build_recogniser


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
    """Parameters and operations of a recogniser; nothing is computed.

    Args:
        backbone: a name in :data:`bench.nets.backbones.BACKBONES`.
        representation_shape: (C, h, w) of its input.
        embedding_size: D.

    Raises:
        UsageError: an unknown backbone or sizes that cannot be.
    """
    with torch.device("meta"):
        recogniser = build_recogniser(backbone, representation_shape, embedding_size).eval()
    network = recogniser.backbone.to("meta")  # timm's networks are built elsewhere
    counter = FlopCounterMode(display=False)
    # Plain attention, which the counter sees whole: fused kernels are counted on some devices and versions only.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.empty(1, *representation_shape, device="meta"))
    return BackboneCost(recogniser.parameter_count, counter.get_total_flops())


def images_per_second(
    module: nn.Module, batch: torch.Tensor, *, rounds: int = 5, training: bool = False
) -> tuple[float, float, float]:
    """Median and quartiles of a module's throughput on a batch.

    Args:
        module: from ``batch`` to embeddings, on its device; left in the mode it is measured in.
        batch: (N, C, h, w).
        rounds: timed passes, after one that is not.
        training: measure forward and backward passes, instead of inference.

    Returns:
        Median, lower and upper quartile, in images per second.
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
    lower, median, upper = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return median, lower, upper


def throughput(
    backbone: str,
    representation_shape: tuple[int, int, int],
    *,
    batch: int = 32,
    rounds: int = 5,
    training: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[float, float, float]:
    """:func:`images_per_second` of a fresh recogniser, 512-dimensional, on noise."""
    recogniser = build_recogniser(backbone, representation_shape, 512).to(device)
    noise = torch.randn(batch, *representation_shape, generator=torch.Generator().manual_seed(0)).to(device)
    return images_per_second(recogniser, noise, rounds=rounds, training=training)
