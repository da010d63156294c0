"""The sweep's state in the run store: ``<out>/sweeps/<id>/sweep.json``, whole at any moment.

What is finished is known from the run store, not from here: a run directory with a successful result counts, whoever
made it. The journal adds what the run store cannot know: refusals, attempts, lost workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from bench.errors import BenchError, DataError
from bench.files import write_text
from bench.sweep.cells import Cell, CellState, SweepState, measured
from bench.sweep.workers import CellEnd, finished

ID_LENGTH = 8


def sweep_directory(cells: Sequence[Cell]) -> Path:
    """Where the state of a sweep lies: the same cells are the same sweep, in whatever order and on whatever engine."""
    digest = hashlib.sha256("\n".join(sorted(cell.run_id for cell in cells)).encode()).hexdigest()
    return cells[0].config.out / "sweeps" / digest[:ID_LENGTH]


def survey(cells: Sequence[Cell], *, again: bool = False) -> SweepState:
    """The state of a sweep before it goes on: what the run store holds is done, unless it is to be done ``again``.

    Raises:
        DataError: there is a journal, and it cannot be read.
    """
    directory = sweep_directory(cells)
    file = directory / "sweep.json"
    earlier: dict[str, CellState] = {}
    if file.exists():
        try:
            earlier = {cell.run_id: cell for cell in SweepState.model_validate_json(file.read_bytes()).cells}
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise DataError(f"{file} is damaged ({problem}): delete it; finished runs are kept") from None
    states = []
    for cell in cells:
        state = cell.state()
        known = earlier.get(cell.run_id, state)
        state = state.changed(attempts=known.attempts)
        if not (again or cell.refusal) and (result := finished(cell.config)) is not None:
            seconds = known.seconds if known.status == "success" else round(sum(result.seconds.values()), 3)
            done = {"status": "success", "seconds": seconds, "directory": str(cell.directory)}
            state = state.changed(**done, **measured(result))
        states.append(state)
    return SweepState(sweep=directory.name, directory=str(directory), cells=states)


class Journal:
    """Keeps the state of a sweep and writes it down after every change. Made by :func:`opened`, under ``lock``."""

    def __init__(self, state: SweepState, lock: Path) -> None:
        self.lock = lock
        self._head = state
        self._cells = {cell.run_id: cell for cell in state.cells}
        self.directory = Path(state.directory)
        self._write()

    @property
    def state(self) -> SweepState:
        """The state now."""
        return self._head.model_copy(update={"cells": list(self._cells.values())})

    def of(self, cell: Cell) -> CellState:
        """The state of one cell."""
        return self._cells[cell.run_id]

    def started(self, cell: Cell) -> None:
        """A cell is handed to a worker; what an earlier run of it left cannot be taken for what this one measures."""
        (cell.directory / "metrics.json").unlink(missing_ok=True)
        attempts = self.of(cell).attempts + 1
        self._change(cell, status="running", attempts=attempts, directory=str(cell.directory), error=None)

    def ended(self, cell: Cell, end: CellEnd) -> None:
        """A cell ended for good."""
        if end.result is not None:
            self._change(cell, status="success", seconds=end.seconds, error=None, **measured(end.result))
        else:
            self._change(cell, status="failed", seconds=end.seconds, error=end.error)

    def put_back(self, cell: Cell, error: str | None = None) -> None:
        """A cell has to be run again: its worker was lost, or the sweep was interrupted."""
        self._change(cell, status="pending", error=error)

    def _write(self) -> None:
        write_text(self.directory / "sweep.json", self.state.to_json())

    def _change(self, cell: Cell, **changes: Any) -> None:
        self._cells[cell.run_id] = self.of(cell).changed(**changes)
        self._write()


@contextmanager
def opened(cells: Sequence[Cell], *, again: bool = False) -> Iterator[Journal]:
    """The journal of a sweep, which nobody else runs meanwhile; what is in it: :func:`survey`.

    Raises:
        BenchError: somebody does.
    """
    directory = sweep_directory(cells)
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "lock"
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise BenchError(f"this sweep is running already ({directory}): wait for it, or stop it first") from None
    with held:
        yield Journal(survey(cells, again=again), lock)
