from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
import torch
from onnx_models import entering_model, linear_model
from torch.nn import functional

from bench.nets.onnx import OnnxEncoder, file_digest, files_of
from bench.nets.options import RANGES

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
    with pytest.raises(ValueError, match=r"must map \(N, 3, H, W\) or"):
        OnnxEncoder(linear_model(tmp_path / "grey.onnx", WEIGHTS, ("n", 1, 8, 24)), CPU)


@pytest.mark.parametrize("place", ["../weights", "/etc/hostname", "nul\0", 300 * "a"])
def test_weights_from_elsewhere_are_not_read(tmp_path, place):
    model = onnx.load(linear_model(tmp_path / "r.onnx", WEIGHTS, FACES))
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    weights.ClearField("raw_data")
    weights.data_location = weights.EXTERNAL
    weights.external_data.add(key="location", value=place)
    (tmp_path / "r.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="only files beside it are read"):
        files_of(tmp_path / "r.onnx")


def test_an_input_larger_than_any_face_is_refused_and_nothing_is_printed(tmp_path, capfd):
    huge = linear_model(tmp_path / "r.onnx", WEIGHTS[:9], ("n", 3, 2**15, 2**15), reshaped=(1, 9))
    with pytest.raises(ValueError, match="values a run"):
        OnnxEncoder(huge, CPU)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="no ONNX model"):
        OnnxEncoder(tmp_path / "text.onnx", CPU)
    assert capfd.readouterr().out == ""


def test_weights_of_another_file_are_found_out(tmp_path):
    network = OnnxEncoder(linear_model(tmp_path / "a.onnx", WEIGHTS, FACES), CPU)
    other = OnnxEncoder(linear_model(tmp_path / "b.onnx", 2 * WEIGHTS, FACES), CPU)
    other.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match="not the file"):
        other(torch.rand(1, 3, 8, 8))


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        OnnxEncoder(linear_model(tmp_path / "nan.onnx", WEIGHTS * np.nan, FACES), CPU)


def test_a_file_is_known_by_all_its_bytes_and_found_from_any_folder(tmp_path, monkeypatch):
    """Recent exporters write the weights into a file of their own, which another export overwrites."""
    path = linear_model(tmp_path / "r.onnx", WEIGHTS, FACES, external="r.onnx.data")
    alone = linear_model(tmp_path / "alone.onnx", WEIGHTS, FACES)
    assert files_of(path) == (path, tmp_path / "r.onnx.data")
    assert files_of(alone) == (alone,)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    network, faces = OnnxEncoder(path, CPU), torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(network(faces), OnnxEncoder(alone, CPU)(faces))

    graph, before = path.read_bytes(), file_digest(path)
    linear_model(path, 2 * WEIGHTS, FACES, external="r.onnx.data")
    assert path.read_bytes() == graph
    other = OnnxEncoder(path, CPU)
    assert before == network.sha256 != other.sha256 == file_digest(path)
    other.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match="not the file"):
        other(faces)
    (tmp_path / "r.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"r\.onnx keeps weights in r\.onnx\.data, which is not beside it"):
        OnnxEncoder(path, CPU)


def people(count=24, seed=0):
    """Two faces of each person, uint8 (2 count, 3, 8, 8), alike but for some noise and their blue, and all pairs."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(count, 3, 8, 8, generator=generator).repeat_interleave(2, dim=0)
    faces = 0.8 * own + 0.2 * torch.rand(own.shape, generator=generator)
    faces[:, 2] = torch.rand(faces[:, 2].shape, generator=generator)
    faces = faces.mul(255).to(torch.uint8)
    pairs = torch.triu_indices(2 * count, 2 * count, 1)
    return faces, pairs, pairs[0] // 2 == pairs[1] // 2


#: A network that looks at red most and at blue not at all.
RED = np.random.default_rng(1).normal(size=(3, 64, 32)).astype(np.float32) / 8
RED = (RED * np.float32([1, 0.3, 0])[:, None, None]).reshape(192, 32)

#: What stands before a network that is fed (x - 127.5) / 128 of values from 0 to 255, RGB, NCHW, for it to be fed so.
ENTRIES = {
    ("(255x-127.5)/128", "RGB", "NCHW"): ([], ""),
    ("0..255", "RGB", "NCHW"): ([("Sub", 127.5), ("Mul", 1 / 128)], "Sub 127.5, Mul 0.0078125"),
    ("0..1", "RGB", "NCHW"): ([("Div", [0.2, 0.2, 0.2]), ("Sub", [2.5, 2.5, 2.5])], "Div 0.2, Sub 2.5"),
    ("0..255", "BGR", "NHWC"): ([("Sub", 127.5), ("Mul", 1 / 128)], "Sub 127.5, Mul 0.0078125"),
    ("(255x-127.5)/128", "BGR", "NHWC"): ([], ""),
}


@pytest.mark.parametrize("said", [True, False], ids=["in the graph", "in the weights"])
@pytest.mark.parametrize(("form", "entry"), ENTRIES.items(), ids=map(" ".join, ENTRIES))
def test_what_a_network_is_fed_is_found_out(tmp_path, form, entry, said):
    """Units that saturate tell ranges apart: out of its range a network sees little more than signs."""
    (span, colours, layout), (operations, told) = form, entry
    path = entering_model(tmp_path / "r.onnx", RED, operations, colours=colours, layout=layout, hidden=not said)
    network = OnnxEncoder(path, CPU)
    assert network.layout == layout
    assert network.normalisation == (told if said else "")
    network.probe(*people())
    assert (network.input_range, network.colours) == (span, colours)
    faces = people()[0][:5].float() / 255
    scale, shift = RANGES[span]
    fed = scale * faces + shift
    for operation, value in operations:
        value = torch.as_tensor(value).view(-1, 1, 1)
        fed = {"Sub": fed - value, "Mul": fed * value, "Div": fed / value}[operation]
    expected = torch.tanh(fed.flatten(1) @ torch.from_numpy(RED) + 0.5)
    torch.testing.assert_close(network(faces), expected, rtol=1e-3, atol=1e-3)
    again = OnnxEncoder(path, CPU)  # as an attack is read back
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(faces), network(faces))


@pytest.mark.parametrize("reshaped", [[1, -1], [1, 192]], ids=["runs the faces together", "fails on two"])
def test_a_graph_that_takes_one_face_at_a_time_gets_them_one_by_one(tmp_path, capfd, reshaped):
    network = OnnxEncoder(linear_model(tmp_path / "one.onnx", WEIGHTS, FACES, reshaped=reshaped), CPU)
    assert network.batch_size == 1
    faces, whole = torch.rand(3, 3, 8, 8), OnnxEncoder(linear_model(tmp_path / "all.onnx", WEIGHTS, FACES), CPU)
    assert whole.batch_size is None
    torch.testing.assert_close(network(faces), whole(faces))
    assert capfd.readouterr().err == ""


def test_a_graph_that_fails_on_a_face_is_refused_in_one_line(tmp_path, capfd):
    path = linear_model(tmp_path / "broken.onnx", WEIGHTS, ("n", 3, 8, "w"), reshaped=[1, 192])
    with pytest.raises(ValueError, match=r"broken\.onnx fails on 1 face\(s\) .*Reshape node") as caught:
        OnnxEncoder(path, CPU)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
