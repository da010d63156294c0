"""What the baseline of this project's own CI sees, simulated from its raw scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bench.gate.baseline import read_baseline
from bench.gate.comparison import change
from bench.metrics.bootstrap import draw_identities
from bench.results import PROTOCOL_VERSION

#: Rises that a change of the code must not hide, in each figure alone.
SHIFTS = {
    "recovery.ssim": 0.06,
    "recovery.identity.cosine": 0.15,
    "recovery.identity.type1_tar": 0.2,
    "recovery.identity.type2_tar": 0.2,
    "recovery.identity.rank1": 0.2,
}
RUNS = 1000


@pytest.fixture(scope="module")
def baseline():
    path = Path(__file__).parents[3] / ".ci" / "privacy-baseline.json"
    if not path.is_file():
        pytest.skip("no checkout: the baseline is not here")
    baseline = read_baseline(path)
    if baseline.protocol != PROTOCOL_VERSION:
        pytest.skip(f"the baseline is of protocol {baseline.protocol}: make it anew, as CONTRIBUTING.md says")
    return baseline


def passing(baseline, cell, name, shift, *, paired):
    """How often runs of other people (of the same, if ``paired``) pass that leak more by ``shift``."""
    expected, run = cell.figures[name].of(paired=paired), cell.runs[0]
    scores, others = run.figures[name], [run] if paired else cell.runs
    if paired:  # the same people, trained anew
        now = run.model_copy(update={"figures": {name: scores.model_copy(update={"sha256": "0"})}})
        drawn = np.zeros(RUNS)
    else:
        now = run.model_copy(update={"seed": -1, "people": [f"other {person}" for person in run.people]})
        weights = draw_identities(len(run.people), torch.Generator().manual_seed(0), RUNS).numpy()
        counts = weights * np.array(scores.counts)
        drawn = counts @ np.array([mean or 0.0 for mean in scores.means]) / counts.sum(1) - scores.value
    changed = change(name, now, others, expected.between(paired=paired), rate=expected.rate)
    spread = math.sqrt(expected.between(paired=paired).value * (1 + 1 / len(others)))
    harm = shift + drawn + spread * np.random.default_rng(0).standard_normal(RUNS)
    return (stats.t.sf((expected.excluded - harm) / changed.se, changed.df) <= baseline.alpha_pass).mean()


@pytest.mark.parametrize("name", SHIFTS)
def test_harm_is_found_and_nothing_else(baseline, name):
    """CI runs a seed of the baseline: in every cell that can leak so much more, that is found nine times in ten."""
    with_room = 0
    for cell in baseline.cells:
        if name in cell.figures:
            assert passing(baseline, cell, name, 0.0, paired=True) >= 0.99, cell.key.label
            assert passing(baseline, cell, name, 0.0, paired=False) >= 0.99, cell.key.label
            if 1 - cell.figures[name].value >= SHIFTS[name]:
                with_room += 1
                assert passing(baseline, cell, name, SHIFTS[name], paired=True) <= 0.1, cell.key.label
    assert with_room
