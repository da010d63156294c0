"""Runs cells in spawned processes, a fresh one for each: one that is killed takes no other with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Literal

from bench.run.config import RunConfig
from bench.sweep.attempt import Outcome, Runner, attempt
from bench.sweep.cells import Cell


class ThisProcess:
    """One cell at a time, here: what is loaded stays loaded, and progress bars show.

    A cell that takes the process down takes the sweep down; the same command goes on after it. A pool does not have
    this weakness.
    """

    slots = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._cells: list[Cell] = []

    def start(self, cell: Cell) -> None:
        """Take the cell; :meth:`wait` runs it."""
        self._cells.append(cell)

    def wait(self) -> list[tuple[Cell, Outcome]]:
        """Run it."""
        cell = self._cells.pop()
        return [(cell, attempt(self._runner, cell.config))]

    def stop(self) -> None:
        """Nothing runs beside."""


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


#: How processes are made: anew, since neither threads nor accelerators survive a fork.
START: Literal["spawn"] = "spawn"

#: Seconds that a process gets to end by itself: to write down that it was cancelled, or to exit after its work.
GRACE = 15.0


@dataclass(frozen=True, slots=True)
class _Worker:
    cell: Cell
    process: BaseProcess
    began: float


class Pool:
    """Up to ``jobs`` processes at a time, each with its share of the processors.

    Args:
        runner: runs a cell.
        jobs: processes at a time.
        threads: processor threads of each.
    """

    def __init__(self, runner: Runner, jobs: int, threads: int) -> None:
        self.slots = jobs
        self._runner = runner
        self._threads = threads
        self._workers: dict[Connection, _Worker] = {}

    def start(self, cell: Cell) -> None:
        """Spawn a process for the cell."""
        context = multiprocessing.get_context(START)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(self._runner, cell.config, sender, self._threads))
        with _without_interrupts():
            process.start()
        sender.close()
        self._workers[receiver] = _Worker(cell, process, time.monotonic())

    def wait(self) -> list[tuple[Cell, Outcome]]:
        """The cells whose processes have answered or died."""
        ended = []
        for receiver in wait(list(self._workers)):
            assert isinstance(receiver, Connection)
            worker = self._workers[receiver]
            try:
                outcome = receiver.recv()
            except (EOFError, OSError):
                _end(worker.process)
                seconds = round(time.monotonic() - worker.began, 3)
                outcome = Outcome(error=_obituary(worker.process.exitcode), lost=True, seconds=seconds)
            _end(worker.process)
            del self._workers[receiver]
            receiver.close()
            ended.append((worker.cell, outcome))
        return ended

    def stop(self) -> None:
        """Ask every process to end, and end those that do not."""
        for worker in self._workers.values():
            worker.process.terminate()
        for receiver, worker in self._workers.items():
            _end(worker.process)
            receiver.close()
        self._workers.clear()


def _end(process: BaseProcess) -> None:
    """Wait for a process that should be ending."""
    process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()


def _obituary(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return "the worker process was killed (SIGKILL): out of memory? fewer --jobs or a smaller batch_size need less"
    if exitcode is not None and exitcode < 0:
        return f"the worker process died of {signal.Signals(-exitcode).name}"
    return f"the worker process ended with exit code {exitcode} and without a result"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started here, which could not deal with it yet; here it only comes later."""
    resource_tracker.ensure_running()  # started with the first process, it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
