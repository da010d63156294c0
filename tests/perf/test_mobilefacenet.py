"""A training step of MobileFaceNet with this suite's layers and with torch's own, in turns, beside half its width.

Run with ``pytest tests/perf/test_mobilefacenet.py --benchmark-enable -s``; skipped where benchmarks are disabled. Times
are of the processor, in bfloat16 where it computes in it.
"""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

from bench.nets.recogniser import build_recogniser
from bench.recognition.learner import make_learner
from bench.recognition.options import TrainingOptions
from bench.recognition.training import build_head
from bench.run.machines import choose_machine

SHAPE, BATCH, PEOPLE, ROUNDS = (3, 64, 64), 64, 50, 8
TORCHS = "mobilefacenet of torch's layers"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_training_step_takes_less_than_with_torchs_layers(benchmark):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    options, fabric = TrainingOptions(embedding_size=256), choose_machine("cpu", "auto").fabric
    learners = {}
    for name in (TORCHS, "mobilefacenet", "mobilefacenet-tiny", "ir-tiny"):
        network = build_recogniser(name.partition(" ")[0], SHAPE, 256, image_size=64)
        for module, own in itertools.product(network.modules(), (torch.nn.PReLU, torch.nn.Conv2d)):
            if name == TORCHS and isinstance(module, own):
                module.__class__ = own
        learners[name] = make_learner(network, build_head(options, PEOPLE), options, fabric)
    drawn = torch.Generator().manual_seed(0)
    faces = torch.rand(BATCH, *SHAPE, generator=drawn)
    labels = torch.randint(PEOPLE, (BATCH,), generator=drawn)
    least = dict.fromkeys(learners, math.inf)
    for _, (name, learner) in itertools.product(range(ROUNDS), learners.items()):
        started = time.process_time()
        learner.step(faces, labels, rate=0.01, total=BATCH)
        least[name] = min(least[name], time.process_time() - started)
    benchmark.pedantic(
        learners["mobilefacenet-tiny"].step, args=(faces, labels), kwargs={"rate": 0.01, "total": BATCH}, rounds=1
    )
    benchmark.extra_info.update({name: BATCH / seconds for name, seconds in least.items()})
    print()
    for name, seconds in least.items():
        print(f"{name:32} {1e3 * seconds:6.0f} ms a step, {least[TORCHS] / seconds:4.1f} x torch's layers")
    assert least["mobilefacenet"] < least[TORCHS]
