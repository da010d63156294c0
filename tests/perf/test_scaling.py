"""How cost grows with work: processor time over sizes, and the exponent of the power law through it.

Run with ``pytest tests/perf/test_scaling.py --benchmark-enable -s``; skipped where benchmarks are disabled. Times are
processor times of one thread, the least of several calls: other load hardly changes them. An exponent of 1 is linear in
the number of faces, identities, interceptions, or pixels (the square of the side).
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from pictures import smooth

from bench.data.faces import FaceSet
from bench.data.splits import whole_identities
from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.images import ssim, to_float
from bench.plugins import make_defense
from bench.recognition.partial_fc import PartialFC

ROUNDS = 3
#: What noise of a fit may add to linear.
MOST = 1.15


pytestmark = pytest.mark.usefixtures("one_thread")


def protecting(side):
    defense, faces = make_defense("partialface", {}, "cpu", side), to_float(smooth(16, side))
    return side * side, lambda: defense.protect(faces, torch.Generator().manual_seed(0))


def similarity(side):
    first, second = to_float(smooth(16, side)), to_float(smooth(16, side, seed=1))
    return side * side, lambda: ssim(first, second)


def rendering(people):
    options = SyntheticOptions(identities=people, images_per_identity=8, image_size=32)
    return people, lambda: load_synthetic(options)


def interceptions(count):
    defense, faces = make_defense("partialface", {}, "cpu", 64), to_float(smooth(32, 64))
    generator = torch.Generator().manual_seed(0)

    def intercept():
        for _ in range(count):
            defense.protect(faces, generator)

    return count, intercept


def splitting(people):
    labels = torch.arange(people).repeat_interleave(4)
    # One pixel of one face, seen many times: what is split are the people.
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(labels), -1, -1, -1)
    faces = FaceSet(images, labels, tuple(f"person {i}" for i in range(people)))
    return people, lambda: whole_identities(faces, 2 * people, torch.Generator().manual_seed(0))


def centres(identities):
    head = PartialFC(64, identities, scale=32.0, margin=0.3, sample_rate=0.1)
    embeddings, labels = torch.randn(64, 64), torch.randint(identities, (64,))

    def step():
        loss, _ = head(embeddings.requires_grad_(), labels)
        loss.backward()
        head.update(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)

    return identities, step


CURVES = {
    "protect, side 56 to 224": (protecting, (56, 112, 224)),
    "SSIM, side 56 to 224": (similarity, (56, 112, 224)),
    "rendering, people": (rendering, (16, 32, 64)),
    "interceptions of a face, k 1 to 8": (interceptions, (1, 2, 4, 8)),
    "choosing half of the identities": (splitting, (1_000, 10_000, 100_000)),
    "a step of Partial FC, identities": (centres, (10_000, 100_000, 1_000_000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_nothing_grows_faster_than_its_work(benchmark, name):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    make, sizes = CURVES[name]
    work, taken = [], []
    for size in sizes:
        amount, operation = make(size)
        operation()
        times = []
        for _ in range(ROUNDS):
            started = time.process_time()
            operation()
            times.append(time.process_time() - started)
        work.append(amount)
        taken.append(min(times))
    exponent = float(np.polyfit(np.log(work), np.log(taken), 1)[0])
    benchmark.pedantic(operation, rounds=1)
    benchmark.extra_info.update(work=work, processor_seconds=taken, exponent=exponent)
    print(f"\n{name}: {', '.join(f'{1e3 * t:.3g}' for t in taken)} ms, exponent {exponent:.2f}")
    assert exponent <= MOST
