"""Throughput, timed with a clock that the test winds."""

from __future__ import annotations

import pytest
import torch

from bench.errors import DataError
from bench.run import speed as throughput
from bench.run.speed import measure


class Workshop:
    """An operation that takes a known time on a clock of its own: 2 ms a face, and more on every second call."""

    def __init__(self, milliseconds: float = 2.0) -> None:
        self.now = 0
        self.milliseconds = milliseconds
        self.sizes: list[int] = []

    def clock(self) -> int:
        return self.now

    def __call__(self, batch: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        self.sizes.append(len(batch))
        slow = 1.5 if len(self.sizes) % 2 else 1.0
        self.now += int(len(batch) * self.milliseconds * slow * 1e6)


def test_rates_and_latencies_come_from_each_call() -> None:
    work = Workshop()
    result = measure(work, torch.zeros(10, 3), warmup=1, max_time=0.1, clock=work.clock)
    # Calls 2 to 6 are timed: 20, 30, 20, 30, 20 ms for ten faces.
    assert work.sizes == [10] * 6 + [1] * (len(work.sizes) - 6)
    assert result.repeats == 5
    assert result.images_per_second.median == pytest.approx(500)
    assert result.images_per_second.q1 == pytest.approx(10 / 0.030)
    assert result.images_per_second.q3 == pytest.approx(500)
    assert result.latency_ms.q1 == pytest.approx(2.0)
    assert result.latency_ms.q3 == pytest.approx(3.0)
    assert result.latency_ms.q1 <= result.latency_ms.median <= result.latency_ms.q3
    assert (result.batch, result.dtype, result.device) == (10, "float32", "cpu")


def test_calls_that_differ_are_repeated_for_the_time_asked() -> None:
    work = Workshop()
    result = measure(work, torch.zeros(1, 3), warmup=0, max_time=1.0, clock=work.clock)
    assert 399 <= result.repeats <= 401  # 2.5 ms on average


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 0.1, 0.11), (0.02, 0.1, 0.11), (0.3, 0.3, 0.9)])
def test_calls_end_when_their_quartiles_are_known(spread: float, least: float, most: float) -> None:
    random = torch.Generator().manual_seed(0)
    now, times = 0, list[int]()

    def work(batch: torch.Tensor) -> None:
        nonlocal now
        times.append(int(1e6 * (2 + spread * torch.randn((), generator=random))))
        now += times[-1]

    result = measure(work, torch.zeros(1, 3), warmup=0, max_time=1.0, clock=lambda: now)
    timed = torch.tensor(times[: result.repeats], dtype=torch.float64)
    assert least <= float(timed.sum()) / 1e9 <= most
    # The quartiles of all times that could come: 2 ms, and .674 standard deviations from it.
    assert result.latency_ms.median == pytest.approx(2, rel=0.05)
    assert result.latency_ms.q3 == pytest.approx(2 + 0.674 * spread, rel=0.05)


def test_instant_calls_are_bounded_and_finite() -> None:
    work = Workshop(milliseconds=0)
    result = measure(work, torch.zeros(2, 3), clock=work.clock)
    assert result.repeats == 1000
    assert result.images_per_second.median == pytest.approx(2e9)


def test_the_device_is_synchronised_before_and_within_every_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Work launched but not finished is paid at the synchronisation, which the timing has to contain.
    work = Workshop()
    pending = [0]

    def launch(batch: torch.Tensor) -> None:
        pending[0] += 5_000_000

    def synchronise(device: torch.device) -> None:
        work.now += pending[0]
        pending[0] = 0

    monkeypatch.setattr(throughput, "synchronise", synchronise)
    result = measure(launch, torch.zeros(1, 3), warmup=3, max_time=0.0, clock=work.clock)
    assert result.latency_ms.q1 == result.latency_ms.q3 == pytest.approx(5.0)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(DataError, match="at least one face"):
        measure(lambda batch: batch, torch.zeros(0, 3))
