"""Runs that are killed, interrupted or doubled end with the figures of one that was left alone; so many more times:

``python tests/support/killing.py --kills 20``. They run in a process of their own, which has no threads to fork.
"""

import json
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
    # Killed at random, and at random writes, four times.
    assert [len(kill["hit"]) for kill in told["killed"]] == [4]
    assert [kill["same"] for kill in told["killed"]] == [True]
    assert [kill["left"] for kill in told["killed"]] == [[]]
    # What ends a job, or Ctrl-C, leaves a result that says so, and the code of an interruption.
    assert told["interrupted"] == {"SIGTERM": [130, "cancelled", 0, True]}
    # A disk that fills up ends a run with its line, and with room it goes on.
    assert told["full"] == {"codes": [3, 3, 3, 0], "same": True, "left": []}
    # Two at once: the later waits, computes nothing, and finds the same; two attacks at once train no network twice.
    assert told["twice"] == {"codes": [0, 0], "made": [], "same": True}
    assert told["beside"]["codes"] == [0, 0]
    assert len(set(told["beside"]["made"])) == len(told["beside"]["made"]) > 0
