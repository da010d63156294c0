"""Streaming from disk against reading one image at a time, and the memory of a million images.

Run with ``pytest tests/perf/test_stream.py --benchmark-enable``; skipped where benchmarks are disabled.
"""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest
import torch
from big_records import small_jpeg, write_big_records
from open_source import open_source

from bench.data.decode import decode_image, workers
from bench.data.stream.loader import StreamLoader
from bench.data.stream.sampler import EpochOrder

REQUIRED_RATIO = 3.0
BATCH = 256


def one_at_a_time(source, rows, size):
    """What a reader does that takes images as it is asked for them: look up, parse, decode, stack."""
    for batch in np.split(rows, len(rows) // BATCH):
        images = [decode_image(source.encoded_image(row), size) for row in batch.tolist()]
        torch.stack(images), torch.from_numpy(source.labels[batch])


def streamed(source, order, batches, **options):
    loader = StreamLoader(source, order, **options)
    stream = iter(loader)
    for _ in range(batches):
        next(stream)
    stream.close()


def rate(images, work):
    """Images per second, by the clock and by the processor time of this process and its children."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return images / (time.perf_counter() - clock), images / (time.process_time() - processor)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("images", "size"), [(1_000_000, 16), (50_000, 112)])
def test_three_times_as_fast_as_one_at_a_time_in_constant_memory(benchmark, tmp_path, images, size):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    jpeg = small_jpeg(size)
    path = tmp_path / "train.rec"
    write_big_records(path, images, 50, jpeg)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    source = open_source("insightface", path, image_size=size)
    opened, index = time.perf_counter() - started, psutil.Process().memory_info().rss - before
    order = EpochOrder(images=images, batch_size=BATCH, seed=0)
    assert order.total == images

    batches = 60
    read = batches * BATCH
    ways = {
        "inline": {},
        "threads": {"workers": workers()},
        "processes": {"workers": workers(), "kind": "processes"},
    }
    rows = np.random.default_rng(0).permutation(images)[:read]
    best: dict[str, tuple[float, float]] = {}
    works = {"one at a time": lambda: one_at_a_time(source, rows, size)}
    works |= {way: lambda o=options: streamed(source, order, batches, **o) for way, options in ways.items()}
    # Alternating rounds, and the fastest of each: other load only ever adds time, and not to both alike.
    for _ in range(3):
        for way, work in works.items():
            rates = rate(read, work)
            best[way] = tuple(max(pair) for pair in zip(best.get(way, rates), rates, strict=True))
    slow = best.pop("one at a time")
    ratio = max(fast for fast, _ in best.values()) / slow[0]
    on_one_core = best["inline"][1] / slow[1]

    # Memory over an epoch's worth of windows: what is resident after the first tenth must not grow.
    loader, resident = StreamLoader(source, order, workers=workers()), []
    for number, _ in enumerate(loader, 1):
        if number % (order.steps // 10) == 0:
            resident.append(psutil.Process().memory_info().rss)
    growth = max(resident) - resident[0]
    benchmark.pedantic(lambda: streamed(source, order, batches, workers=workers()), rounds=1)
    benchmark.extra_info.update(
        images=images,
        size=size,
        jpeg_bytes=len(jpeg),
        file_bytes=path.stat().st_size,
        cores=workers(),
        ratio=round(ratio, 2),
        ratio_on_one_core=round(on_one_core, 2),
        one_at_a_time=round(slow[0]),
        images_per_second={way: round(fast) for way, (fast, _) in best.items()},
        per_processor_second={"one at a time": round(slow[1]), "inline": round(best["inline"][1])},
        seconds_to_open=round(opened, 2),
        index_bytes=index,
        growth_bytes=growth,
    )
    print(f"\n{images:,} images of {size} px: {benchmark.extra_info}")
    assert growth <= 16 * 2**20
    if size == 16:
        assert ratio >= REQUIRED_RATIO
