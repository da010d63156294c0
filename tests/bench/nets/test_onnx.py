from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from onnx_models import linear_model
from torch.nn import functional

from bench.nets.onnx import OnnxEncoder

WEIGHTS = np.random.default_rng(0).normal(size=(3 * 8 * 8, 4)).astype(np.float32)


FACES = ("n", 3, 8, 8)
CPU = torch.device("cpu")


def test_an_onnx_file_is_fed_what_the_field_feeds_it(tmp_path):
    path = linear_model(tmp_path / "r.onnx", WEIGHTS, FACES)
    network = OnnxEncoder(path, CPU)
    faces = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = ((255 * faces - 127.5) / 128).flatten(1) @ torch.from_numpy(WEIGHTS)
    torch.testing.assert_close(network(faces), expected, rtol=1e-4, atol=1e-4)
    assert network.embedding_size == 4
    assert bytes(network.digest.tolist()) == hashlib.sha256(path.read_bytes()).digest()


def test_other_sizes_are_resized_and_fixed_batches_filled(tmp_path):
    network = OnnxEncoder(linear_model(tmp_path / "r.onnx", WEIGHTS, (2, 3, 8, 8)), CPU)
    faces = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = functional.interpolate(faces, (8, 8), mode="bilinear", antialias=True).clamp(0, 1)
    assert network(faces).shape == (5, 4)
    torch.testing.assert_close(network(faces), network(small))


def test_files_that_are_no_recogniser_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.onnx does not exist"):
        OnnxEncoder(tmp_path / "absent.onnx", CPU)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="no ONNX model"):
        OnnxEncoder(tmp_path / "text.onnx", CPU)
    with pytest.raises(ValueError, match=r"must map \(N, 3, H, W\)"):
        OnnxEncoder(linear_model(tmp_path / "grey.onnx", WEIGHTS, ("n", 1, 8, 24)), CPU)


def test_weights_of_another_file_are_found_out(tmp_path):
    network = OnnxEncoder(linear_model(tmp_path / "a.onnx", WEIGHTS, FACES), CPU)
    other = OnnxEncoder(linear_model(tmp_path / "b.onnx", 2 * WEIGHTS, FACES), CPU)
    other.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match="not the file"):
        other(torch.rand(1, 3, 8, 8))


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    network = OnnxEncoder(linear_model(tmp_path / "nan.onnx", WEIGHTS * np.nan, FACES), CPU)
    with pytest.raises(ValueError, match="not finite"):
        network(torch.rand(1, 3, 8, 8))
