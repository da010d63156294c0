"""What several measurements have in common."""

import pytest


@pytest.fixture
def one_thread(set_threads):
    """Figures of one core, whatever the machine has."""
    set_threads(1)
