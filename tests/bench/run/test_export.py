"""Exported networks, compared with torch by onnxruntime; nothing is trained longer than it takes to have a range."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench import plugins
from bench.errors import BenchError, DataError, MissingError, UsageError
from bench.files import sha256
from bench.images import to_float
from bench.metrics.evaluator import Evaluator
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import save_recogniser
from bench.results import PROTOCOL_VERSION
from bench.run import export
from bench.run.config import resolve

SIZE = 32
UNET = {"widths": "4,8", "images": "24", "batch_size": "4", "state_faces": "16"}
TINY = {
    "defense": "none",
    "attack": "unet",
    "image_size": SIZE,
    "backbone": "mobilefacenet",
    "evaluator_backbone": "ir-tiny",
    "device": "cpu",
    "attack_options": UNET,
}


@pytest.fixture
def make_run(tmp_path):
    """A run's folder with a recogniser whose statistics are not those of a fresh one, and a fitted attack."""

    def make(*, attack=True, **changes):
        config = resolve({**TINY, "out": tmp_path, **changes}, {})
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        head = {"protocol": PROTOCOL_VERSION, "run_id": "run", "status": "started"}
        (run / "manifest.json").write_text(json.dumps({**head, "config": config.model_dump(mode="json")}))
        defense = plugins.make_defense(config.defense, config.defense_options, config.preset, SIZE)
        faces = export._rendered(config)
        recogniser = build_recogniser(config.backbone, defense.representation_shape, 16, seed=3)
        for module in recogniser.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.momentum = 1.0
        with torch.no_grad():
            recogniser.train()(defense.protect(to_float(faces.images), torch.Generator().manual_seed(0)).representation)
        save_recogniser(recogniser.eval(), run / "checkpoints" / "recogniser.safetensors")
        if attack:
            fitted = plugins.make_attack(config.attack, config.attack_options, config.preset)
            fitted.learn(export._adversary(config, defense, faces))
            save_file(
                {name: tensor.contiguous() for name, tensor in fitted.state_dict().items()},
                run / "checkpoints" / "attack.safetensors",
            )
            make.attack = fitted.eval()
        make.recogniser, make.defense, make.faces = recogniser, defense, faces
        return run

    return make


def onnx(path, **inputs):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def test_a_recogniser_of_plain_faces_can_judge(make_run, tmp_path):
    run = make_run(attack=False)
    written = export.export(run, "recogniser", tmp_path / "r.onnx")
    assert written.evaluator
    assert written.inputs == {"input": ("batch", 3, SIZE, SIZE)}
    assert written.difference <= 1e-4
    evaluator = Evaluator.from_file(tmp_path / "r.onnx")
    assert evaluator.input_size == (SIZE, SIZE)
    ours = Evaluator(make_run.recogniser, "torch", (SIZE, SIZE))
    faces = to_float(make_run.faces.images)
    found, expected = evaluator.embed(faces), ours.embed(faces)
    assert (found - expected).abs().max() <= 1e-4
    assert expected.std(dim=0).max() > 1e-3  # faces are told apart: the comparison is of something


@pytest.mark.parametrize("backbone", ["mobilefacenet", "ir-18", "vit-tiny", "partialformer-tiny"])
def test_a_recogniser_of_protected_faces(make_run, tmp_path, backbone):
    run = make_run(attack=False, defense="partialface", backbone=backbone)
    written = export.export(run, "recogniser", tmp_path / "r.onnx")
    assert not written.evaluator
    assert written.inputs == {"representation": ("batch", 27, SIZE, SIZE)}
    sent = make_run.defense.protect(to_float(make_run.faces.images), torch.Generator().manual_seed(1)).representation
    with torch.no_grad():
        expected = make_run.recogniser(sent[:5])
    found = torch.from_numpy(onnx(tmp_path / "r.onnx", representation=sent[:5]))
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"defense": "partialface"},
        {"defense": "partialface", "attack_options": {**UNET, "infer_state": "false"}},
        {"defense": "partialface", "attack_options": {**UNET, "input": "sorted-colours"}},
        {"defense": "partialface", "knowledge": "oracle", "attack_options": {**UNET, "stem_stride": "2"}},
        {"defense": "partialface", "knowledge": "blackbox", "attack_options": {**UNET, "infer_state": "false"}},
    ],
    ids=["none", "reads states", "mixture", "sorted", "oracle", "blackbox"],
)
def test_the_network_of_the_attack(make_run, tmp_path, changes):
    run = make_run(**changes)
    written = export.export(run, "attack", tmp_path / "a.onnx")
    network, shapes = make_run.attack.network, written.inputs
    assert shapes["representation"][0] == "batch"
    generator = torch.Generator().manual_seed(2)
    count = 5 if shapes["representation"][0] == "batch" else 1
    inputs = {"representation": 50 * torch.randn(count, *shapes["representation"][1:], generator=generator)}
    if "layout" in shapes:
        inputs["layout"] = torch.stack([torch.randperm(shapes["layout"][1], generator=generator) for _ in range(count)])
    with torch.no_grad():
        expected = network(*inputs.values())
    found = torch.from_numpy(onnx(tmp_path / "a.onnx", **inputs))
    assert found.shape == (count, 3, SIZE, SIZE)
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert expected.std() > 1e-3


def test_a_file_that_computes_something_else_is_not_written(make_run, tmp_path, monkeypatch):
    run = make_run(attack=False)
    real = export._write

    def other(network, inputs, *rest, **options):
        real(nn.Sequential(network, nn.Hardtanh(-1e-3, 1e-3)), inputs, *rest, **options)

    monkeypatch.setattr(export, "_write", other)
    with pytest.raises(BenchError, match="computes something else: its output differs"):
        export.export(run, "recogniser", tmp_path / "r.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_a_network_that_cannot_be_expressed(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    with pytest.raises(BenchError, match="cannot be expressed in ONNX"):
        export._write(Odd(), [torch.rand(2, 3)], tmp_path / "o.onnx", ["x"], "y", free=True)


def test_runs_that_cannot_be_exported(make_run, tmp_path, monkeypatch):
    with pytest.raises(MissingError, match="is no run"):
        export.export(tmp_path, "recogniser", tmp_path / "r.onnx")
    run = make_run(attack=False)
    with pytest.raises(MissingError, match=r"keeps no attack \(checkpoints: recogniser\)"):
        export.export(run, "attack", tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="must be recogniser or attack, got 'evaluator'"):
        export.export(run, "evaluator", tmp_path / "a.onnx")
    with pytest.raises(UsageError, match=r"ends in \.onnx"):
        export.export(run, "recogniser", tmp_path / "a.pt")
    save_file({"network.mean": torch.zeros(3)}, run / "checkpoints" / "attack.safetensors")
    with pytest.raises(DataError, match="does not hold the weights of this attack"):
        export.export(run, "attack", tmp_path / "a.onnx")
    manifest = run / "manifest.json"
    document = json.loads(manifest.read_text())
    document["config"] |= {"attack": "linear", "attack_options": {}}
    manifest.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="attack linear trains no network"):
        export.export(run, "attack", tmp_path / "a.onnx")
    manifest.write_text('{"config": {"nonsense": 1}}')
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        export.export(run, "recogniser", tmp_path / "r.onnx")


def test_the_command(make_run, bench):
    run = make_run(attack=False)
    arguments = ("export", run, "--what", "recogniser", "--out", "r.onnx")
    code, said, _ = bench(*arguments)
    assert code == 0
    assert f"input batchx3x{SIZE}x{SIZE} -> embedding" in said
    assert said.endswith("can be an --evaluator\n")
    assert sha256(Path("r.onnx")) in Path("r.md").read_text()
    Path("r.onnx").unlink()
    Path("r.md").write_text("notes")  # of somebody, and no card
    code, _, error = bench(*arguments)
    assert (code, Path("r.md").read_text(), Path("r.onnx").exists()) == (2, "notes", False)
    assert "r.md exists" in error
    code, document, _ = bench(*arguments, "--overwrite", "--json")
    assert code == 0
    assert json.loads(document)["output"] == "embedding"
    assert sha256(Path("r.onnx")) in Path("r.md").read_text()
