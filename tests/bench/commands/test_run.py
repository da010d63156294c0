"""``bench run`` on a terminal."""

import os
import pty
import subprocess
import sys

import pytest


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_shows_a_bar_while_torch_is_imported(tmp_path, rank):
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "bench", "run", "--defense", "none", "--attack", "linear", "--dry-run"]
    launched = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": "2",
    }
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"} | launched,
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # on Linux, that its other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown
    assert (b"load torch" in shown) == (rank == "0")
