"""How a process starts and ends, and what is around it: torchrun, neighbours. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil

from bench.errors import UsageError


@contextlib.contextmanager
def uncollected(*, kept: bool = False) -> Iterator[None]:
    """Within, Python does not look for garbage, which takes a fifth of the time of imports and half of that of parsing.

    Args:
        kept: what is there in the end stays until the process ends: it is never looked at.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if kept:
            gc.freeze()
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Launch:
    """One of the processes that torchrun started, or the only one.

    Attributes:
        rank, size: number of this process, from 0, and how many there are on all machines.
        local_rank, local_size: the same on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """From the environment; without torchrun's, a single process.

        Raises:
            UsageError: torchrun's variables are incomplete, or machines have different numbers of processes.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            launch = cls(*(int(environment[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"torchrun's environment is incomplete ({error}): start with torchrun, or without it"
            ) from None
        if launch.size % launch.local_size:
            raise UsageError(
                f"{launch.size} processes do not divide into machines of {launch.local_size}: give every machine the "
                "same --nproc-per-node"
            )
        return launch

    @property
    def leads(self) -> bool:
        """Whether this process is the one that runs everything, prints and writes; the others help it to train."""
        return self.rank == 0


class FreeCores:
    """How many of the cores that this process may use are free of others, since this was made."""

    def __init__(self) -> None:
        self._cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self._before = self._read()

    def _read(self) -> tuple[float, float, float]:
        """Seconds that these cores were idle, that they could have been busy, and that this process kept them busy."""
        counters = psutil.cpu_times(percpu=True)
        ours = [counters[core] for core in self._cores if core < len(counters)]
        idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in ours)
        # Guests are counted among the users.
        total = sum(sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0) for core in ours)
        return idle, total, time.process_time()

    def count(self) -> float | None:
        """At least 0; None where the system does not say."""
        idle, total, own = (after - before for before, after in zip(self._before, self._read(), strict=True))
        return len(self._cores) * min(1.0, max(0.0, idle + own) / total) if total > 0 else None


#: Parameters of glibc's mallopt (malloc.h), and their largest values.
_MALLOC = ((-3, 2**25), (-1, 2**31 - 1))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is asked for next, up to 32 MiB a piece.

    Every step frees all that it computed. Handed back to the system, the memory is cleared and faulted in page by page
    for the next one, which takes up to a tenth of a training step on a CPU. Other libraries than glibc are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in _MALLOC:
            library.mallopt(parameter, value)


def forget_peak() -> bool:
    """Let the peak of resident memory start anew, as Linux can; whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_bytes() is not None


def peak_bytes() -> int | None:
    """Peak resident bytes since then, or None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


# -- processes that this one starts ----------------------------------------------------------------


def start_process(
    target: Callable[..., None], *arguments: Any, method: Literal["spawn"] = "spawn"
) -> tuple[BaseProcess, Connection]:
    """A process that has been started with ``target(*arguments, sender)``, and where what it sends is received.

    It is made anew, since neither threads nor accelerators survive a fork.

    Args:
        target: importable by name; the arguments are pickled.
        method: how :mod:`multiprocessing` makes it.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    with without_interrupts():
        process.start()
    sender.close()
    return process, receiver


def obey_parent() -> None:
    """Let a process that was spawned end with the one that started it, however that ended, and when it says so.

    A later call must not find this one still at work. A terminal sends Ctrl-C to every process: this one leaves it to
    the first, which ends the others with SIGTERM, raised here as KeyboardInterrupt. Two interruptions would break what
    is written down at the first. What it prints goes to stderr: stdout belongs to the first one's result.
    """
    sys.stdout = sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def end_process(process: BaseProcess, grace: float) -> None:
    """Wait for a process that should be ending; kill it after ``grace`` seconds."""
    process.join(grace)
    if process.is_alive():
        process.kill()
        process.join()


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started here, which could not deal with it yet; here it only comes later."""
    resource_tracker.ensure_running()  # started with the first process, it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
