from __future__ import annotations

import pytest
import torch

from attacks import checkpoint


def test_round_trip_of_tensors_and_json(tmp_path):
    folder = tmp_path / "deep" / "fit"
    tensors = {"scalar": torch.tensor(3.5), "view": torch.arange(6).view(2, 3).T, "flags": torch.tensor([True])}
    checkpoint.save(folder, tensors, {"step": 7, "curve": [[1, 0.5]]})
    loaded, meta = checkpoint.load(folder)
    assert meta == {"step": 7, "curve": [[1, 0.5]]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_second_save_replaces_the_first_and_leaves_nothing_beside_it(tmp_path):
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {"step": 1})
    checkpoint.save(tmp_path, {"x": torch.ones(1)}, {"step": 2})
    tensors, meta = checkpoint.load(tmp_path)
    assert (tensors["x"].item(), meta["step"]) == (1.0, 2)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_keeps_the_last_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {"step": 1})

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, {"x": torch.ones(1)}, {"step": 2})
    assert checkpoint.load(tmp_path)[1] == {"step": 1}


def test_nothing_stored_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "absent") is None


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_file_is_named(tmp_path, content):
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {"step": 1})
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(tmp_path)


def test_an_optimizer_continues_as_if_never_stopped(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = build()
    for _ in range(3):
        step(layer, optimizer)
    other, resumed = build()
    other.load_state_dict(layer.state_dict())
    checkpoint.save(tmp_path, checkpoint.flatten_optimizer(optimizer.state_dict()), {})
    checkpoint.restore_optimizer(resumed, checkpoint.load(tmp_path)[0])
    step(layer, optimizer)
    step(other, resumed)
    assert torch.equal(layer.weight, other.weight)
