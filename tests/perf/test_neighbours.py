"""What busy neighbours cost: stages of a run alone and beside them, in processes that take turns.

Run with ``pytest tests/perf/test_neighbours.py --benchmark-enable -s``; skipped where benchmarks are disabled. A
neighbour is a process at the lowest priority that never rests. The figures are ratios of times by the clock; on a
machine where others are busy already they say little, and the load is printed with them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

#: Neighbours for two cores, and times as long as alone that a stage may take beside them.
ALLOWED = {2: 2.5, 8: 6.0}
ROUNDS = 3

#: A stage in a process of its own, as `bench run` would start it; it prints how long the stage itself took.
STAGE = """
import sys, time
from bench.run.launch import FreeCores
free = FreeCores()
import torch
from bench.run.machines import choose_machine, use_free_cores
from bench.data.synthetic import SyntheticOptions, load_synthetic
from bench.plugins import make_defense
from bench.nets.recogniser import build_recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.training import train
time.sleep(0.5)
use_free_cores(free)
faces = load_synthetic(SyntheticOptions(identities=8, images_per_identity=8, image_size=64)).faces
started = time.perf_counter()
if sys.argv[1] == "render":
    load_synthetic(SyntheticOptions(identities=40, images_per_identity=8, image_size=64))
else:
    defense = make_defense("partialface", {}, "quick", 64)
    recogniser = build_recogniser("ir-tiny", defense.representation_shape, 64)
    options = TrainingOptions(epochs=1, batch_size=32, views=4, embedding_size=64)
    train(recogniser, faces, defense, options, fabric=choose_machine("cpu", "auto").fabric, seed=0)
print(time.perf_counter() - started)
"""


@contextmanager
def neighbours(count):
    """So many processes that keep a core busy at the lowest priority."""
    spin = [sys.executable, "-c", "import os\nos.nice(19)\nwhile True: pass"]
    running = [subprocess.Popen(spin) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(stage):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", STAGE, stage]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["render", "train"])
def test_a_stage_slows_down_in_proportion(benchmark, stage):
    if benchmark.disabled:
        pytest.skip("a timing; enable with --benchmark-enable")
    taken: dict[int, list[float]] = {count: [] for count in (0, *ALLOWED)}
    for _ in range(ROUNDS):
        for count, times in taken.items():
            with neighbours(count):
                times.append(seconds(stage))
    medians = {count: statistics.median(times) for count, times in taken.items()}
    ratios = {count: medians[count] / medians[0] for count in ALLOWED}
    benchmark.pedantic(seconds, (stage,), rounds=1)
    benchmark.extra_info.update(seconds=medians, ratios=ratios, load=os.getloadavg()[0])
    print(f"\n{stage}: {medians[0]:.1f} s alone; {', '.join(f'x {r:.1f} beside {n}' for n, r in ratios.items())}")
    for count, ratio in ratios.items():
        assert ratio <= ALLOWED[count]
