"""What the process of a sweep holds after each cell: nothing grows. Two hundred of them, or some in processes:

``python tests/support/soaking.py --cells 200``, ``python tests/support/soaking.py --cells 24 --jobs 2``.
"""

import pytest
import torch
from soaking import COUNTED, Soak, growth
from sweep_at_work import light

KEPT = []


def leaky(config):
    """Keeps a handle, a temporary file and a tensor of every cell."""
    import tempfile

    KEPT.append((tempfile.NamedTemporaryFile(), torch.zeros(2**18)))  # noqa: SIM115 - that is the fault
    config.out.mkdir(exist_ok=True)
    return light(config)


@pytest.mark.slow
def test_cells_leave_nothing_behind(tmp_path):
    grid = {"defenses": "partialface", "attacks": "linear,unet", "queries": "1"}  # three seeds
    told = Soak(tmp_path, 6, **grid).soak()
    assert (told["cells"], told["failed"], told["left"], told["grown"]) == (6, [], [], [])


def test_a_cell_that_leaves_something_behind_is_found(tmp_path):
    told = Soak(tmp_path, 6, runner=leaky, defenses="blur", attacks="linear").soak()
    KEPT.clear()
    assert told["cells"] == 6
    assert {"handles", "files", "tensors"} <= set(told["grown"])
    assert set(told["most"]) == {"mebibytes", *COUNTED}


def test_memory_that_grows_is_told_from_memory_that_is_loaded_once():
    flat = [dict.fromkeys(COUNTED, 0) | {"mebibytes": 900.0 + 100 * (cell > 2)} for cell in range(20)]
    rising = [dict.fromkeys(COUNTED, 0) | {"mebibytes": 900.0 + 0.5 * cell} for cell in range(20)]
    assert growth(flat)["mebibytes_a_cell"] == pytest.approx(0.0, abs=1e-9)
    assert growth(rising)["mebibytes_a_cell"] == pytest.approx(0.5)
