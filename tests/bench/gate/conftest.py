"""A baseline of four seeds, and a judge for single runs."""

import itertools

import pytest
from gate_world import make_run

from bench.gate.baseline import make_baseline
from bench.gate.gate import gate
from bench.run.archive import load_run, load_runs


@pytest.fixture(scope="session")
def seeds(tmp_path_factory):
    """The directories of four runs of one cell."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / f"seed{seed}", seed=seed) for seed in range(4)]


@pytest.fixture(scope="session")
def baseline(seeds):
    return make_baseline(load_runs(seeds))


@pytest.fixture
def judged(baseline, tmp_path):
    """Make a run and judge it: the verdict on its cell."""
    numbers = itertools.count()

    def judge(ignore_options=False, **made):
        run = load_run(make_run(tmp_path / f"run{next(numbers)}", **made))
        [verdict] = gate(baseline, [run], name="b.json", ignore_options=ignore_options, whole=False).cells
        return verdict

    return judge
