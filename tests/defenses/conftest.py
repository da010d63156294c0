"""The textbook oracle, as a fixture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module ``textbook.py`` beside this file (under importmode=importlib, siblings are no packages)."""
    spec = importlib.util.spec_from_file_location("textbook", Path(__file__).with_name("textbook.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
