"""Progress bars on stderr: shown on a terminal and in a notebook, silent elsewhere; every report also goes to a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Called as ``report(done, total, **fields)``; becomes a bar and a line of the log.
Report = Callable[..., None]
Log = Callable[..., None]

#: Seconds between two progress lines in the log.
LOG_INTERVAL = 5.0


def no_report(done: int, total: int, **fields: float) -> None:
    """A :data:`Report` for callers that want none."""


class ProgressBars:
    """Turns ``report(done, total, **fields)`` calls into bars with an ETA, drawn on a terminal or in a notebook only.

    ``log("progress", task=..., done=..., total=..., **fields)`` is called now and then.
    """

    def __init__(self, console: Console, log: Log) -> None:
        self._log = log
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
            transient=True,
        )

    @contextmanager
    def task(self, description: str) -> Iterator[Report]:
        """A bar for the duration of the block."""
        with self._progress:
            bar = self._progress.add_task(description, total=None, figures="")
            last = 0.0

            def report(done: int, total: int, **fields: float) -> None:
                nonlocal last
                figures = "  ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in fields.items())
                self._progress.update(bar, completed=done, total=total, figures=figures)
                now = time.monotonic()
                if done >= total or now - last >= LOG_INTERVAL:
                    last = now
                    self._log("progress", task=description, done=done, total=total, **fields)

            try:
                yield report
            finally:
                self._progress.remove_task(bar)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
