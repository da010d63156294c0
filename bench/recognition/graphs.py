"""Training steps of a network replayed as CUDA graphs, where launching their kernels takes longer than running them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.nets.recogniser import InputNormalisation

#: Forward passes of one batch size after which it is captured: the input normalisation has measured its batches by then
#: and does the same in every step, and a training of fewer steps would not win back what a capture costs.
BEFORE_CAPTURE = InputNormalisation.measured
#: Batch sizes captured at most: those of an epoch that is split evenly. A rarer one runs as ever.
MOST_SIZES = 2

#: From a network and a batch, (N, ...), to a function that does with batches of this shape what the network does.
Capture = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


class _Whole(nn.Module):
    """A network's own forward pass as a module, which a graph can be made of and the network stay as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Tensor) -> Tensor:
        result: Tensor = type(self.network).forward(self.network, batch)
        return result


class CudaCapture:
    """Captures forward and backward pass with :func:`torch.cuda.make_graphed_callables`.

    Graphs of one network share their memory: a step has ended before another one begins.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, network: nn.Module, batch: Tensor) -> Callable[[Tensor], Tensor]:
        # The captured pass is tried first, for which buffers (batch norm) and dropout's stream are not to move.
        before = [buffer.clone() for buffer in network.buffers()]
        autocast = (
            torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
            if torch.is_autocast_enabled("cuda")
            else nullcontext()
        )
        try:
            with torch.random.fork_rng(devices=[batch.device]), autocast:
                # Weights in bfloat16 are made within the graph, from the weights of the step.
                graphed: Any = torch.cuda.make_graphed_callables(
                    _Whole(network), (batch.detach().clone(),), allow_unused_input=True, pool=self._pool
                )
        finally:
            with torch.no_grad():
                for buffer, value in zip(network.buffers(), before, strict=True):
                    buffer.copy_(value)
        return cast(Callable[[Tensor], Tensor], graphed)


class _Replayed:
    """The forward pass of a network in training, captured for the batch sizes that come again and again.

    Attributes:
        captured: shape of a batch -> what replays it.
    """

    def __init__(self, network: nn.Module, capture: Capture, before: int) -> None:
        self._network, self._capture, self._before = network, capture, before
        self._passes: Counter[tuple[int, ...]] = Counter()
        self.captured: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}
        self._works = True

    def __call__(self, batch: Tensor) -> Tensor:
        network = self._network
        if network.training and torch.is_grad_enabled() and not batch.requires_grad:
            shape = tuple(batch.shape)
            if (graph := self.captured.get(shape)) is not None:
                return graph(batch)
            self._passes[shape] += 1
            if self._works and self._passes[shape] > self._before and len(self.captured) < MOST_SIZES:
                try:
                    self.captured[shape] = graph = self._capture(network, batch)
                except (RuntimeError, AssertionError) as error:
                    # What a graph cannot hold (a synchronisation, too little memory for a copy) runs as ever.
                    self._works = False
                    logging.getLogger(__name__).debug("training steps run without CUDA graphs: %s", error)
                else:
                    return graph(batch)
        result: Tensor = type(network).forward(network, batch)
        return result


@contextmanager
def replayed(
    network: nn.Module,
    device: torch.device,
    processes: int = 1,
    *,
    capture: Capture | None = None,
    before: int = BEFORE_CAPTURE,
) -> Iterator[None]:
    """Within the block, training passes of ``network`` on a CUDA device are replayed once a batch size has come often.

    A replay launches a step's hundreds of kernels at once; what it computes is what they computed, in the same order.
    Parameters, their gradients and buffers stay the tensors that they are, and checkpoints know nothing of it. Of other
    devices, of several processes (whose gradients are exchanged between the kernels), in evaluation and for sizes that
    come seldom the network runs as ever, and where a capture fails.

    Args:
        network: takes one tensor (N, ...) and gives one; nothing in its training pass may depend on more than the
            tensors it holds once it has run ``before`` times.
        device: where it is trained.
        processes: that train together.
        capture: what makes a graph; None for :class:`CudaCapture`.
        before: passes of a batch size that come before its capture.
    """
    if capture is None:
        if device.type != "cuda" or processes > 1:
            yield
            return
        capture = CudaCapture()
    network.__dict__["forward"] = _Replayed(network, capture, before)  # in front of the class's own
    try:
        yield
    finally:
        del network.__dict__["forward"]
