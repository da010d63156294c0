"""Many cells in one sweep, and what the process that runs them holds after each.

From the command line, for more cells than a test has time for: ``python tests/support/soaking.py --cells 200``, with
``--jobs 2`` each in a process of its own. It ends with 1 where something grows.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from killing import left_over
from pixel_judge import write_pixel_judge
from rich.console import Console
from runs_at_work import speed_in_passing
from tiny_runs import TINY, TINY_UNET

from bench.results import RunResult
from bench.run.config import RunConfig
from bench.sweep.cells import Cell
from bench.sweep.journal import Journal
from bench.sweep.options import read_request
from bench.sweep.sweep import Sweep
from bench.sweep.workers import Runner, run_pipeline

#: What is counted after each cell, and may not become more.
COUNTED = ("handles", "threads", "processes", "files", "tensors")
#: MiB that a cell may leave behind on average, once all that is loaded once has been.
LEFT = 0.1
FLAGS = {
    **TINY, "image_size": 16, "probes": 6, "batch_size": 16,
    "dataset_options": {"identities": 26, "images_per_identity": 4},
    "training": {**TINY["training"], "batch_size": 16, "embedding_size": 16},
}  # fmt: skip
OPTIONS = {"unet": {**TINY_UNET, "images": 128}, "template": {"width": 4, "images": 64, "views": 1, "steps": 10}}
#: Pictures, frequencies and templates, under five attacks: 24 pairs of them that go together, for each seed.
GRID = {
    "defenses": "partialface,blur,noise,biohash", "attacks": "linear,unet,unmix,template", "queries": "1,2",
}  # fmt: skip


@functools.cache
def _judge() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return Path(write_pixel_judge(Path(folder) / "judge.onnx")).read_bytes()


def soaked(config: RunConfig) -> RunResult:
    """The whole run; timing the provider, whose figures are none of ours, takes no time."""
    speed_in_passing()
    return run_pipeline(config)


def held(temporary: Path) -> dict[str, float]:
    """What this process holds; ``temporary`` is the folder of its temporary files."""
    gc.collect()
    process = psutil.Process()
    return {
        "mebibytes": process.memory_info().rss / 2**20,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
        "files": sum(len(folders) + len(files) for _, folders, files in os.walk(temporary)),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


class Soak(Sweep):
    """A sweep of at least so many cells, of which it notes in ``samples`` what is held after each, and how it ended."""

    def __init__(self, root: Path, cells: int, *, jobs: int = 1, runner: Runner = soaked, **grid: str) -> None:
        given = {**GRID, **grid, "jobs": jobs, "cpus_per_cell": 1}
        swept = given["attacks"].split(",")
        options = [f"{name}.{key}={value}" for name in swept for key, value in OPTIONS.get(name, {}).items()]
        flags = {**FLAGS, "out": root / "runs", "evaluator": str(root / "judge.onnx")}
        (root / "judge.onnx").write_bytes(_judge())
        (root / "tmp").mkdir()
        seeds, found = 0, 0
        while found < cells:
            seeds += 1
            request = read_request({**given, "seeds": list(range(seeds))}, flags, {}, attack_options=options)
            super().__init__(request, console=Console(quiet=True), runner=runner)
            self.cells = self.cells[: self._index(cells)]
            found = self.plan().count("pending")
        self.samples: list[dict[str, Any]] = []
        self._root = root

    def _index(self, cells: int) -> int:
        """Up to the last of so many cells that can be run."""
        able = [index for index, cell in enumerate(self.cells) if cell.refusal is None]
        return [*able, len(self.cells)][min(cells, len(able)) - 1] + 1

    def _tell(self, journal: Journal, cell: Cell) -> None:
        state = journal.of(cell)
        if state.status != "running":
            self.samples.append(held(self._root / "tmp") | {"cell": state.name, "status": state.status})

    def soak(self) -> dict[str, Any]:
        """Run all cells, and say what became of them and of the process."""
        began, clock = time.process_time(), time.monotonic()
        with patch.object(tempfile, "tempdir", str(self._root / "tmp")):
            before = held(self._root / "tmp")
            state = self.run()
            after = held(self._root / "tmp")
        return {
            "cells": len(self.samples),
            "failed": [f"{cell.name}: {cell.error}" for cell in state.cells if cell.status == "failed"],
            "left": left_over(self._root / "runs"),
            "before": before,
            "after": after,
            **growth(self.samples),
            "seconds": {"clock": time.monotonic() - clock, "processor": time.process_time() - began},
        }


def growth(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What there was at most in both halves of the cells, and MiB that each cell of the second left behind."""
    half = len(samples) // 2
    most = {name: [max(sample[name] for sample in part) for part in (samples[:half], samples[half:])]
            for name in ("mebibytes", *COUNTED)}  # fmt: skip
    late = [sample["mebibytes"] for sample in samples[half:]]
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 1 else 0.0
    return {
        "most": most,
        "mebibytes_a_cell": slope,
        "grown": [name for name in COUNTED if most[name][1] > most[name][0]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time, each in a process of its own")
    parser.add_argument("--samples", type=Path, help="file for what was held after each cell, a line of JSON each")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), asked.cells, jobs=asked.jobs)
        told = soak.soak()
    if asked.samples:
        asked.samples.write_text("".join(f"{json.dumps(sample)}\n" for sample in soak.samples))
    print(json.dumps(told, indent=2))
    return int(bool(told["failed"] or told["left"] or told["grown"] or told["mebibytes_a_cell"] > LEFT))


if __name__ == "__main__":
    sys.exit(main())
