"""Privacy attack-and-defence benchmark for face recognition.

In Python as on the command line, with the same names, defaults and checks: :func:`defense`, :func:`attack`,
``bench.run(...)`` (the package :mod:`bench.run`, which can be called), :func:`load`, :func:`observe` and :func:`score`.
Heavy imports happen when they are needed.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attacks.base import Attack
    from bench.results import RunResult
    from bench.run import Package
    from bench.run.archive import Run
    from bench.run.observe import Observed
    from defenses.base import Defense

    run: Package

__version__ = "0.1.0"

# Read by torch when it is imported. Representations of a batch are tens of megabytes, and faulting them in page by page
# takes a fifth of a training step on two cores; huge pages do not.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Read by OpenMP when torch is imported. Threads that wait for each other burn the time slices in which the other one
# could get on: beside busy neighbours an operation of microseconds then takes milliseconds. They spin for a moment, as
# operations follow each other closely, and then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def defense(name: str, *, image_size: int = 112, preset: str = "cpu", **options: Any) -> Defense:
    """The defence ``name`` for faces of ``image_size`` pixels; ``bench list defense NAME`` shows its options.

    Raises:
        UsageError: unknown name, or options that are unknown, invalid or do not fit together.
    """
    from bench.plugins import make_defense

    return make_defense(name, options, preset, image_size)


def attack(name: str, *, preset: str = "cpu", **options: Any) -> Attack:
    """The attack ``name``, not fitted; ``bench list attack NAME`` shows its options.

    Raises:
        UsageError: unknown name, or options that are unknown or invalid.
    """
    from bench.plugins import make_attack

    return make_attack(name, options, preset)


def load(directory: str | Path) -> Run:
    """A run directory: its result and manifest as models, its raw values as pandas frames.

    Raises:
        MissingError: a file of it is missing, damaged or of another schema; the message names it.
    """
    archive = importlib.import_module("bench.run.archive")  # by name: this module stands below it
    run: Run = archive.load_run(Path(directory))
    return run


def observe(directory: str | Path, out: str | Path, *, templates: bool = False) -> Observed:
    """Do what ``bench observe`` does: write what an attacker sees of a run's victims to the file ``out``.

    Raises:
        BenchError: as ``bench observe``, with the same message.
    """
    module = importlib.import_module("bench.run.observe")  # by name, as above
    written: Observed = module.observe(Path(directory), Path(out), templates=templates)
    return written


def score(recovered: str | Path, run: str | Path, *, name: str | None = None) -> RunResult:
    """Do what ``bench score`` does: score recovered faces, keep that as a run beside ``run``, and return its result.

    Raises:
        BenchError: as ``bench score``, with the same message.
    """
    result: RunResult = importlib.import_module("bench.run.submission").score(Path(recovered), Path(run), name)[0]
    return result


def __getattr__(name: str) -> Any:
    if name == "run":
        return importlib.import_module("bench.run")
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
