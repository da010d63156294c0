"""Devices and precision by name."""

import pytest
import torch

from bench.device import make_fabric
from bench.errors import UsageError


def test_cpu():
    fabric = make_fabric("cpu", "32-true")
    assert fabric.device == torch.device("cpu")
    assert fabric._precision.precision == "32-true"


def test_auto_takes_what_is_there():
    kind = make_fabric("auto", "auto").device.type
    assert kind == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cpu:1", "cuda:x", "", "mps:0"])
def test_unknown(name):
    with pytest.raises(UsageError, match="unknown device"):
        make_fabric(name, "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent():
    with pytest.raises(UsageError, match="no CUDA device here"):
        make_fabric("cuda", "auto")
