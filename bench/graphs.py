"""What keeps a GPU busy in training: passes replayed as CUDA graphs, and batches made beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import first_line, memory_is_full

#: Calls alike after which a pass is captured: a recogniser's input normalisation has measured its batches by then and
#: does the same in every step, and a training of fewer steps would not win back what a capture costs.
BEFORE_CAPTURE = 64
#: Passes captured at most: an epoch that is split evenly has batches of two sizes. A rarer one runs as ever.
MOST_CAPTURED = 2

#: Gradients of a loss from tensors (None where there is none); returns what is to be known of it.
Passes = Callable[..., tuple[Tensor, ...]]
#: From passes and their inputs to a function that does with inputs of these shapes what the passes do.
Capture = Callable[[Passes, tuple[Any, ...]], Passes]


class Beside:
    """Makes batches on a stream of its own of a CUDA device, if ``device`` is one.

    Who makes them may wait for the device (checks of what a defence sends do), and need not wait for training steps
    that were launched before. What they are made of must not change in those steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What ``make`` returns, for the current stream; tensors in it may be used there as any others."""
        if self._stream is None:
            return make()
        with torch.cuda.stream(self._stream):
            made = make()
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for value in made:
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(current)  # or its memory would be given to the next batch while it is read
        return made


class CudaCapture:
    """Captures passes that leave gradients in ``parameters`` as CUDA graphs, which share their memory."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters, self._pool = list(parameters), torch.cuda.graph_pool_handle()

    def __call__(self, passes: Passes, inputs: tuple[Tensor | None, ...]) -> Passes:
        held = tuple(None if value is None else value.detach().clone() for value in inputs)
        for parameter in self._parameters:
            parameter.grad = None  # the graph has gradients of its own
        graph = torch.cuda.CUDAGraph()
        # What other threads do (loading batches) is none of its concern.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = passes(*held)
        gradients = [parameter.grad for parameter in self._parameters]

        def replay(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            for own, given in zip(held, inputs, strict=True):
                if own is not None and given is not None:
                    own.copy_(given)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return tuple(result.clone() for result in results)

        return replay


class Replayed:
    """Passes of a training on one CUDA device that are replayed once alike ones have come often.

    A replay launches the hundreds of kernels of a forward and backward pass at once; what it computes is what they
    computed, in the same order, from the values that inputs, parameters and buffers have now. Whatever else the passes
    depend on has to be told as a constant. Parameters and buffers stay the tensors that they are, and checkpoints know
    nothing of it. On other devices, for inputs that are no tensors there, for such as come seldom, and where a capture
    fails, the passes run as ever.

    Args:
        passes: clears the gradients of ``parameters`` and makes new ones; returns tensors without a gradient.
        parameters: that get gradients.
        device: where.
        whole: whether the passes are made in one piece now; what is cut for want of memory is not captured.
        compiled: a network whose passes are compiled before they are captured, which takes a minute and fuses what lies
            between convolutions; None for none.
        capture: what makes a graph; None for :class:`CudaCapture`.
        before: calls alike that come before a capture.

    Attributes:
        captured: shapes, types and constants of a call -> what replays it.
    """

    def __init__(
        self,
        passes: Passes,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        *,
        whole: Callable[[], bool] = lambda: True,
        compiled: nn.Module | None = None,
        capture: Capture | None = None,
        before: int = BEFORE_CAPTURE,
    ) -> None:
        self._passes, self._whole, self._compiled, self._before = passes, whole, compiled, before
        self._device, self._calls = device, Counter[Hashable]()
        self.captured: dict[Hashable, Passes] = {}
        if capture is None and device.type == "cuda":
            capture = CudaCapture(parameters)
        self._capture = capture

    def __call__(self, *inputs: Any, constants: Hashable = None) -> tuple[Tensor, ...]:
        """What the passes return, which is the caller's own."""
        if self._capture is None or not all(value is None or self._can_hold(value) for value in inputs):
            return self._passes(*inputs)
        alike = (constants, *(None if value is None else (value.shape, value.dtype) for value in inputs))
        if (replay := self.captured.get(alike)) is not None:
            return replay(*inputs)
        self._calls[alike] += 1
        often = self._calls[alike] - self._before
        if often <= 0 or len(self.captured) == MOST_CAPTURED or not self._whole():
            return self._passes(*inputs)
        if self._compiled is None:
            return self._captured(alike, inputs)
        with _compiled(self._compiled):
            if often > 1:
                return self._captured(alike, inputs)
            try:
                return self._passes(*inputs)  # compiles, which a capture could not
            except RuntimeError as error:
                if memory_is_full(error):
                    raise
                self._compiled = None
                warning = "bench: training goes on without torch.compile, which failed: %s"
                logging.getLogger("bench").warning(warning, first_line(error))
        return self._passes(*inputs)

    def _can_hold(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device.type and not value.requires_grad

    def _captured(self, alike: Hashable, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        assert self._capture is not None
        try:
            self.captured[alike] = replay = self._capture(self._passes, inputs)
        except (RuntimeError, AssertionError) as error:
            # What a graph cannot hold (a synchronisation, too little memory for a copy) runs as ever.
            self._capture = None
            logging.getLogger(__name__).debug("training steps run without CUDA graphs: %s", error)
            return self._passes(*inputs)
        return replay(*inputs)


@contextmanager
def _compiled(network: nn.Module) -> Iterator[None]:
    """Within, the network's forward pass is compiled, for each shape by itself."""
    before = network.__dict__.get("forward")
    network.__dict__["forward"] = torch.compile(type(network).forward.__get__(network), dynamic=False)
    try:
        yield
    finally:
        del network.__dict__["forward"]
        if before is not None:
            network.__dict__["forward"] = before
