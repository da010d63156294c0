"""Damaged and hostile files: each reader refuses them in one clear line or reads them as they are.

None crashes, writes beside its target, takes seconds or fills the memory. Many more inputs than here have time for:
``python tests/support/hostile.py all --count 5000``.
"""

import pytest
from hostile import READERS, Trial

#: Of run folders over 200 in all: a page takes some tenths of a second, and reads what the others do.
COUNTS = {"run": 105, "gate": 70, "leaderboard": 20, "report": 6, "view": 20}


@pytest.mark.parametrize("name", [*READERS])
def test_no_input_does_harm(name, tmp_path):
    trial, count = Trial(name, tmp_path), COUNTS.get(name, 200)
    faults = [fault for seed in range(count) if (fault := trial.fault(seed)) is not None]
    assert not faults, "\n".join(faults)
    # Most are refused; but a stage of the cache is made anew, and a number may become another one.
    assert (trial.accepted < 0.9 * count) is (name != "cache")
