"""Where the runs of a test file lie: they share a cache."""

import pytest


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")
