"""Runs that take seconds, and attacks that a test file defines."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import plugins
from bench.run.config import resolve
from bench.run.pipeline import Pipeline
from bench.run.plan import measure_stages
from defenses.base import Defense

TINY = {
    "preset": "quick",
    "device": "cpu",
    "image_size": 32,
    "probes": 12,
    "bootstrap": 100,
    "evaluator_backbone": "mobilefacenet",
    "dataset_options": {"identities": 40, "images_per_identity": 4},
    "training": {"epochs": 1, "warmup_epochs": 0, "views": 1, "precision": "32-true", "embedding_size": 32},
}
TINY_UNET = {"widths": "4,8", "stem_stride": "2", "images": "256", "batch_size": "16"}
#: A run on a small set in InsightFace's formats, of what recognition is measured on.
PACKED = {
    "defense": "pixelate",
    "attack": "linear",
    "dataset": "insightface",
    "dataset_options": {},
    "probes": 4,
    "batch_size": 16,
    "training": {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "embedding_size": 16, "precision": "32-true"},
}


def pipeline(out, **settings):
    return Pipeline(resolve({**TINY, "out": out, **settings}, {}), console=Console(quiet=True))


def finished(out, **settings):
    """Run a configuration: (result, folder)."""
    cell = pipeline(out, **settings)
    return cell.run(), cell.directory


def run_tiny(config):
    """Run a configuration without spending time on timing, also in a worker of a sweep."""
    with registered():
        return Pipeline(config, console=Console(quiet=True)).run()


def measured(cell, folder):
    """Stage -> the seconds that it would take, measured in this process and in an empty folder; None where unknown."""
    told = dict(measure_stages(cell, folder, 0.1, 60))
    assert not list(folder.iterdir())
    return {stage.name: told.get(number) for number, stage in enumerate(cell.plan().stages)}


def silent(config, folder, threads, enough, limit, sender):
    """In place of what measures stages: of the second it tells, then it says nothing, half way through something."""
    Path(folder, "half").write_text("")
    (config / "was there").write_text("")
    sender.send(None)
    sender.send((1, 1.5))
    with torch.no_grad():
        time.sleep(600)


def stages_of(cell, log=lambda *_, **__: None):
    """The provider's stages of a pipeline, as a fresh process has them."""
    return cell._stages(log)


def events(directory, name):
    """The events of that name of a run, in order."""
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def made(directory):
    """The stages that a run computed, in order."""
    return [event["stage"] for event in events(directory, "stage")]


@contextmanager
def registered(*named):
    """Within, these attacks and defences can be named."""
    with pytest.MonkeyPatch.context() as patch:
        for plugin in named:
            registry = plugins.defenses() if issubclass(plugin, Defense) else plugins.attacks()
            patch.setitem(registry._loaders, plugin.name, lambda: None)
            patch.setitem(registry._loaded, plugin.name, plugin)
        yield
