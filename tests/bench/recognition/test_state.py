from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.errors import BenchError, DataError, MissingError
from bench.nets.checkpoints import FORMAT, load_recogniser, load_tensors
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import resumed, save_recogniser, save_tensors, write_tensors

SHAPE = (3, 16, 16)


def test_a_recogniser_survives_the_file(tmp_path: Path) -> None:
    recogniser = build_recogniser("ir-tiny", SHAPE, 32, dropout=0.25, seed=3)
    representation = torch.randn(4, *SHAPE)
    recogniser(representation)  # moves the statistics off their start
    save_recogniser(recogniser, tmp_path / "deep" / "r.safetensors", {"losses": [1.5, 0.5]})
    loaded, details = load_recogniser(tmp_path / "deep" / "r.safetensors")
    assert details == {"losses": [1.5, 0.5]}
    assert loaded.spec == recogniser.spec
    assert not loaded.training
    assert torch.equal(loaded.embed(representation), recogniser.eval().embed(representation))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.safetensors"]
    frozen = dict(recogniser.named_parameters())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {n: p.requires_grad for n, p in frozen.items()}


def test_tensors_of_any_layout_and_type_survive(tmp_path: Path) -> None:
    tensors = {
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "half": torch.randn(3).bfloat16(),
    }
    save_tensors(tmp_path / "t", tensors, {"a": [1, None, "x"]})
    loaded, details = load_tensors(tmp_path / "t")
    assert details == {"a": [1, None, "x"]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    save_tensors(path, {"x": torch.zeros(1)}, {"version": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.recognition.state.save_file", full)
    with pytest.raises(BenchError, match=r"cannot write .*No space left on device.*--out"):
        save_tensors(path, {"x": torch.ones(1)}, {"version": 2})
    assert load_tensors(path)[1] == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file where a folder should be")
    with pytest.raises(BenchError, match=r"cannot write .*x\.safetensors: .*free some space"):
        write_tensors(tmp_path / "folder" / "x.safetensors", {"a": torch.ones(2)})


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no checkpoint at .*none\.safetensors"):
        load_recogniser(tmp_path / "none.safetensors")
    path = tmp_path / "r.safetensors"
    save_recogniser(build_recogniser("ir-tiny", SHAPE, 32), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"r\.safetensors"):
        load_recogniser(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "other", "details": "{}"},
        {"format": FORMAT, "details": "[1]"},
        {"format": FORMAT},
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "t", metadata=metadata)
    with pytest.raises(DataError, match="cannot read checkpoint"):
        load_tensors(tmp_path / "t")


@pytest.mark.parametrize(
    "spec",
    [
        {"backbone": "ir-tiny", "representation_shape": [3, 64, 64], "embedding_size": 32},  # other weights
        {"backbone": "nothing", "representation_shape": [3, 16, 16], "embedding_size": 32},
        {"backbone": "ir-tiny", "representation_shape": [3, 16], "embedding_size": 32},
        {"backbone": "ir-tiny", "representation_shape": [3, 16, 16], "embedding_size": 32, "colour": 1},
        {"backbone": "ir-tiny"},
    ],
)
def test_weights_that_do_not_fit_their_spec_are_refused(tmp_path: Path, spec: dict[str, object]) -> None:
    weights = build_recogniser("ir-tiny", SHAPE, 32).state_dict()
    save_tensors(tmp_path / "r", weights, {"spec": spec, "details": {}})
    with pytest.raises(DataError, match="holds no usable recogniser"):
        load_recogniser(tmp_path / "r")


class TestResumed:
    def test_what_was_made_is_read_again_and_not_made_again(self, tmp_path: Path) -> None:
        made = {"rows": torch.arange(6.0).view(2, 3).T, "known": torch.tensor([True, False]), "number": torch.tensor(7)}
        first = resumed(tmp_path / "part", lambda: made)
        again = resumed(tmp_path / "part", lambda: pytest.fail("it is there"))
        for tensors in (first, again):
            assert tensors.keys() == made.keys()
            assert all(torch.equal(tensors[name], value) for name, value in made.items())

    @pytest.mark.parametrize("damage", ["bit", "half", "name", "unmarked"])
    def test_what_is_not_what_was_written_is_made_anew_with_a_warning(
        self, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, made = tmp_path / "part", {"rows": torch.ones(4)}
        resumed(path, lambda: made)
        content = path.read_bytes()
        if damage == "bit":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "half":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "name":
            path.write_bytes(content.replace(b'"rows"', b'"worn"'))
        else:
            save_file(made, path)
        assert torch.equal(resumed(path, lambda: made)["rows"], made["rows"])
        assert "made anew" in caplog.text
        assert torch.equal(resumed(path, lambda: pytest.fail("it is there"))["rows"], made["rows"])
