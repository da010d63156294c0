from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench.errors import MissingError, UsageError
from bench.nets.backbones import BACKBONES
from bench.nets.checkpoints import load_recogniser
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import save_recogniser

SHAPE = (27, 32, 32)


def test_without_timm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what an import finds where the package is missing
    with pytest.raises(MissingError) as caught:
        BACKBONES.get("timm:resnet18")
    assert str(caught.value) == "backbones timm:NAME need timm: pip install ppfr-bench[timm]"
    assert caught.value.exit_code == 5


def test_unknown_networks_are_refused_with_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"timm has no network 'resnet_18': did you mean .*timm:resnet18"):
        BACKBONES.get("timm:resnet_18")
    with pytest.raises(UsageError, match=r"timm has no network 'hf-hub:someone/something'"):
        BACKBONES.get("timm:hf-hub:someone/something")
    with pytest.raises(UsageError, match="Write timm:NAME"):
        BACKBONES.get("timm:")
    with pytest.raises(UsageError, match="Write timm:NAME"):
        BACKBONES.get("timm")


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",  # convolutions
        "mobilenetv3_small_050",  # a layer between pooling and classifier
        "test_vit",  # knows its input size, has a class token
        "test_efficientnet",
    ],
)
def test_networks_take_any_channels_and_survive_a_checkpoint(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    recogniser = build_recogniser(f"timm:{name}", SHAPE, 48, seed=1)
    representation = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    embedding = recogniser.train()(representation)
    assert embedding.shape == (4, 48)
    embedding.square().sum().backward()
    assert all(p.grad is not None for p in recogniser.parameters() if p.requires_grad)

    save_recogniser(recogniser, tmp_path / "r.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loaded, _ = load_recogniser(tmp_path / "r.safetensors")
    assert torch.equal(torch.rand(1), expected)  # loading draws no random numbers
    assert loaded.spec.backbone == f"timm:{name}"
    assert torch.equal(loaded.embed(representation), recogniser.eval().embed(representation))


def test_tables_outside_the_checkpoint_survive_too(tmp_path: Path) -> None:
    """Swin keeps its relative positions in buffers that no state dict holds."""
    pytest.importorskip("timm")
    shape = (3, 64, 64)
    name = "timm:swin_s3_tiny_224"
    recogniser = build_recogniser(name, shape, 32).eval()
    held = set(recogniser.state_dict())
    assert any(buffer not in held for buffer, _ in recogniser.named_buffers())
    save_recogniser(recogniser, tmp_path / "r.safetensors")
    loaded, _ = load_recogniser(tmp_path / "r.safetensors")
    representation = torch.randn(1, *shape)
    torch.testing.assert_close(loaded.embed(representation), recogniser.embed(representation))


def test_the_seed_decides_the_weights() -> None:
    pytest.importorskip("timm")
    first, again, other = (build_recogniser("timm:resnet10t", SHAPE, 32, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["backbone.output.linear.weight"], other["backbone.output.linear.weight"])
    assert not torch.equal(first["backbone.features.conv1.0.weight"], other["backbone.features.conv1.0.weight"])


def test_sizes_that_a_network_cannot_take_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"backbone timm:test_convnext cannot take representations \(27, 4, 4\)"):
        build_recogniser("timm:test_convnext", (27, 4, 4), 32)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_small_maps_pass_a_stem_that_brings_them_near_to_a_face(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    recogniser = build_recogniser(f"timm:{name}", (27, 4, 4), 16, image_size=32, seed=1)
    stem = recogniser.backbone.get_submodule("stem")
    assert stem(torch.zeros(1, 27, 4, 4)).shape == (1, 16, 32, 32)
    representation = torch.randn(4, 27, 4, 4, generator=torch.Generator().manual_seed(0))
    recogniser.train()(representation).square().sum().backward()
    assert all(weight.grad is not None for weight in stem.parameters())
    save_recogniser(recogniser, tmp_path / "small.safetensors")
    again, _ = load_recogniser(tmp_path / "small.safetensors")
    assert again.spec.image_size == 32
    assert torch.equal(again(representation), recogniser.eval()(representation))
