"""Trainings of a run that a second process makes while the first makes others.

Threads that share the operations of a small network wait for each other, and for Python, a third of the time; two
trainings with half of the threads each do not. The second process starts with what comes last and leaves what it makes
in the stage cache, where the first finds it: which of them made a stage changes nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from rich.console import Console

from bench.progress import Log
from bench.run.config import RunConfig
from bench.run.launch import end_process, keep_freed_memory, obey_parent, start_process

#: A stage in the cache: its name and its key.
StageKey = tuple[str, str]

#: Seconds that the second process gets to end by itself.
_GRACE = 15.0

#: Free memory, in bytes, below which there is no room for a second process.
_ROOM = 3 * 2**30


def is_worth_it(config: RunConfig, device: torch.device) -> bool:
    """Whether a run makes two trainings at a time.

    It does not on an accelerator, with one thread or with a number that ``OMP_NUM_THREADS`` sets, without use of what
    is cached, under the preset ``quick``, whose trainings are over before a process has started, and where memory is
    short.
    """
    return (
        device.type == "cpu"
        and torch.get_num_threads() > 1
        and "OMP_NUM_THREADS" not in os.environ
        and config.resume
        and config.preset != "quick"
        and os.name == "posix"
        and psutil.virtual_memory().available >= _ROOM
    )


@contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Within, torch uses half of its threads, one at least."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Beside:
    """The second process, while this is entered.

    Args:
        config: of the run.
        wanted: the trainings that are not in the cache, in the order in which the first process makes them.
        tell: called from another thread with the events of that process, and their fields: the ``progress`` of what it
            makes (:class:`~bench.progress.ProgressBars`), ``beside`` where a ``stage`` failed (the first process will
            meet its ``error``, too, where that lies in the stage itself), and without fields when it has ended.
    """

    def __init__(self, config: RunConfig, wanted: Sequence[StageKey], tell: Log) -> None:
        self._tell = tell
        self._arguments = config, tuple(wanted), torch.get_num_threads()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Beside:
        self._process, self._receiver = start_process(_make, *self._arguments)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.terminate()
        end_process(self._process, _GRACE)
        self._listener.join()
        self._receiver.close()

    def _listen(self) -> None:
        event, fields = "", dict[str, Any]()
        while event != "beside" or fields:
            try:
                event, fields = self._receiver.recv()
            except (EOFError, OSError):  # it has ended, well or not: what it leaves is done here
                event, fields = "beside", {}
            with contextlib.suppress(OSError):  # a full disk, which the first process meets as well
                self._tell(event, **fields)


def _make(config: RunConfig, wanted: Sequence[StageKey], threads: int, sender: Connection) -> None:
    """What the second process does."""
    obey_parent()
    keep_freed_memory()
    torch.set_num_threads(threads)
    from bench.run.pipeline import Pipeline

    def tell(event: str, **fields: Any) -> None:
        sender.send((event, fields))

    try:
        Pipeline(config, console=Console(quiet=True)).make_beside(wanted, tell)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)  # nobody waits for the rest
