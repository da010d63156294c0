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


_COLUMNS = (
    Column.of_text("benchmark"),
    Column("median", "median, ms", "of a call"),
    Column("rounds", "rounds", "calls timed"),
    Column.of_text("recorded", "what the benchmark noted besides"),
    Column.of_text("machine"),
)


def benchmark_table(files: Sequence[Path]) -> Table | None:
    """A row per benchmark of every file: seconds, and what else it recorded; None without files.

    Raises:
        MissingError: a file cannot be read, or was not written by pytest-benchmark.
    """
    rows = []
    for file in files:
        document = read_model(file, _Document, "what pytest --benchmark-json writes")
        machine = Entry(str(document.machine_info.get("node", file.name)))
        rows += [_row(benchmark, machine) for benchmark in document.benchmarks]
    caption = "Speed (pytest-benchmark); in brackets the quartiles."
    return Table("benchmarks", caption, _COLUMNS, tuple(rows)) if files else None


def _row(benchmark: _Benchmark, machine: Entry) -> Row:
    stats, extra = benchmark.stats, benchmark.extra_info.items()
    noted = (f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in extra)
    spread = f"[{1e3 * stats.q1:,.4g}, {1e3 * stats.q3:,.4g}]"
    return Row(
        {
            "benchmark": Entry(benchmark.name),
            "median": Entry(f"{1e3 * stats.median:,.4g}", 1e3 * stats.median, spread),
            "rounds": Entry(f"{stats.rounds}", stats.rounds),
            "recorded": Entry("; ".join(noted)),
            "machine": machine,
        }
    )
