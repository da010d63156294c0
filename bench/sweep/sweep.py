"""One sweep from end to end: what is to be run, where, and what became of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from rich.console import Console
from rich.markup import escape

from bench.errors import UsageError
from bench.launch import Launch
from bench.sweep.attempt import Runner, run_pipeline
from bench.sweep.cells import Cell, check, expand
from bench.sweep.journal import Journal, opened, survey
from bench.sweep.local import ThisProcess
from bench.sweep.options import SweepOptions, SweepRequest
from bench.sweep.pool import Pool
from bench.sweep.ray_engine import RayWorkers
from bench.sweep.schedule import Workers, run_cells
from bench.sweep.state import SweepState


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
            state, one = journal.state, journal.of(cell)
            done = state.count("success", "failed", "refused")
            error = f" ({one.error})" if one.error else ""
            self._console.print(f"{done}/{len(state.cells)} {escape(one.name)}: {one.status}{escape(error)}")

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
