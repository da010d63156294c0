"""One attempt at a cell, in whatever process: what came out, or the one line that says what went wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console

from bench.errors import BenchError
from bench.results import PROTOCOL_VERSION, RunResult, read_result
from bench.run.config import RunConfig
from bench.run.store import run_id

#: Runs a cell, leaves it in the run store and returns what it found. Must be importable by name: workers pickle it.
Runner = Callable[[RunConfig], RunResult]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        result: of a successful one.
        error: of another one, in one line.
        lost: whether its process or machine was lost, so that another attempt may do better.
        seconds: that it took.
    """

    result: RunResult | None = None
    error: str | None = None
    lost: bool = False
    seconds: float | None = None


def run_pipeline(config: RunConfig, console: Console | None = None) -> RunResult:
    """The :data:`Runner` of real sweeps; progress goes to ``console``."""
    from bench.run.pipeline import Pipeline

    return Pipeline(config, console=console or Console(quiet=True)).run()


def attempt(runner: Runner, config: RunConfig) -> Outcome:
    """Run a cell; whatever it raises but an interruption is its outcome."""
    _forget_peaks()
    started = time.monotonic()
    try:
        result, error = runner(config), None
    except BenchError as raised:
        result, error = None, " ".join(str(raised).split())
    except Exception as raised:
        # The run's events.jsonl has the traceback.
        result, error = None, " ".join(f"{type(raised).__name__}: {raised}".split())
    return Outcome(result, error, seconds=round(time.monotonic() - started, 3))


def finished(config: RunConfig) -> RunResult | None:
    """The result of a cell that the run store holds already, under today's protocol; None where there is none."""
    try:
        result = read_result(config.out / run_id(config))
    except (OSError, ValidationError):
        return None
    return result if result.status == "success" and result.protocol == PROTOCOL_VERSION else None


def _forget_peaks() -> None:
    """Let a result's peak memory be that of its own cell, where several run in one process."""
    # Where it cannot be reset (macOS, some containers) the figure is an upper bound.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_bytes(b"5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
