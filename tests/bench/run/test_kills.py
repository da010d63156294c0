"""Runs that are killed, interrupted or doubled end with the figures of one that was left alone; so many more times:

``python tests/support/killing.py --kills 20``. They run in a process of their own, which has no threads to fork.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).parents[2] / "support" / "killing.py"


@pytest.mark.slow
def test_a_run_that_was_disturbed_ends_as_if_it_had_not_been():
    done = subprocess.run(
        [sys.executable, KILLING, "--kills", "4", "--each", "4", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    # Every kill hit a process at work: four in one run, each later on its way and in another way.
    (killed,) = told["killed"]
    assert [kill["way"] for kill in killed["hit"]] == ["half", "between", "before", "after"]
    assert all(kill["code"] in (-signal.SIGKILL, -signal.SIGPROF) for kill in killed["hit"]), killed
    assert (killed["same"], killed["left"]) == (True, [])
    # What ends a job, or Ctrl-C, leaves a result that says so, and the code of an interruption.
    assert told["interrupted"] == {"SIGTERM": [130, "cancelled", 0, True]}
    # A disk that fills up ends a run with its line, and with room it goes on.
    assert told["full"] == {"codes": [3, 3, 3, 0], "same": True, "left": []}
    # Two at once: the later waits, computes nothing, and finds the same; where the first is killed it goes on.
    assert told["twice"] == {"codes": [0, 0], "made": [], "same": True, "left": []}
    assert told["outlived"] == {"codes": [-signal.SIGPROF, 0], "same": True, "left": []}
    # Two attacks at once train no network twice.
    beside = told["beside"]
    assert (beside["codes"], beside["same"], beside["left"]) == ([0, 0], True, [])
    assert len(set(beside["made"])) == len(beside["made"]) > 0
