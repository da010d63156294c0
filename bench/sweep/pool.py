"""Runs cells in spawned processes, a fresh one for each: one that is killed takes no other with it."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal

from bench.sweep.attempt import Outcome, Runner
from bench.sweep.cells import Cell
from bench.sweep.worker import work

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
