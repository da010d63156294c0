"""The kernel of the block DCT: by Triton's interpreter on a CPU against the textbook, and compiled where CUDA is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from pictures import generator, noise

from bench.run.textbook import textbook, textbook_spectrum
from defenses import frequency
from defenses.frequency import CHANNELS, block_dct, block_dct_adjoint

EVERY = torch.arange(CHANNELS)
MIXED = torch.tensor([[63, 0, 9], [1, 1, 0], [0, 62, 5], [8, 7, 56], [33, 12, 0]])


def _transposed(faces):
    return faces.mT.contiguous().mT


#: Name -> faces, float64 as the textbook takes them, and channels. A tile has 256 pixels.
CASES = {
    "all channels": (noise(1, 16), EVERY),
    "more than a tile, odd": (noise(2, 17, seed=1), torch.tensor([0, 1, 8, 63])),
    "less than a tile": (noise(3, 5, seed=2), torch.tensor([9, 0, 9])),
    "two pixels": (noise(1, 2, seed=3), torch.tensor([0, 7, 62])),
    "lists of their own": (noise(5, 13, seed=4), MIXED),
    "lists in columns": (noise(5, 8, seed=9), MIXED.T.contiguous().T),
    "one map": (noise(2, 9, seed=5), torch.tensor([0])),
    "one map each": (noise(5, 9, seed=6), MIXED[:, :1]),
    "not contiguous": (_transposed(noise(2, 11, seed=7)), torch.tensor([2, 16])),
    "every other face": (noise(5, 8, seed=8)[::2], torch.tensor([0, 3])),
    "no faces": (noise(0, 8), torch.tensor([0, 3])),
}
#: Of these also the linear part.
LINEAR = ("less than a tile", "lists of their own")

# Triton has to know before it is imported that its kernels are interpreted: in a process of their own.
INTERPRETED = """
import sys, torch
from defenses import frequency
frequency._fused_on.add("cpu")
cases, file = torch.load(sys.argv[1]), sys.argv[2]
results = {}
for name, (faces, channels) in cases.items():
    results[name] = frequency.block_dct(faces, channels)
for name in sys.argv[3:]:
    results["linear", name] = frequency.block_dct(*cases[name], with_offset=False)
assert "cpu" in frequency._fused_on and "defenses.fused" in sys.modules
torch.save(results, file)
"""


def _expected(faces, channels):
    if channels.ndim == 2:
        return textbook(faces, channels)
    return textbook_spectrum(faces)[:, :, channels].flatten(1, 2)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("fused")
    torch.save({name: (faces.float(), channels) for name, (faces, channels) in CASES.items()}, folder / "cases.pt")
    end = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(folder / "cases.pt"), str(folder / "results.pt"), *LINEAR],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in end.stderr:
        pytest.skip("Triton before 3.8 does not know NumPy 2.5")
    assert end.returncode == 0, end.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_textbook(name, interpreted):
    assert interpreted[name].dtype == torch.float32
    torch.testing.assert_close(interpreted[name].double(), _expected(*CASES[name]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", LINEAR)
def test_without_the_level_shift_the_kernel_is_linear(name, interpreted):
    faces, channels = CASES[name]
    black = _expected(torch.zeros_like(faces), channels)
    expected = _expected(faces, channels) - black
    torch.testing.assert_close(interpreted["linear", name].double(), expected, rtol=0, atol=1e-3)


def test_what_the_kernel_is_not_for_is_computed_without_it(monkeypatch):
    monkeypatch.setattr(frequency, "_fused_on", {"cpu"})
    monkeypatch.setitem(sys.modules, "defenses.fused", None)  # not to be imported
    faces = noise(2, 8)
    for factor in (8, 4, 1):
        block_dct(faces, EVERY, upsampling=factor)
    block_dct(faces.float(), EVERY, upsampling=4)
    block_dct_adjoint(faces.float(), torch.tensor([4]))
    assert frequency._fused_on == {"cpu"}


@pytest.mark.parametrize("missing", ["triton", "a compiler"])
def test_without_a_kernel_plain_operations_do_and_it_is_said_once(missing, monkeypatch, caplog):
    faces = noise(2, 8, dtype=torch.float32)
    expected = block_dct(faces, EVERY)
    monkeypatch.setattr(frequency, "_fused_on", {"cpu"})
    if missing == "triton":
        monkeypatch.delitem(sys.modules, "defenses.fused", raising=False)
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        pytest.importorskip("triton")  # which compiles nothing for a CPU
    with caplog.at_level(logging.WARNING, logger="bench"):
        assert torch.equal(block_dct(faces, EVERY), expected)
        assert torch.equal(block_dct(faces, EVERY), expected)
    [told] = caplog.messages
    assert "block DCT" in told
    assert missing != "triton" or "ModuleNotFoundError" in told


def test_a_full_memory_is_no_reason_to_do_without_the_kernel(monkeypatch):
    class Full:
        @staticmethod
        def fused_block_dct(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(frequency, "_fused_on", {"cpu"})
    monkeypatch.setitem(sys.modules, "defenses.fused", Full)
    with pytest.raises(torch.OutOfMemoryError):
        block_dct(noise(1, 8, dtype=torch.float32), EVERY)
    assert frequency._fused_on == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_kernel_equals_the_textbook_and_has_a_gradient(name):
    faces, channels = CASES[name]
    there = faces.to("cuda", torch.float32).requires_grad_()
    sent = block_dct(there, channels)
    assert frequency._fused_on == {"cuda"}  # or there was none
    torch.testing.assert_close(sent.detach().cpu().double(), _expected(faces, channels), rtol=0, atol=1e-3)
    weights = torch.randn(sent.shape, generator=generator(9))
    sent.backward(weights.cuda())
    expected = block_dct_adjoint(weights.double(), channels)
    torch.testing.assert_close(there.grad.cpu().double(), expected, rtol=1e-5, atol=1e-3)
