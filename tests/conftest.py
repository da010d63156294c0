"""Settings for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: more threads would only get in each other's way. This runs before a test imports torch, and
    # child processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


import bench  # noqa: F401  (sets what torch reads from the environment when it is imported)


@pytest.fixture(scope="session")
def real_faces_root() -> Path:
    """The folder with real faces, in InsightFace's layout; without one the test is skipped."""
    root = os.environ.get("BENCH_DATA_ROOT")
    if not root:
        pytest.skip("BENCH_DATA_ROOT is not set")
    return Path(root)
