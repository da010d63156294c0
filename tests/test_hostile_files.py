"""Damaged and hostile files: each reader refuses them in one clear line or reads them as they are.

None crashes, writes beside its target, takes seconds or fills the memory. Many more inputs than here have time for:
``python tests/support/hostile.py all --count 5000``.
"""

import pytest
from hostile import READERS, Trial

COUNT = 200


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS])
def test_no_input_does_harm(name, tmp_path):
    trial = Trial(name, tmp_path)
    faults = [fault for seed in range(COUNT) if (fault := trial.fault(seed)) is not None]
    assert not faults, "\n".join(faults)
    # Most are refused; but what lies in the cache is made anew, and a number may become another one.
    assert (trial.accepted < 0.9 * COUNT) is (name not in ("cache", "notes"))
