"""The ``BENCH_*`` environment variables. Imports nothing heavy: ``bench doctor`` asks for them with torch broken."""

from __future__ import annotations

from collections.abc import Mapping

from bench.errors import UsageError

PREFIX = "BENCH_"

#: Fields of :class:`bench.config.RunConfig` that a variable can set: all that hold one value.
FIELDS = frozenset(
    {
        "defense",
        "attack",
        "dataset",
        "data_root",
        "preset",
        "knowledge",
        "image_size",
        "backbone",
        "evaluator",
        "evaluator_backbone",
        "seed",
        "device",
        "out",
        "probes",
        "queries",
        "bootstrap",
        "batch_size",
        "budget",
        "utility",
        "resume",
        "stream",
        "stream_images",
        "stream_on_error",
    }
)

#: Variables that are not fields of a run: weights, download cache, tracebacks.
OTHERS = frozenset({"BENCH_LPIPS_WEIGHTS", "BENCH_CACHE", "BENCH_DEBUG"})


def known_variables() -> frozenset[str]:
    """Names of the environment variables that mean something."""
    return OTHERS | {PREFIX + field.upper() for field in FIELDS}


def read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The values of the ``BENCH_*`` variables that are fields of a run; empty ones count as absent.

    Raises:
        UsageError: a ``BENCH_*`` variable that means nothing.
    """
    values = {}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name in OTHERS:
            continue
        if name not in known_variables():
            raise UsageError(f"unknown environment variable {name} (known: {', '.join(sorted(known_variables()))})")
        if value:
            values[name.removeprefix(PREFIX).lower()] = value
    return values
