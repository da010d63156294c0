"""Progress bars on stderr: shown on a terminal and in a notebook, silent elsewhere; every report also goes to a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

#: Called as ``report(done, total, **fields)``; becomes a bar and a line of the log.
Report = Callable[..., None]
Log = Callable[..., None]

#: Seconds between two progress lines in the log, where no fiftieth of the whole is done before.
LOG_INTERVAL = 5.0
_LOG_SHARE = 1 / 50

#: Columns of a terminal from which figures stand beside the bar.
_ROOM = 110


def no_report(done: int, total: int, **fields: float) -> None:
    """A :data:`Report` for callers that want none."""


class ProgressBars:
    """Turns ``report(done, total, **fields)`` calls into bars with an ETA, drawn on a terminal or in a notebook only.

    ``log("progress", task=..., done=..., total=..., **fields)`` is called now and then.
    """

    def __init__(self, console: Console, log: Log) -> None:
        self._steps: int | None = None
        self._begun = 0
        self._nested = 0
        self._log = log
        self._progress = Progress(
            # Of a narrow terminal the description gets what the others leave.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
            transient=True,
            expand=True,
        )

    def expect(self, steps: int) -> None:
        """Count steps from now on: there are so many."""
        self._steps, self._begun = steps, 0

    def pass_step(self) -> None:
        """Count a step that somebody else has done."""
        self._begun += 1

    @contextmanager
    def beside(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A bar below the others for what somebody else does: ``show(description, done, total)``, from any thread.

        It is hidden while there is no description.
        """
        with self._live():
            bar = self._progress.add_task("", total=None, figures="", visible=False)

            def show(description: str, done: int, total: int | None) -> None:
                self._progress.update(
                    bar, description=escape(description), completed=done, total=total, visible=bool(description)
                )

            try:
                yield show
            finally:
                self._progress.remove_task(bar)

    @contextmanager
    def task(self, description: str, *, step: bool = False) -> Iterator[Report]:
        """A bar for the duration of the block, which may be the next ``step`` of those that are counted."""
        self._begun += step
        place = ""
        if step and self._steps is not None:
            place = f"step {self._begun} of {max(self._steps, self._begun)}: "
        with self._live():
            bar = self._progress.add_task(escape(place + description), total=None, figures="")
            last, told = 0.0, -math.inf

            def report(done: int, total: int, **fields: float) -> None:
                nonlocal last, told
                figures = "  ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in fields.items())
                shown = escape(figures) if self._progress.console.width >= _ROOM else ""
                self._progress.update(bar, completed=done, total=total, figures=shown)
                now = time.monotonic()
                if done >= total or now - last >= LOG_INTERVAL or done - told >= _LOG_SHARE * total:
                    last, told = now, done
                    self._log("progress", task=description, done=done, total=total, **fields)

            try:
                yield report
            finally:
                self._progress.remove_task(bar)

    @contextmanager
    def _live(self) -> Iterator[None]:
        """Draw until the outermost block ends: a bar within another one does not take that away."""
        if not self._nested:
            self._progress.start()
        self._nested += 1
        try:
            yield
        finally:
            self._nested -= 1
            if not self._nested:
                self._progress.stop()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
