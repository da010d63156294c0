"""Runs cells in this process, one after the other."""

from __future__ import annotations

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
