"""Runs of attacks that a test file defines."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
from rich.console import Console

from bench import plugins
from bench.run import speed
from bench.run.config import resolve
from bench.run.pipeline import Pipeline


@contextmanager
def registered(*attacks):
    """Within, these attacks can be named, and no time is spent on timing."""
    registry = plugins.attacks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure", functools.partial(speed.measure, min_time=0.01))
        for attack in attacks:
            patch.setitem(registry._loaders, attack.name, lambda: None)
            patch.setitem(registry._loaded, attack.name, attack)
        yield


def finished(**settings):
    """Run a configuration: (result, folder)."""
    one = Pipeline(resolve(settings, {}), console=Console(quiet=True))
    return one.run(), one.directory
