"""Step time and memory of Partial FC against the full head, each in a process of its own on one thread of this machine.

Run with ``pytest tests/perf/test_partial_fc.py --benchmark-enable``; skipped where benchmarks are disabled. A million
identities under the full head need 16 GB of memory.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
from head_at_work import DIMENSIONS, time_head

BATCH, RATE = 128, 0.1
FASTER, LEANER = 5.0, 0.35


def measure(identities, sample_rate, batch=BATCH, rounds=3):
    # A fresh process: its peak memory is nobody else's, and nothing is warm.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(time_head, identities, sample_rate, batch, rounds).result()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("identities", [100_000, 1_000_000])
def test_partial_fc_is_faster_and_leaner_than_the_full_head(benchmark, identities):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    if psutil.virtual_memory().available < 16_000 * identities:
        pytest.skip(f"the full head over {identities} identities needs more memory than is free")
    full = measure(identities, None, rounds=2)
    partial = benchmark.pedantic(measure, (identities, RATE), rounds=1)
    faster, leaner = full["seconds"] / partial["seconds"], partial["bytes"] / full["bytes"]
    benchmark.extra_info.update(
        identities=identities,
        full_seconds=full["seconds"],
        partial_seconds=partial["seconds"],
        full_bytes=full["bytes"],
        partial_bytes=partial["bytes"],
        times_faster=round(faster, 2),
        share_of_memory=round(leaner, 3),
    )
    print(f"\n{identities:,} identities, r = {RATE}: {faster:.1f} x faster, {leaner:.2f} of the memory")
    if identities == 1_000_000:
        assert faster >= FASTER
        assert leaner <= LEANER


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_larger_numbers_by_calculation(benchmark):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    # A step costs n (a + b B): a for what is done per centre, b for its product with each of the B embeddings.
    shards = benchmark.pedantic(lambda: [measure(250_000, RATE, batch) for batch in (BATCH, 8 * BATCH)], rounds=1)
    table = [projected(identities, count, shards) for identities in (10_000_000, 29_000_000) for count in (8, 64)]
    benchmark.extra_info["calculated_not_measured"] = table
    for row in table:
        print("\ncalculated, not measured:", row)
    # The calculation must give back what it was made from.
    again = projected(250_000, 1, shards)
    assert math.isclose(again["seconds"], shards[0]["seconds"], rel_tol=1e-6)
    assert again["bytes"] <= 1.5 * shards[0]["bytes"]


def projected(identities, processes, shards):
    """Seconds of a step and bytes in each of ``processes``, calculated from a measured shard.

    It leaves out the backbone and all communication: every process multiplies the embeddings of all, ``BATCH`` each.

    Args:
        shards: :func:`time_head` of 250,000 centres at a batch of ``BATCH`` and of 8 ``BATCH``.
    """
    measured, wide = 250_000, (shards[1]["seconds"] - shards[0]["seconds"]) / (7 * BATCH)
    fixed = shards[0]["seconds"] - wide * BATCH
    centres = math.ceil(identities / processes)
    batch = BATCH * processes
    # Centre and momentum of all; value and gradient of the sampled; two matrices of a batch's cosines.
    stored = 2 * centres + 2 * RATE * centres
    return {
        "identities": identities,
        "processes": processes,
        "batch": batch,
        "seconds": centres / measured * (fixed + wide * batch),
        "bytes": int(4 * (stored * DIMENSIONS + 2 * batch * RATE * centres)),
    }
