"""What several measurements have in common."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Figures of one core, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
