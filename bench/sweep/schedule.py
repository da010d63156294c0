"""Hands cells to workers until none is left, and writes down what becomes of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from bench.sweep.attempt import Outcome, finished
from bench.sweep.cells import Cell
from bench.sweep.journal import Journal


class Workers(Protocol):
    """What runs cells: this process, a pool of processes, a cluster."""

    @property
    def slots(self) -> int:
        """How many cells may run at the same time, at least 1; it may change."""

    def start(self, cell: Cell) -> None:
        """Begin an attempt at a cell."""

    def wait(self) -> list[tuple[Cell, Outcome]]:
        """The attempts that have ended, after waiting for one; none if ``slots`` should be looked at again."""

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
        retries: attempts after the first at a cell whose worker was lost; one that failed by itself would fail again.
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
            for cell, outcome in workers.wait():
                del running[cell.run_id]
                if outcome.lost:
                    # It may have been lost after the last file was written.
                    outcome = Outcome(finished(cell.config), outcome.error, lost=True, seconds=outcome.seconds)
                if outcome.result is None and outcome.lost and attempts[cell.run_id] <= retries:
                    waiting.append(cell)
                    journal.put_back(cell, outcome.error)
                else:
                    journal.ended(cell, outcome)
                tell(cell)
    finally:
        workers.stop()
        for cell in running.values():
            journal.put_back(cell)


def _next(waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell:
    """The first cell whose recogniser nobody is training right now: two of one group would wait for each other."""
    groups = Counter(cell.group for cell in running)
    return min(waiting, key=lambda cell: groups[cell.group])
