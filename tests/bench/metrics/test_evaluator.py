"""Evaluators, on models made here."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from bench.data.faces import FaceSet, PairProtocol
from bench.data.verification_pack import read_pack
from bench.errors import DataError, MissingError, UsageError
from bench.metrics.evaluator import Evaluator, check_evaluators, judge_names
from bench.metrics.verification import lfw_accuracy, pair_scores
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import save_recogniser


def make_model(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("N", 3, 16, 16),
    kind: int = TensorProto.FLOAT,
    flat: bool = True,
    weights: np.ndarray | None = None,
    outputs: int = 1,
) -> Path:
    """A linear recogniser: flatten, then one matrix; ``flat=False`` returns the input as it is."""
    nodes, initialisers = [], []
    if flat:
        size = 3 * 16 * 16
        matrix = np.random.default_rng(0).standard_normal((size, 4)) if weights is None else weights
        initialisers.append(helper.make_tensor("w", TensorProto.FLOAT, matrix.shape, matrix.astype(np.float32)))
        nodes.append(helper.make_node("Flatten", ["pixels"], ["flat"]))
        nodes += [helper.make_node("MatMul", ["flat", "w"], [f"out{i}"]) for i in range(outputs)]
        result = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [shape[0], 4]) for i in range(outputs)]
    else:
        nodes.append(helper.make_node("Identity", ["pixels"], ["out0"]))
        result = [helper.make_tensor_value_info("out0", kind, shape)]
    graph = helper.make_graph(
        nodes, "made", [helper.make_tensor_value_info("pixels", kind, shape)], result, initializer=initialisers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def faces(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def expected(batch: torch.Tensor) -> torch.Tensor:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((768, 4))).float()
    views = (((view * 255 - 127.5) / 128).flatten(1) for view in (batch, batch.flip(3)))
    return F.normalize(sum(view @ matrix for view in views))


@pytest.mark.parametrize("batch", ["N", 4])
def test_preprocessing_flip_and_normalisation(tmp_path: Path, batch: int | str) -> None:
    path = make_model(tmp_path / "made.onnx", shape=(batch, 3, 16, 16))
    evaluator = Evaluator.from_file(path, batch_size=3)
    assert (evaluator.name, evaluator.input_size) == ("made", (16, 16))
    described = evaluator.describe()
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (described["files"], described["batch"]) == (["made.onnx"], None if batch == "N" else batch)
    for size in (16, 40, 9):  # of other sizes resized with anti-aliasing
        resized = F.interpolate(faces(7, size), size=(16, 16), mode="bilinear", antialias=True)
        embeddings = evaluator.embed(faces(7, size))
        torch.testing.assert_close(embeddings, expected(resized), atol=1e-5, rtol=1e-4)
    images = (faces(3) * 255).round().to(torch.uint8)
    torch.testing.assert_close(evaluator.embed(images), evaluator.embed(images.float() / 255))


def test_free_spatial_dimensions_mean_112(tmp_path: Path) -> None:
    pooled = tmp_path / "free.onnx"
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    pooled.write_bytes(model.SerializeToString())
    evaluator = Evaluator.from_file(pooled)
    assert evaluator.input_size == (112, 112)
    assert evaluator.embed(faces(2)).shape == (2, 3)


def test_missing_and_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"absent\.onnx does not exist"):
        Evaluator.from_file(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(DataError, match=r"text\.onnx is no ONNX model"):
        Evaluator.from_file(tmp_path / "text.onnx")


@pytest.mark.parametrize(
    "options",
    [
        {"shape": ("N", 1, 16, 48)},
        {"shape": ("N", 768)},
        {"flat": False, "kind": TensorProto.UINT8},
        {"flat": False},
        {"outputs": 2},
    ],
)
def test_other_models_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"other\.onnx must map \(N, 3, H, W\) or .* to embeddings \(N, D\) in float32, but has"
    ):
        Evaluator.from_file(make_model(tmp_path / "other.onnx", **options))


def test_each_judge_counts_once_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = tmp_path / "a" / "model.v1.onnx", tmp_path / "b" / "model.v1.onnx"
    make_model(first)
    make_model(second, weights=np.eye(768, 4))
    check_evaluators([first, second])
    assert judge_names([first, second]) == ["a-model-v1", "b-model-v1"]
    assert judge_names([first]) == ["model-v1"]
    make_model(second)
    with pytest.raises(UsageError, match=r"are one file: each judge counts once"):
        check_evaluators([first, second])
    with pytest.raises(MissingError, match="does not exist"):
        check_evaluators([tmp_path / "none.onnx"])


def test_a_judge_is_probed_on_public_people_or_else_on_the_victims_pairs(tmp_path: Path) -> None:
    """Only the red of a public person, only the blue of a victim stays the same: each tells the colours otherwise."""
    generator = torch.Generator().manual_seed(0)

    def people(count: int, channel: int) -> FaceSet:
        images = torch.randint(0, 256, (2 * count, 3, 16, 16), generator=generator, dtype=torch.uint8)
        images[1::2, channel] = images[::2, channel]
        return FaceSet(images, torch.arange(count).repeat_interleave(2), tuple(map(str, range(count))))

    weights = np.zeros((768, 4), dtype=np.float32)
    weights[:256] = np.random.default_rng(0).standard_normal((256, 4))
    victims = people(20, 2)
    first, second = torch.triu_indices(40, 40, 1)
    pairs = PairProtocol(first, second, victims.labels[first] == victims.labels[second], torch.arange(780) % 2)
    for count, colours in ((20, "RGB"), (3, "BGR")):
        evaluator = Evaluator.from_file(make_model(tmp_path / "red.onnx", weights=weights))
        evaluator.probe(people(count, 0), victims, pairs)
        assert evaluator.describe()["colours"] == colours
        again = Evaluator.from_file(tmp_path / "red.onnx")
        again.form = evaluator.form
        torch.testing.assert_close(again.embed(victims.images), evaluator.embed(victims.images))


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite"):
        Evaluator.from_file(make_model(tmp_path / "nan.onnx", weights=np.full((768, 4), np.nan)))


class Recogniser(nn.Module):
    """Batch norm makes training mode visible, the weights make left and right differ."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.norm = nn.BatchNorm2d(3)
            self.linear = nn.Linear(3 * 8 * 8, 5)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.linear(self.norm(batch).flatten(1))
        return embeddings


def test_a_recogniser_of_the_suite_judges_in_evaluation_mode() -> None:
    network = Recogniser().train()
    evaluator = Evaluator(network, "second", (8, 8), batch_size=2)
    batch = faces(5, 8)
    embeddings = evaluator.embed(batch)
    assert not embeddings.requires_grad
    with torch.no_grad():
        reference = F.normalize(network.eval()(batch) + network(batch.flip(3)))
    torch.testing.assert_close(embeddings, reference)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (faces(2, 8), r"expected \(N, D\)"),
        (faces(2, 8)[:, :1], r"expects faces \(N, 3, H, W\)"),
        (faces(0, 8), "N > 0"),
        (faces(2, 8).long(), "float faces"),
    ],
)
def test_wrong_faces_and_networks_that_return_maps_are_refused(batch: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Evaluator(nn.Identity(), "maps", (8, 8)).embed(batch)


@pytest.mark.realfaces
@pytest.mark.skipif(
    not (os.environ.get("BENCH_DATA_ROOT") and os.environ.get("BENCH_EVALUATOR")),
    reason="needs BENCH_DATA_ROOT (with lfw.bin) and BENCH_EVALUATOR",
)
def test_the_evaluator_verifies_lfw() -> None:
    pack = Path(os.environ["BENCH_DATA_ROOT"]) / "lfw.bin"
    if not pack.is_file():
        pytest.skip(f"no {pack}")
    content = read_pack(pack)
    chosen = torch.arange(0, len(content.same), 20)  # thirty pairs of each fold, half of them genuine
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(content.images[2 * int(i) + side])).convert("RGB"))
            for i in chosen
            for side in (0, 1)
        ]
    )
    evaluator = Evaluator.from_file(Path(os.environ["BENCH_EVALUATOR"]))
    embeddings = evaluator.embed(torch.from_numpy(images).permute(0, 3, 1, 2))
    index = torch.arange(0, 2 * len(chosen), 2)
    protocol = PairProtocol(index, index + 1, torch.from_numpy(content.same)[chosen], chosen // 600)
    accuracy = lfw_accuracy(pair_scores(embeddings, protocol), protocol.same, protocol.fold)
    assert accuracy.mean >= 0.985


def test_a_judge_may_be_any_recogniser_of_plain_faces(tmp_path):
    for channels in (3, 27):
        network = build_recogniser("ir-tiny", (channels, 16, 16), 8).eval()
        save_recogniser(network, tmp_path / f"{channels}.safetensors")
    faces = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = build_recogniser("ir-tiny", (3, 16, 16), 8).eval()
    with torch.no_grad():
        expected = F.normalize(network(faces) + network(faces.flip(-1)))
    judge = Evaluator.from_file(tmp_path / "3.safetensors")
    torch.testing.assert_close(judge.embed(faces), expected)
    assert judge.describe()["input_range"] == "0..1"
    with pytest.raises(DataError, match="takes 27 channels: name a recogniser of plain faces"):
        Evaluator.from_file(tmp_path / "27.safetensors")
