"""Devices and precision by name."""

import pytest
import torch

import bench.device as device_module
from bench.device import make_fabric, make_shared_fabric
from bench.errors import UsageError
from bench.launch import Launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


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


def test_without_torchrun_there_is_one_process():
    assert Launch.here({}) == Launch.here({"WORLD_SIZE": "4", "RANK": "1"}) == Launch(0, 1, 0, 1)  # another launcher's
    assert Launch.here({}).leads


def test_torchrun_is_noticed():
    launch = Launch.here(TORCHRUN)
    assert launch == Launch(rank=3, size=4, local_rank=1, local_size=2)
    assert not launch.leads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "x"}, "torchrun's environment is incomplete"),
        ({"WORLD_SIZE": "5"}, "5 processes do not divide into machines of 2"),
    ],
)
def test_an_impossible_launch_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        Launch.here(TORCHRUN | change)
    with pytest.raises(UsageError, match="incomplete"):
        Launch.here({name: value for name, value in TORCHRUN.items() if name != "RANK"})


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
def test_each_process_takes_the_gpu_of_its_number():
    choose = device_module._choose
    assert choose("cuda", Launch.here(TORCHRUN)) == ("cuda", 1)
    assert choose("auto", Launch()) == ("cuda", 0)
    assert choose("cuda:2", Launch()) == ("cuda", 2)
    with pytest.raises(UsageError, match="cuda:2 is one device: under torchrun use --device cuda"):
        choose("cuda:2", Launch.here(TORCHRUN))
    with pytest.raises(UsageError, match="no device cuda:4 here: there are 4"):
        choose("cuda", Launch(4, 5, 4, 5))


def test_processes_cannot_share_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="MPS is one device"):
        make_shared_fabric("mps", "32-true", Launch(0, 2, 0, 2))
