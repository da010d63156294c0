"""Runs cells: in this process, or each in a spawned one, so that one that is killed takes no other with it.

No executor of :mod:`concurrent.futures`: its pool is broken as a whole by one worker that dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import ValidationError
from rich.console import Console

from bench.errors import in_words, one_line
from bench.results import PROTOCOL_VERSION, RunResult, read_result
from bench.run.config import RunConfig
from bench.run.launch import end_process, forget_peak, obey_parent, start_process
from bench.run.store import run_id

if TYPE_CHECKING:
    from bench.sweep.cells import Cell

#: Runs a cell, leaves it in the run store and returns its result. Must be importable by name: workers pickle it.
Runner = Callable[[RunConfig], RunResult]

#: How processes are made; :func:`~bench.run.launch.start_process`.
START: Literal["spawn"] = "spawn"

#: Seconds that a worker gets to end by itself: to write down that it was cancelled, or to exit after its work.
GRACE = 15.0

#: Exit code of a process that was told to end.
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class CellEnd:
    """How a cell ended, once.

    Attributes:
        result: of a successful one.
        error: of another one, in one line.
        lost: whether its process or machine was lost, so that another start may do better.
        seconds: that it took; None where it could not say.
    """

    result: RunResult | None = None
    error: str | None = None
    lost: bool = False
    seconds: float | None = None


class Workers(Protocol):
    """What runs cells: this process, a pool of processes, a cluster."""

    @property
    def slots(self) -> int:
        """How many cells may run at the same time, at least 1; it may change."""

    def start(self, cell: Cell) -> None:
        """Start a cell."""

    def wait(self) -> list[tuple[Cell, CellEnd]]:
        """The cells that have ended, after waiting for one; none if ``slots`` should be looked at again."""

    def stop(self) -> None:
        """End what still runs, and wait until it has."""


def run_pipeline(config: RunConfig, console: Console | None = None) -> RunResult:
    """The :data:`Runner` of real sweeps; progress goes to ``console``."""
    import torch

    from bench.run.pipeline import Pipeline

    # A result's peak memory is that of its own cell, also where several run in one process. Where the peak cannot be
    # reset (macOS, some containers) the figure is an upper bound.
    forget_peak()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    return Pipeline(config, console=console or Console(quiet=True)).run()


def run_cell(runner: Runner, config: RunConfig) -> CellEnd:
    """Run a cell; whatever it raises but an interruption is how it ended."""
    result, error, began = None, None, time.monotonic()
    try:
        result = runner(config)
    except Exception as raised:
        # The run's events.jsonl has the traceback.
        error = one_line(in_words(raised))
    return CellEnd(result, error, seconds=round(time.monotonic() - began, 3))


def use_threads(count: int) -> None:
    """Let torch compute with so many in this process, which for this need not import it."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def finished(config: RunConfig) -> RunResult | None:
    """The result of a cell that the run store holds already, under today's protocol; None where there is none."""
    try:
        result = read_result(config.out / run_id(config))
    except (OSError, ValidationError):
        return None
    return result if result.status == "success" and result.protocol == PROTOCOL_VERSION else None


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
        """Take the cell."""
        self._cells.append(cell)

    def wait(self) -> list[tuple[Cell, CellEnd]]:
        """Run the cell."""
        cell = self._cells.pop()
        return [(cell, run_cell(self._runner, cell.config))]

    def stop(self) -> None:
        """Nothing runs beside."""


def work(runner: Runner, config: RunConfig, threads: int, sender: Connection) -> None:
    """Run the cell with so many processor threads, and send its end."""
    obey_parent()
    use_threads(threads)
    try:
        sender.send(run_cell(runner, config))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


class Pool:
    """Up to ``jobs`` processes at a time, each with so many processor ``threads``."""

    def __init__(self, runner: Runner, jobs: int, threads: int) -> None:
        self.slots = jobs
        self._runner = runner
        self._threads = threads
        self._workers: dict[Connection, tuple[Cell, BaseProcess]] = {}

    def start(self, cell: Cell) -> None:
        """Spawn a process for the cell."""
        process, receiver = start_process(work, self._runner, cell.config, self._threads, method=START)
        self._workers[receiver] = (cell, process)

    def wait(self) -> list[tuple[Cell, CellEnd]]:
        """The cells whose processes have answered or died."""
        ended = []
        for receiver in wait(list(self._workers)):
            assert isinstance(receiver, Connection)
            cell, process = self._workers[receiver]
            end = None
            with contextlib.suppress(EOFError, OSError):
                end = receiver.recv()
            end_process(process, GRACE)
            del self._workers[receiver]
            receiver.close()
            ended.append((cell, end or CellEnd(error=_obituary(process.exitcode), lost=True)))
        return ended

    def stop(self) -> None:
        """Ask every process to end, and end those that do not."""
        for _, process in self._workers.values():
            process.terminate()
        for receiver, (_, process) in self._workers.items():
            end_process(process, GRACE)
            receiver.close()
        self._workers.clear()


def _obituary(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return "the worker process was killed (SIGKILL): out of memory? fewer --jobs or a smaller batch_size need less"
    if exitcode is not None and exitcode < 0:
        return f"the worker process died of {signal.Signals(-exitcode).name}"
    return f"the worker process ended with exit code {exitcode} and without a result"
