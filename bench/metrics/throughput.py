"""How fast: images per second of a batch and latency of a single face, synchronised with the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import DataError

_MIN_REPEATS = 5
_MAX_REPEATS = 1000


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Median and quartiles of repeated measurements; ``q1 <= median <= q3``."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one operation costs.

    Attributes:
        images_per_second: at the given batch.
        latency_ms: of one face alone, in milliseconds.
        batch: faces per call behind ``images_per_second``.
        repeats: calls timed at that batch.
        dtype: of the input, e.g. ``float32``.
        device: of the input, e.g. ``cpu`` or ``cuda:0``.
    """

    images_per_second: Quartiles
    latency_ms: Quartiles
    batch: int
    repeats: int
    dtype: str
    device: str


def measure(
    operation: Callable[[Tensor], object],
    batch: Tensor,
    *,
    warmup: int = 2,
    min_time: float = 1.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Throughput:
    """Time ``operation`` on ``batch`` and on its first element alone.

    Calls are repeated for at least ``min_time`` seconds and at least five times (at most a thousand), each timed by
    itself between two synchronisations, so that a kernel still running counts for the call that launched it.

    Args:
        operation: what is measured; it runs without gradients.
        batch: (N, ...), N > 0, on the device to measure.
        warmup: calls that are not timed, for each of the two sizes.
        min_time: seconds to spend on each of the two sizes.
        clock: monotonic time in nanoseconds.

    Raises:
        DataError: an empty batch.

    Example:
        >>> import torch
        >>> result = measure(lambda x: x.square(), torch.zeros(8, 3), min_time=0.01)
        >>> result.batch, result.dtype, result.device
        (8, 'float32', 'cpu')
    """
    if not len(batch):
        raise DataError("throughput needs at least one face")
    whole = _times(operation, batch, warmup, min_time, clock)
    single = _times(operation, batch[:1], warmup, min_time, clock)
    return Throughput(
        images_per_second=_quartiles(len(batch) / whole),
        latency_ms=_quartiles(single * 1e3),
        batch=len(batch),
        repeats=len(whole),
        dtype=str(batch.dtype).removeprefix("torch."),
        device=str(batch.device),
    )


def synchronise(device: torch.device) -> None:
    """Wait until everything launched on ``device`` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def _times(
    operation: Callable[[Tensor], object], batch: Tensor, warmup: int, min_time: float, clock: Callable[[], int]
) -> Tensor:
    """Seconds of each timed call, float64 (repeats,)."""
    for _ in range(warmup):
        operation(batch)
    synchronise(batch.device)
    times: list[int] = []
    while len(times) < _MIN_REPEATS or (sum(times) < min_time * 1e9 and len(times) < _MAX_REPEATS):
        start = clock()
        operation(batch)
        synchronise(batch.device)
        times.append(clock() - start)
    # A clock that did not tick between two readings would make the rate infinite.
    return torch.tensor(times, dtype=torch.float64).clamp_min(1) / 1e9


def _quartiles(samples: Tensor) -> Quartiles:
    q1, median, q3 = torch.quantile(samples, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Quartiles(median=median, q1=q1, q3=q3)
