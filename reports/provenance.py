"""Where figures come from: configuration, versions, device, seeds, hashes; and what to know before quoting them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bench.measures import MISSING
from bench.run.archive import Run
from reports.cells import Cell, Setting
from reports.summary import same_attacks
from reports.table import Column, Entry, Row, Table

#: Settings that are paths: their last part says enough, the rest says where somebody keeps things.
_PATHS = ("data_root", "evaluator", "out")
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Record:
    """The whole configuration of one run, and the hashes of its files, as text."""

    label: str
    config: tuple[tuple[str, str], ...]
    artefacts: tuple[tuple[str, str], ...]


def provenance(settings: Sequence[Setting]) -> Table:
    """One row for each run."""
    headings = (
        "run",
        "status",
        "seed",
        "preset",
        "started",
        "version",
        "commit",
        "python",
        "torch",
        "device",
        "evaluator",
    )
    columns = tuple(Column(heading, numeric=heading == "seed") for heading in headings)
    rows = tuple(Row(_entries(cell), "failed" if cell.run.failed else "measured") for _, cell in _runs(settings))
    return Table("runs", "Every run of this report.", columns, rows)


def records(settings: Sequence[Setting]) -> list[Record]:
    """Configuration and hashes of every run."""
    made = []
    for _, cell in _runs(settings):
        manifest, info = cell.run.manifest, cell.run.result.defense
        config = [(key, _value(key, value)) for key, value in manifest.config.items()]
        config += [("packages", ", ".join(f"{name} {version}" for name, version in manifest.packages.items()))]
        config += [("threads", str(manifest.threads)), ("deterministic", str(manifest.deterministic))]
        if info is not None:
            config.append(("defence, resolved", json.dumps(info.options)))
        for name, attack in cell.run.result.attack_results.items():
            config.append((f"{name}, resolved", json.dumps(attack.attack.options)))
        made.append(
            Record(f"{manifest.run_id} in {cell.run.directory.name}", tuple(config), tuple(manifest.artefacts.items()))
        )
    return made


def warnings(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """What to know before quoting a figure -> the runs that it concerns; each said once."""
    holders: dict[str, list[str]] = {}
    for label, cell in _runs(settings):
        for warning in (*cell.run.result.warnings, *_added(cell.run)):
            labels = holders.setdefault(warning, [])
            if label not in labels:
                labels.append(label)
    for setting in settings:
        if not same_attacks(setting):
            holders[
                "the defences were not tried by the same attacks: the one that looks better may have met weaker ones"
            ] = [f"{defense}: {_tried(cells)}" for defense, cells in setting.defenses.items()]
    return holders


def _tried(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys(f"{cell.attack} ({cell.knowledge})" for cell in cells))


def _added(run: Run) -> list[str]:
    """Warnings that a report adds to those of the run."""
    added = [f"{name} is not the file that the run wrote: it was changed afterwards" for name in run.altered]
    lpips = [attack.figure("lpips") for attack in run.result.attack_results.values()]
    if any(measure is not None and measure.value is None for measure in lpips):
        added.append("LPIPS was not measured: its weights were not there (bench doctor says how to get them)")
    evaluator = run.result.evaluator
    if evaluator is not None and evaluator.accuracy < 0.9:
        added.append(
            f"weak evaluator ({evaluator.name}): it tells {evaluator.accuracy:.0%} of plain pairs apart and accepts "
            f"{evaluator.far_at_threshold:.0%} of impostors, so figures of identity leakage say little"
        )
    return added


def _runs(settings: Sequence[Setting]) -> list[tuple[str, Cell]]:
    return [run for setting in settings for run in setting.runs]


def _entries(cell: Cell) -> tuple[Entry, ...]:
    manifest, evaluator = cell.run.manifest, cell.run.result.evaluator
    judge = MISSING
    if evaluator is not None:
        digest = f", SHA-256 {evaluator.sha256[:_DIGITS]}" if evaluator.sha256 else ""
        judge = f"{evaluator.name} ({evaluator.accuracy:.1%} on plain pairs{digest})"
    return (
        Entry(manifest.run_id),
        Entry(cell.run.result.status),
        Entry(str(cell.seed), float(cell.seed)),
        Entry(str(manifest.config.get("preset", MISSING))),
        Entry(manifest.started or MISSING),
        Entry(manifest.version or MISSING),
        Entry(manifest.git_commit or MISSING),
        Entry(manifest.python or MISSING),
        Entry(manifest.packages.get("torch", MISSING)),
        Entry(f"{manifest.device} ({manifest.device_name}), {manifest.precision}"),
        Entry(judge),
    )


def _value(key: str, value: Any) -> str:
    if key in _PATHS and value:
        return PurePath(str(value)).name
    return value if isinstance(value, str) else json.dumps(value, default=str)
