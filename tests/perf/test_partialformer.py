"""Parameters, operations and throughput of PartialFormer, each of its parts taken away, and plain Transformers.

Run with ``pytest tests/perf/test_partialformer.py --benchmark-enable -s``; skipped where benchmarks are disabled. The
figures stand in the benchmark's ``extra_info``; accuracy takes a training of each (``bench run --backbone NAME``).
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch
from cost import backbone_cost, images_per_second

from bench.nets.recogniser import build_recogniser

#: What PartialFace sends of a 64 px face.
SHAPE, BATCH = (27, 64, 64), 16
ROUNDS = 3
WHOLE = "partialformer-tiny"
NAMES = (
    WHOLE,
    f"{WHOLE}:no-small-nets",
    f"{WHOLE}:no-head-scaling",
    f"{WHOLE}:no-residual-attention",
    f"{WHOLE}:no-small-nets+no-head-scaling+no-residual-attention",
    f"{WHOLE}:channels",
    "vit-tiny",
    "vit-tiny-equal",
    "ir-tiny",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_cost(benchmark):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    batch = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    networks = {name: build_recogniser(name, SHAPE, 512) for name in NAMES}
    rates = {name: {"inference": 0.0, "training": 0.0} for name in NAMES}
    # Alternating rounds, and the fastest of each: other load only ever adds time, and not to all alike.
    for _, (name, network), mode in itertools.product(range(ROUNDS), networks.items(), ("inference", "training")):
        rate = images_per_second(network, batch, rounds=1, training=mode == "training")
        rates[name][mode] = max(rates[name][mode], rate)
    whole = networks[WHOLE].eval()
    with torch.inference_mode():
        benchmark.pedantic(whole, args=(batch,), rounds=3, warmup_rounds=1)
    print()
    for name in NAMES:
        cost = backbone_cost(name, SHAPE)
        row = {"parameters": cost.parameters, "flops": cost.flops, **rates[name]}
        benchmark.extra_info[name] = row
        print(
            f"{name:70} {cost.parameters / 1e6:5.2f} M {cost.flops / 1e6:5.0f} MFLOP "
            f"{row['inference']:6.0f} images/s, training {row['training']:5.0f}"
        )
    benchmark.extra_info.update(batch=BATCH, representation=SHAPE, threads=torch.get_num_threads())
    relative = rates[WHOLE]["inference"] / rates["vit-tiny"]["inference"]
    print(f"PartialFormer runs at {relative:.2f} x the images/s of a Transformer of its width and depth")
    # About 0.7 on an idle core. Its tensors of logits are twice a Transformer's, so that a busy memory slows it more.
    assert relative > 0.2


@pytest.mark.slow
def test_head_scaling_in_place_beats_moving_the_heads_last(benchmark):
    """Why :class:`HeadScaling` multiplies from the left, both ways in one process."""
    from bench.nets.partialformer import HeadScaling

    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    torch.manual_seed(0)
    scaling = HeadScaling(8, 16)
    logits = torch.randn(BATCH, 8, 64, 64, requires_grad=True)

    def moved():
        hidden = torch.relu(scaling.expand(logits.permute(0, 2, 3, 1)))
        return scaling.mix(hidden).permute(0, 3, 1, 2).softmax(-1)

    def in_place():
        return scaling(logits).softmax(-1)

    def seconds(function):
        start = time.perf_counter()
        function().sum().backward()
        return time.perf_counter() - start

    torch.testing.assert_close(in_place(), moved())  # the same, and a warm-up of both
    times = [(seconds(moved), seconds(in_place)) for _ in range(7)]
    benchmark.pedantic(in_place, rounds=5, warmup_rounds=1)
    ratio = statistics.median(slow / fast for slow, fast in times)
    benchmark.extra_info.update(ratio=round(ratio, 2), threads=torch.get_num_threads())
    print(f"\nhead scaling in place is {ratio:.2f} x as fast as with the heads moved last")
    assert ratio > 1
