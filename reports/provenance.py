"""Where figures come from: configuration, versions, device, seeds, hashes; and what to know before quoting them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from bench.data.loaders import ROLES
from bench.measures import MISSING
from bench.results import LEAST_ACCURACY
from bench.run.archive import Run
from reports.cells import Cell, Setting, named_data
from reports.summary import same_attacks
from reports.table import Column, Entry, Row, Table

#: Settings that are paths: their last part says enough, the rest says where somebody keeps things.
_PATHS = ("data_root", "evaluator", "out", "plain_recogniser", "recogniser", "teacher")
_DIGITS = 12


def provenance(settings: Sequence[Setting]) -> Table:
    """One row for each run."""
    rows = tuple(Row(_entries(cell), "failed" if cell.run.failed else "measured") for _, cell in _runs(settings))
    columns = tuple(Column(key, key, numeric=key == "seed") for key in rows[0].entries)
    return Table("runs", "Every run of this report.", columns, rows)


def _entries(cell: Cell) -> dict[str, Entry]:
    manifest = cell.run.manifest
    judges = []
    for judge in cell.run.result.judges.values():
        digest = f", SHA-256 {judge.sha256[:_DIGITS]}" if judge.sha256 else ""
        judges.append(f"{judge.told}{digest}")
    teacher = cell.run.result.teacher
    texts = {
        "run": manifest.run_id,
        "status": cell.run.result.status,
        "seed": str(cell.seed),
        "preset": str(manifest.config.get("preset", MISSING)),
        "started": manifest.started,
        "version": manifest.version,
        "commit": manifest.git_commit,
        "python": manifest.python,
        "torch": manifest.packages.get("torch"),
        "device": f"{manifest.device} ({manifest.device_name}), {manifest.precision}",
        "evaluator": ", ".join(judges),
        "teacher": "" if teacher is None else f"{teacher.name}, SHA-256 {teacher.sha256[:_DIGITS]}",
        "recognisers": ", ".join(
            f"{told.name}, SHA-256 {told.sha256[:_DIGITS]}" for told in cell.run.result.recognisers.values()
        ),
    }
    return {key: Entry(text or MISSING) for key, text in texts.items()} | {
        "seed": Entry(str(cell.seed), float(cell.seed))
    }


def records(settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """Label, whole configuration and hashes of every run, as text."""
    for _, cell in _runs(settings):
        manifest, info = cell.run.manifest, cell.run.result.defense
        config = {key: _value(key, value) for key, value in manifest.config.items()}
        config["packages"] = ", ".join(f"{name} {version}" for name, version in manifest.packages.items())
        config |= {"threads": str(manifest.threads), "deterministic": str(manifest.deterministic)}
        config |= {} if info is None else {"defence, resolved": json.dumps(info.options)}
        for name, attack in cell.run.result.attack_results.items():
            config[f"{name}, resolved"] = json.dumps(attack.attack.options)
        label = f"{manifest.run_id} in {cell.run.directory.name}"
        yield {"label": label, "config": config, "artefacts": manifest.artefacts}


def _value(key: str, value: Any) -> str:
    if key in _PATHS and value:
        return ", ".join(PurePath(str(path)).name for path in (value if isinstance(value, list) else [value]))
    if key in (*ROLES, "distractors") and value:
        return named_data(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def warnings(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """What to know before quoting a figure -> the runs that it concerns; each said once."""
    holders: dict[str, dict[str, None]] = {}
    for label, cell in _runs(settings):
        for warning in (*cell.run.result.warnings, *_added(cell.run)):
            holders.setdefault(warning, {})[label] = None
    said = {warning: list(labels) for warning, labels in holders.items()}
    for setting in settings:
        if not same_attacks(setting):
            warning = (
                "the defences were not tried by the same attacks: the one that looks better may have met weaker ones"
            )
            said[warning] = [f"{defense}: {_tried(cells)}" for defense, cells in setting.defenses.items()]
        if trained := _trained_differently(setting):
            said["recognisers were trained differently: how well they recognise does not compare"] = trained
    return said


def _trained_differently(setting: Setting) -> list[str]:
    """Each run that measured recognition, with how its recogniser was trained where that differs; empty if nowhere."""
    ways = {
        label: {"backbone": cell.run.manifest.config.get("backbone")} | (cell.run.manifest.config.get("training") or {})
        for label, cell in setting.runs
        if cell.run.result.utility is not None
    }
    names = dict.fromkeys(name for way in ways.values() for name in way)
    differing = [name for name in names if len({json.dumps(way.get(name)) for way in ways.values()}) > 1]
    if not differing:
        return []
    return [f"{label}: {', '.join(f'{name}={way.get(name)}' for name in differing)}" for label, way in ways.items()]


def _tried(cells: Iterable[Cell]) -> str:
    return ", ".join(dict.fromkeys(f"{cell.attack} ({cell.knowledge})" for cell in cells))


def _added(run: Run) -> Iterator[str]:
    """Warnings that a report adds to those of the run."""
    for name in run.altered:
        yield f"{name} is not the file that the run wrote: it was changed afterwards"
    lpips = [attack.figure("lpips") for attack in run.result.attack_results.values()]
    if any(measure is not None and measure.value is None for measure in lpips):
        yield "LPIPS was not measured: its weights were not there (bench doctor says how to get them)"
    for judge in run.result.judges.values():
        # Later runs withhold the figures of such a judge, and say so themselves.
        if judge.withheld is None and judge.accuracy.value is not None and judge.accuracy.value < LEAST_ACCURACY:
            yield (
                f"weak evaluator ({judge.name}): it tells {judge.accuracy.value:.0%} of plain pairs apart and accepts "
                f"{judge.far_at_threshold:.0%} of impostors, so figures of identity leakage say little"
            )


def _runs(settings: Iterable[Setting]) -> list[tuple[str, Cell]]:
    return [run for setting in settings for run in setting.runs]
