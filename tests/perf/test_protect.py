"""Throughput of ``protect`` against the textbook pipeline, both in one process.

Run with ``pytest tests/perf --benchmark-enable``; skipped where benchmarks are disabled.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.run.textbook import textbook
from defenses.partialface import PartialFace

BATCH = 64
REQUIRED_RATIO = 40


def _seconds(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


@pytest.fixture
def two_threads(set_threads):
    set_threads(2)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_protect_is_forty_times_faster_than_the_textbook(benchmark):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    defense = PartialFace(image_size=112)
    generator = torch.Generator().manual_seed(0)
    faces = torch.rand(BATCH, 3, 112, 112, generator=generator)
    state = defense.draw(BATCH, generator)
    channels = defense.kept_channels[
        torch.stack([defense.subset_table[s][defense.permutation_table[p]] for s, p in state.tolist()])
    ]

    def fast():
        return defense.protect(faces, generator, state=state).representation

    def slow():
        with torch.inference_mode():
            return textbook(faces, channels)

    torch.testing.assert_close(fast(), slow(), rtol=0, atol=0.05)  # the same work, and a warm-up of both
    # Alternating rounds, and the fastest of each: other load only ever adds time, and not to both alike.
    slow_times, fast_times = [], []
    for _ in range(3):
        slow_times += _seconds(slow, 1)
        fast_times += _seconds(fast, 5)
    benchmark.pedantic(fast, rounds=10, warmup_rounds=1)
    ratio = min(slow_times) / min(fast_times)
    benchmark.extra_info.update(
        ratio=round(ratio, 1),
        textbook_seconds=min(slow_times),
        protect_seconds=min(fast_times),
        images_per_second=BATCH / min(fast_times),
        threads=torch.get_num_threads(),
    )
    print(f"\nprotect is {ratio:.1f} x the textbook pipeline ({BATCH / min(fast_times):.0f} images/s)")
    assert ratio >= REQUIRED_RATIO


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [64, 112])
def test_protect_batch(benchmark, size):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    defense = PartialFace(image_size=size)
    generator = torch.Generator().manual_seed(0)
    faces = torch.rand(BATCH, 3, size, size, generator=generator)
    result = benchmark(lambda: defense.protect(faces, generator))
    assert result.representation.shape == (BATCH, 27, size, size)
