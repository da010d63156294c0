"""What a process of the pool does: one cell, until it is done or told to end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from types import FrameType

from bench.config import RunConfig
from bench.sweep.attempt import Runner, attempt

#: Exit code of a process that was told to end.
INTERRUPTED = 130


def work(runner: Runner, config: RunConfig, sender: Connection, threads: int) -> None:
    """Run the cell with so many processor threads, and send its outcome.

    A terminal sends Ctrl-C to every process: this one leaves it to the first, which ends the others with SIGTERM. Two
    interruptions would break what the run writes down at the first.
    """
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        sender.send(attempt(runner, config))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """End with the sweep, however it ended: a later call must not find its cells still running."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
