"""One sweep from end to end: what is to be run, where, and what became of it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from rich.console import Console
from rich.markup import escape

from bench.errors import UsageError
from bench.run.launch import Launch
from bench.sweep.cells import Cell, SweepState, check, expand
from bench.sweep.journal import Journal, opened, survey
from bench.sweep.options import SweepOptions, SweepRequest
from bench.sweep.ray import RayWorkers
from bench.sweep.workers import CellEnd, Pool, Runner, ThisProcess, finished, run_pipeline


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


def run_cells(
    cells: Sequence[Cell], journal: Journal, workers: Workers, *, retries: int, tell: Callable[[Cell], None]
) -> None:
    """Run ``cells``; one that fails does not stop the others.

    Args:
        cells: what is left to do.
        journal: is told of everything.
        workers: where the cells run; stopped in the end, whatever happens.
        retries: starts after the first of a cell whose worker was lost; one that failed by itself would fail again.
        tell: called after each change of a cell.

    Raises:
        KeyboardInterrupt: the person, or the system, wants it to end; cells that were running are pending again.
    """
    waiting, running = list(cells), dict[str, Cell]()
    attempts = Counter[str]()
    try:
        while waiting or running:
            while waiting and len(running) < workers.slots:
                cell = _next(waiting, list(running.values()))
                waiting.remove(cell)
                running[cell.run_id] = cell
                attempts[cell.run_id] += 1
                journal.started(cell)
                tell(cell)
                workers.start(cell)
            for cell, end in workers.wait():
                del running[cell.run_id]
                if end.lost:
                    # It may have been lost after the last file was written.
                    end = CellEnd(finished(cell.config), end.error, lost=True, seconds=end.seconds)
                if end.result is None and end.lost and attempts[cell.run_id] <= retries:
                    waiting.append(cell)
                    journal.put_back(cell, end.error)
                else:
                    journal.ended(cell, end)
                tell(cell)
    finally:
        workers.stop()
        for cell in running.values():
            journal.put_back(cell)


def _next(waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell:
    """The first cell whose recogniser nobody is training right now: two of one group would wait for each other."""
    groups = Counter(cell.group for cell in running)
    return min(waiting, key=lambda cell: groups[cell.group])


class Sweep:
    """Runs the cells of a request that the run store does not hold yet.

    Args:
        request: what was asked for.
        console: where progress goes.
        runner: runs one cell, instead of the pipeline.

    Raises:
        UsageError: an unknown name, an invalid option, or a grid of which no cell can be run.
        MissingError: a file that is not there.
    """

    def __init__(self, request: SweepRequest, *, console: Console, runner: Runner | None = None) -> None:
        if Launch.here().size > 1:
            raise UsageError("bench sweep starts its own processes: run it without torchrun")
        configs = expand(request)
        # What cells share comes from the cache in any case: no cell may take away what another one reads.
        self._again = not configs[0].resume
        configs = [config.model_copy(update={"resume": True}) for config in configs]
        self.options = request.options
        self._gpus = _gpus(self.options, configs[0].device)
        self.cells = check(configs, here=self.options.engine == "local")
        self._console = console
        self._runner = runner

    def plan(self) -> SweepState:
        """The cells, and which of them are done; nothing is computed or written."""
        return survey(self.cells, again=self._again)

    def run(self) -> SweepState:
        """Run what is left to do; cells that fail are recorded, and the sweep goes on.

        Raises:
            BenchError: the same sweep is running already, or the engine cannot start.
            KeyboardInterrupt: the sweep was interrupted; what was finished stays.
        """
        with opened(self.cells, again=self._again) as journal:
            left = [cell for cell in self.cells if journal.of(cell).status == "pending"]
            if left:
                workers = self._workers(journal, min(self.options.jobs, len(left)))
                run_cells(left, journal, workers, retries=self.options.retries, tell=self._tell(journal))
            return journal.state

    def _workers(self, journal: Journal, jobs: int) -> Workers:
        options, runner = self.options, self._runner or run_pipeline
        threads = options.cpus_per_cell
        if options.engine == "ray":
            return RayWorkers(runner, journal.directory, address=options.address, cpus=threads or 1, gpus=self._gpus)
        if jobs > 1:
            return Pool(runner, jobs, threads or max(1, torch.get_num_threads() // jobs))
        if threads:
            torch.set_num_threads(threads)
        return ThisProcess(self._runner or functools.partial(run_pipeline, console=self._console))

    def _tell(self, journal: Journal) -> Callable[[Cell], None]:
        def tell(cell: Cell) -> None:
            if not self._console.is_terminal:
                return
            state, now = journal.state, journal.of(cell)
            done = len(state.cells) - state.count("pending", "running")
            error = f" ({now.error})" if now.error else ""
            self._console.print(f"{done}/{len(state.cells)} {escape(now.name)}: {now.status}{escape(error)}")

        return tell


def _gpus(options: SweepOptions, device: str) -> float:
    """Accelerators that Ray gives to a cell."""
    if options.engine == "ray" and device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} is one device: with --engine ray use --device cuda, Ray gives each cell its own"
        )
    if options.gpus_per_cell is not None:
        return options.gpus_per_cell
    return 1.0 if device == "cuda" else 0.0
