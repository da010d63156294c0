"""One sweep from end to end: what is to be run, where, and what became of it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.markup import escape

from bench.errors import UsageError
from bench.run.launch import Launch
from bench.sweep.cells import Cell, SweepState, check, expand
from bench.sweep.journal import Journal, opened, survey
from bench.sweep.options import SweepRequest
from bench.sweep.ray import RayWorkers
from bench.sweep.workers import Pool, Runner, ThisProcess, Workers, finished, run_pipeline


def run_cells(
    cells: Sequence[Cell], journal: Journal, workers: Workers, *, retries: int, tell: Callable[[Cell], None]
) -> None:
    """Run ``cells``; one that fails does not stop the others. The workers are stopped in the end, whatever happens.

    A cell whose worker was lost is started again, ``retries`` times at most; one that failed by itself would fail
    again. ``tell`` is called after each change of a cell.

    Raises:
        KeyboardInterrupt: the person, or the system, wants it to end; cells that were running are pending again.
    """
    waiting, running = list(cells), dict[str, tuple[Cell, float]]()
    starts = Counter[str]()
    try:
        while waiting or running:
            while waiting and len(running) < workers.slots:
                cell = _next(waiting, [cell for cell, _ in running.values()])
                waiting.remove(cell)
                running[cell.run_id] = cell, time.monotonic()
                starts[cell.run_id] += 1
                journal.started(cell)
                tell(cell)
                workers.start(cell)
            for cell, end in workers.wait():
                _, began = running.pop(cell.run_id)
                if end.lost:
                    # It may have been lost after the last file was written.
                    seconds = round(time.monotonic() - began, 3)
                    end = dataclasses.replace(end, result=finished(cell.config), seconds=seconds)
                if end.result is None and end.lost and starts[cell.run_id] <= retries:
                    waiting.append(cell)
                    journal.put_back(cell, end.error)
                else:
                    journal.ended(cell, end)
                tell(cell)
    finally:
        workers.stop()
        for cell, _ in running.values():
            journal.put_back(cell)


def _next(waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell:
    """The first cell whose recogniser nobody is training right now: two of one group would wait for each other."""
    groups = Counter(cell.group for cell in running)
    return min(waiting, key=lambda cell: groups[cell.group])


class Sweep:
    """Runs the cells of a request that the run store does not hold yet; progress goes to ``console``.

    ``runner`` runs one cell instead of the pipeline.

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
        device, ray = configs[0].device, self.options.engine == "ray"
        if ray and device.startswith("cuda:"):
            raise UsageError(
                f"--device {device} is one device: with --engine ray use --device cuda, Ray gives each cell its own"
            )
        asked = self.options.gpus_per_cell
        self._gpus = float(device == "cuda") if asked is None else asked
        self.cells = check(configs, here=not ray)
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
                run_cells(
                    left, journal, workers, retries=self.options.retries, tell=lambda cell: self._tell(journal, cell)
                )
            return journal.state

    def _workers(self, journal: Journal, jobs: int) -> Workers:
        options, runner = self.options, self._runner or run_pipeline
        threads = options.cpus_per_cell
        if options.engine == "ray":
            return RayWorkers(runner, journal.lock, address=options.address, cpus=threads or 1, gpus=self._gpus)
        if jobs > 1:
            return Pool(runner, jobs, threads or max(1, torch.get_num_threads() // jobs))
        if threads:
            torch.set_num_threads(threads)
        return ThisProcess(self._runner or functools.partial(run_pipeline, console=self._console))

    def _tell(self, journal: Journal, cell: Cell) -> None:
        if not self._console.is_terminal:
            return
        state, now = journal.state, journal.of(cell)
        done = len(state.cells) - state.count("pending", "running")
        error = f" ({now.error})" if now.error else ""
        self._console.print(f"{done}/{len(state.cells)} {escape(now.name)}: {now.status}{escape(error)}")
