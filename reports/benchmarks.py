"""What pytest-benchmark stored (``--benchmark-json``), as a table of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from bench.run.archive import read_model
from reports.table import Column, Entry, Row, Table


class _Stats(BaseModel):
    """Seconds of a call."""

    median: float = Field(ge=0, allow_inf_nan=False)
    q1: float = Field(ge=0, allow_inf_nan=False)
    q3: float = Field(ge=0, allow_inf_nan=False)
    rounds: int


class _Benchmark(BaseModel):
    name: str
    stats: _Stats
    extra_info: dict[str, Any] = {}


class _Document(BaseModel):
    machine_info: dict[str, Any] = {}
    benchmarks: list[_Benchmark]


def benchmark_table(files: Sequence[Path]) -> Table | None:
    """A row per benchmark of every file: seconds, and what else it recorded; None without files.

    Raises:
        MissingError: a file cannot be read, or was not written by pytest-benchmark.
    """
    if not files:
        return None
    rows = []
    for file in files:
        document = read_model(file, _Document, "what pytest --benchmark-json writes")
        machine = str(document.machine_info.get("node", file.name))
        rows += [_row(benchmark, machine) for benchmark in document.benchmarks]
    columns = (
        Column("benchmark", numeric=False),
        Column("median, ms", "of a call"),
        Column("rounds", "calls timed"),
        Column("recorded", "what the benchmark noted besides", numeric=False),
        Column("machine", numeric=False),
    )
    return Table("benchmarks", "Speed (pytest-benchmark); in brackets the quartiles.", columns, tuple(rows))


def _row(benchmark: _Benchmark, machine: str) -> Row:
    stats = benchmark.stats
    spread = f"[{1e3 * stats.q1:,.4g}, {1e3 * stats.q3:,.4g}]"
    noted = "; ".join(f"{name}: {_shown(value)}" for name, value in benchmark.extra_info.items())
    return Row(
        (
            Entry(benchmark.name),
            Entry(f"{1e3 * stats.median:,.4g}", 1e3 * stats.median, spread),
            Entry(f"{stats.rounds}", stats.rounds),
            Entry(noted),
            Entry(machine),
        )
    )


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
