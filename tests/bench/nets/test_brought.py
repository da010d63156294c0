"""Recognisers that somebody brings along, in files of torch's own kinds or as plug-ins."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import re
import struct
import warnings
import zipfile
from importlib.metadata import EntryPoint

import numpy as np
import onnx
import pytest
import torch
from onnx_models import entering_model, linear_model
from torch import nn

from bench import plugins
from bench.commands.list import catalogue
from bench.errors import UsageError
from bench.nets.brought import digest_of, open_recogniser, plugin_module
from bench.nets.encoder import BroughtRecogniser
from bench.nets.onnx import OnnxEncoder
from bench.nets.options import InputForm

SIDE = 16
WEIGHTS = np.random.default_rng(0).normal(size=(3 * 8 * 8, 4)).astype(np.float32)


class Net(nn.Module):
    """A convolution and a linear layer, of a picture of 16 pixels a side."""

    def __init__(self, channels=3, last=False):
        super().__init__()
        self.last = last
        self.body = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.PReLU(4), nn.Flatten(), nn.Linear(196, 8))

    def forward(self, x):
        return self.body(x.permute(0, 3, 1, 2) if self.last else x)


def network(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options).eval()


def exported(path, net, shape, *, free=True):
    batch = ({0: torch.export.Dim("batch", min=1, max=512)},) if free else None
    torch.export.save(torch.export.export(net, (torch.rand(2 if free else 1, *shape),), dynamic_shapes=batch), path)
    return path


def scripted(path, net, shape=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(net) if shape is None else torch.jit.trace(net, torch.rand(1, *shape))
        made.save(path)
    return path


def faces(count=5, channels=3):
    return torch.rand(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


SMALL = InputForm(size=(SIDE, SIDE))


def test_an_exported_program_says_what_its_input_is(tmp_path):
    for last in (False, True):
        net = network(last=last)
        shape = (SIDE, SIDE, 3) if last else (3, SIDE, SIDE)
        brought = open_recogniser(exported(tmp_path / "net.pt2", net, shape))
        assert (brought.format, brought.layout) == ("torch.export", "NHWC" if last else "NCHW")
        assert (brought.input_size, brought.batch_size, brought.embedding_size) == ((SIDE, SIDE), None, 8)
        fed = (255 * faces() - 127.5) / 128
        expected = net(fed.movedim(1, 3) if last else fed)
        torch.testing.assert_close(brought(faces()), expected, rtol=1e-4, atol=1e-4)


def test_an_exported_program_of_one_face_gets_them_one_by_one(tmp_path):
    net = network(channels=27)
    brought = open_recogniser(exported(tmp_path / "net.pt2", net, (27, SIDE, SIDE), free=False))
    assert (brought.channels, brought.batch_size) == (27, 1)
    torch.testing.assert_close(brought(faces(channels=27)), net(faces(channels=27)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [None, (3, SIDE, SIDE)], ids=["script", "trace"])
def test_torchscript_is_run_with_gradients_and_can_be_copied(tmp_path, shape):
    net = network()
    brought = open_recogniser(scripted(tmp_path / "net.pt", net, shape), given=SMALL)
    recogniser = copy.deepcopy(BroughtRecogniser(brought, (3, SIDE, SIDE))).requires_grad_(False).train()
    x = faces().requires_grad_()
    recogniser(x).square().sum().backward()
    y = faces().requires_grad_()
    net((255 * y - 127.5) / 128).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in brought.parameters())


def test_the_field_s_size_is_tried_where_a_file_does_not_tell(tmp_path):
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], 112, 112, 3).mean(1).flatten(1)

    assert open_recogniser(scripted(tmp_path / "net.pt", Large())).input_size == (112, 112)
    with pytest.raises(ValueError, match=r"fails on 1 face.*\(1, 3, 112, 112\)"):
        open_recogniser(scripted(tmp_path / "small.pt", network()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": 32}, "size of its input is 16, and 32"),
        ({"layout": "NHWC"}, "layout of its input is NCHW, and NHWC"),
        ({"batch": 3}, "batch of its input is 1, and 3"),
    ],
)
def test_what_contradicts_a_file_is_refused(tmp_path, given, words):
    path = exported(tmp_path / "net.pt2", network(), (3, SIDE, SIDE), free=False)
    with pytest.raises(UsageError, match=words):
        open_recogniser(path, given=InputForm(**given))


def test_a_range_that_a_graph_does_not_normalise_is_refused(tmp_path):
    path = entering_model(tmp_path / "net.onnx", WEIGHTS, [("Sub", 127.5), ("Mul", 1 / 128)])
    assert OnnxEncoder(path, torch.device("cpu")).input_range == "0..255"
    with pytest.raises(UsageError, match=r"normalises its input itself .* and not for 0\.\.1"):
        OnnxEncoder(path, torch.device("cpu"), InputForm(range="0..1"))
    path = exported(tmp_path / "net.pt2", network(channels=27), (27, SIDE, SIDE))
    with pytest.raises(UsageError, match="27 channels, as a defence sends them"):
        open_recogniser(path, given=InputForm(range="0..1"))


def test_what_is_given_is_fed_and_not_tried(tmp_path):
    path = linear_model(tmp_path / "net.onnx", WEIGHTS, ("n", 3, 8, 8))
    brought = open_recogniser(path, given=InputForm(range="0..255", colours="BGR", batch=2))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    brought.probe(x, torch.tensor([[0, 0], [1, 2]]), torch.tensor([True, False]))
    expected = (255 * x.flip(1)).flatten(1) @ torch.from_numpy(WEIGHTS)
    torch.testing.assert_close(brought(x), expected, rtol=1e-4, atol=1e-2)
    assert brought.batch_size == 2


def test_onnx_metadata_and_denotations_say_what_the_input_is(tmp_path):
    path = linear_model(tmp_path / "net.onnx", WEIGHTS, ("n", "a", "b", "c"))
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"Image.NominalPixelRange": "Normalized_1_1", "Image.BitmapPixelFormat": "Bgr8"})
    axes = ("DATA_BATCH", "DATA_FEATURE", "DATA_FEATURE", "DATA_CHANNEL")
    for axis, denotation in zip(model.graph.input[0].type.tensor_type.shape.dim, axes, strict=True):
        axis.denotation = denotation
    onnx.save(model, path)
    brought = open_recogniser(path, given=InputForm(size=8))
    assert (brought.layout, brought.input_range, brought.colours) == ("NHWC", "-1..1", "BGR")
    assert not brought.is_open
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (2 * x - 1).flip(1).movedim(1, 3).flatten(1) @ torch.from_numpy(WEIGHTS)
    torch.testing.assert_close(brought(x), expected, rtol=1e-4, atol=1e-4)


def test_torchscript_of_another_layout_and_onnx_of_other_channels_are_read(tmp_path):
    net = network(last=True)
    brought = open_recogniser(scripted(tmp_path / "net.pt", net), given=SMALL)
    assert brought.layout == "NHWC"
    expected = net(((255 * faces() - 127.5) / 128).movedim(1, 3))
    torch.testing.assert_close(brought(faces()), expected, rtol=1e-4, atol=1e-4)
    weights = np.random.default_rng(0).normal(size=(27 * 64, 4)).astype(np.float32)
    path = linear_model(tmp_path / "net.onnx", weights, ("n", 27, 8, 8))
    sent = 90 * torch.randn(2, 27, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sent.flatten(1) @ torch.from_numpy(weights)
    torch.testing.assert_close(open_recogniser(path)(sent), expected, rtol=1e-4, atol=1e-2)


def test_a_layout_that_no_graph_tells_is_given(tmp_path):
    path = linear_model(tmp_path / "net.onnx", WEIGHTS, ("n", "a", "b", "c"))
    assert open_recogniser(path, given=InputForm(size=8, layout="NHWC")).layout == "NHWC"
    with pytest.raises(ValueError, match="takes 27 channels: name a recogniser of plain faces"):
        open_recogniser(exported(tmp_path / "n.pt2", network(channels=27), (27, SIDE, SIDE)), pictures=True)


# -- hostile and damaged files ---------------------------------------------------------------------


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def repacked(source, path, change):
    """Write a zip file again with some of its members changed: name -> bytes."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return path


#: How the parts of an exported program end, as torch writes them now and as it did before.
GRAPH = ("models/model.json", "serialized_exported_program.json")
FIRST_WEIGHTS = ("weights/weight_0", "serialized_state_dict.pt")
EXAMPLE = ("sample_inputs/model.pt", "serialized_example_inputs.pt")


def member(ends, made):
    """Change the members whose names end so."""
    return lambda name, content: made(content) if name.endswith(ends) else content


def edited(edit):
    def made(content):
        document = json.loads(content)
        edit(document["graph_module"]["graph"])
        return json.dumps(document)

    return member(GRAPH, made)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return (
        exported(folder / "net.pt2", network(), (3, SIDE, SIDE)),
        scripted(folder / "net.pt", network()),
    )


def call(graph):
    graph["nodes"][0]["target"] = "torch.os.system"


def size(graph):
    graph["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = "exec('import os; os.mkdir(TRAP)')"


def symbol(graph):
    graph["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = "Add('exec(1)', Symbol('s0'))"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edited(call), "calls torch.os.system, which is no operation"),
        (edited(size), "size that is no arithmetic"),
        (edited(symbol), "size that is no arithmetic"),
        (member(GRAPH, lambda content: content[:99]), "damaged: its .*json"),
        (member(FIRST_WEIGHTS, lambda content: content[:8]), "no exported program that torch can load"),
        (lambda name, content: content, None),
    ],
    ids=["operation", "size", "symbol", "cut graph", "cut weights", "as it is"],
)
def test_exported_programs_that_would_do_something_else_are_not_loaded(tmp_path, good, change, words):
    path = repacked(good[0], tmp_path / "net.pt2", change)
    if words is None:
        assert open_recogniser(path).embedding_size == 8
        return
    with pytest.raises(ValueError, match=words) as caught:
        open_recogniser(path)
    assert "\n" not in str(caught.value)


def test_no_pickle_runs_code(tmp_path, good):
    trap = tmp_path / "trap"
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": Hostile(trap)}, protocol=2))
    torch.save({"a.weight": torch.rand(2), "b": Hostile(trap)}, tmp_path / "new.pth")
    torch.save(network(), tmp_path / "whole.pth")
    held = io.BytesIO()
    torch.save(((Hostile(trap),), {}), held)
    repacked(good[0], tmp_path / "net.pt2", member(EXAMPLE, lambda _: held.getvalue()))
    for name, words in {
        "old.pth": r"asks for posix\.mkdir",
        "new.pth": r"asks for posix\.mkdir",
        "whole.pth": r"asks for .*Net, and weights are all",
        "net.pt2": "no exported program that torch can load",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            open_recogniser(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not trap.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_compiled_code_and_programs_that_touch_files_are_refused(tmp_path, good):
    with zipfile.ZipFile(good[0]) as before, zipfile.ZipFile(tmp_path / "net.pt2", "w") as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
        after.writestr("net/data/aotinductor/model/model.so", b"\x7fELF")
    with pytest.raises(ValueError, match="compiled code, which is not run"):
        open_recogniser(tmp_path / "net.pt2")

    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "stolen")
            return x.flatten(1)

    with pytest.raises(ValueError, match=r"reads or writes files \(aten::save\)"):
        open_recogniser(scripted(tmp_path / "net.pt", Writing()))


@pytest.mark.parametrize("name", ["data.pkl", "constants.pkl"])
def test_scripts_whose_pickles_end_too_early_are_not_loaded(tmp_path, good, name):
    """Torch would read on, in what the memory held before."""
    path = repacked(good[1], tmp_path / "net.pt", member(f"/{name}", lambda content: content[:-1]))
    with pytest.raises(ValueError, match=rf"net\.pt is damaged: its .*/{name} cannot be read"):
        open_recogniser(path)


def test_archives_that_say_they_unpack_to_more_than_code_are_not_loaded(tmp_path, good):
    """By their directory, which is what decides how much is taken for them."""
    data = bytearray(good[1].read_bytes())
    entries = [at.start() for at in re.finditer(re.escape(b"PK\1\2"), data)]
    packed = [at for at in entries if struct.unpack_from("<H", data, at + 10)[0] == zipfile.ZIP_DEFLATED]
    struct.pack_into("<I", data, packed[0] + 24, 2**31)
    (tmp_path / "net.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"net\.pt unpacks to 2048 MiB"):
        open_recogniser(tmp_path / "net.pt")


def test_damaged_programs_are_told_of_once(tmp_path, good, caplog, capfd):
    path = repacked(good[0], tmp_path / "net.pt2", member(FIRST_WEIGHTS, lambda content: content[:8]))
    with pytest.raises(ValueError, match="no exported program that torch can load"):
        open_recogniser(path)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")
    assert not logging.getLogger("torch.export").disabled


def test_what_is_no_model_or_cut_short_is_refused_in_one_line(tmp_path, good):
    torch.save({"a": torch.rand(4000)}, tmp_path / "new.pth")
    torch.save({"a": torch.rand(4000)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for source in (*good, tmp_path / "new.pth", tmp_path / "old.pth"):
        whole = source.read_bytes()
        for share in (0.3, 0.9):
            path = tmp_path / f"cut-{source.name}"
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=r"cut short|damaged") as caught:
                open_recogniser(path)
            assert "\n" not in str(caught.value)
    for content in (b"", b"# notes\n", b"\x00" * 64):
        (tmp_path / "notes.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is no recogniser: expected an ONNX file"):
            open_recogniser(tmp_path / "notes.pt")
    (tmp_path / "r.safetensors").write_bytes((100).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(ValueError, match=r"r\.safetensors is damaged"):
        open_recogniser(tmp_path / "r.safetensors")


# -- plug-ins --------------------------------------------------------------------------------------


class PluggedIn(Net):
    representation_shape = (27, SIDE, SIDE)

    def __init__(self):
        super().__init__(channels=27)


def no_shape():
    return network()


def no_network():
    return 3


@pytest.fixture
def registered(monkeypatch):
    """Entry points of recognisers, as installed packages have them."""
    entries = [EntryPoint(name, f"{__name__}:{made}", "bench.recognisers") for name, made in NAMES.items()]
    for entry, made in zip(entries, NAMES.values(), strict=True):
        monkeypatch.setattr(type(entry), "load", lambda self: globals()[self.attr], raising=False)
        assert made in globals()
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "bench.recognisers" else [])
    plugins.recognisers.cache_clear()
    yield
    plugins.recognisers.cache_clear()


NAMES = {"my-net": "PluggedIn", "shapeless": "no_shape", "number": "no_network"}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["recognisers", "recognizer"])
def test_what_can_be_named_or_brought_is_listed(kind):
    listed = {entry["name"]: entry["given as"] for entry in catalogue(kind)}
    assert {name: listed.get(name) for name in NAMES} == {name: f"--recogniser {name}" for name in NAMES}
    assert (listed["TFace IR"], listed["ir-50"]) == ("--recogniser FILE", "--backbone ir-50")


@pytest.mark.usefixtures("registered")
def test_a_plug_in_is_named_instead_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = tmp_path.relative_to(tmp_path) / "my-net"
    brought = open_recogniser(name)
    assert (brought.format, brought.architecture, brought.channels) == ("plug-in", "PluggedIn", 27)
    net = plugins.recognisers().get("my-net")
    sent = 50 * faces(channels=27)
    torch.testing.assert_close(brought(sent), net(sent))
    assert plugin_module(name) == __name__
    before = digest_of(name)
    with torch.no_grad():
        net.body[0].weight[0, 0, 0, 0] += 1
    assert digest_of(name) != before
    for wrong, error, words in (
        ("shapeless", ValueError, "must say its representation_shape"),
        ("number", UsageError, "no torch.nn.Module but int"),
    ):
        with pytest.raises(error, match=words):
            open_recogniser(name.with_name(wrong))
