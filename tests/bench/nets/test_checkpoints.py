"""Checkpoints of other people's training code, against what that code computes, written here from its layout."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from bench.nets.brought import open_recogniser
from bench.nets.options import InputForm
from bench.nets.recogniser import build_recogniser
from bench.recognition.state import save_recogniser

SIDE = 32


class Weights(dict):
    """Random weights under their names, each drawn when a forward pass first asks for it."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def drawn(self, name, shape, make):
        if name not in self:
            self[name] = make(torch.randn(shape, generator=self.generator))
        return self[name]

    def conv(self, name, x, channels, size, stride=1, padding=0, groups=1):
        shape = (channels, x.shape[1] // groups, size, size)
        scale = (2 / (shape[1] * size * size)) ** 0.5
        weight = self.drawn(f"{name}.weight", shape, lambda value: scale * value)
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    def norm(self, name, x, affine=True):
        channels = x.shape[1]
        mean = self.drawn(f"{name}.running_mean", (channels,), lambda value: 0.1 * value)
        variance = self.drawn(f"{name}.running_var", (channels,), lambda value: 0.5 + value.abs())
        self.drawn(f"{name}.num_batches_tracked", (), lambda value: torch.tensor(7))
        weight = self.drawn(f"{name}.weight", (channels,), lambda value: 1 + 0.1 * value) if affine else None
        bias = self.drawn(f"{name}.bias", (channels,), lambda value: 0.1 * value) if affine else None
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def prelu(self, name, x):
        return F.prelu(x, self.drawn(f"{name}.weight", (x.shape[1],), lambda value: 0.25 + 0.1 * value))

    def linear(self, name, x, size, bias=True):
        weight = self.drawn(f"{name}.weight", (size, x.shape[1]), lambda value: value / x.shape[1] ** 0.5)
        return F.linear(x, weight, self.drawn(f"{name}.bias", (size,), lambda value: 0.1 * value) if bias else None)


def arcface_torch(w, x, layers, size=64):
    x = w.prelu("prelu", w.norm("bn1", w.conv("conv1", x, 64, 3, padding=1)))
    for stage, count in enumerate(layers):
        width = 64 * 2**stage
        for unit in range(count):
            at, stride = f"layer{stage + 1}.{unit}", 1 if unit else 2
            y = w.conv(f"{at}.conv1", w.norm(f"{at}.bn1", x), width, 3, padding=1)
            y = w.prelu(f"{at}.prelu", w.norm(f"{at}.bn2", y))
            y = w.norm(f"{at}.bn3", w.conv(f"{at}.conv2", y, width, 3, stride, padding=1))
            if unit == 0:
                x = w.norm(f"{at}.downsample.1", w.conv(f"{at}.downsample.0", x, width, 1, stride))
            x = x + y
    return w.norm("features", w.linear("fc", w.norm("bn2", x).flatten(1), size))


def tface_ir(w, x, layers, size=64):
    x = w.prelu("input_layer.2", w.norm("input_layer.1", w.conv("input_layer.0", x, 64, 3, padding=1)))
    number = 0
    for stage, count in enumerate(layers):
        width = 64 * 2**stage
        for unit in range(count):
            at, stride = f"body.{number}", 1 if unit else 2
            y = w.conv(f"{at}.res_layer.1", w.norm(f"{at}.res_layer.0", x), width, 3, padding=1)
            y = w.prelu(f"{at}.res_layer.3", w.norm(f"{at}.res_layer.2", y))
            y = w.norm(f"{at}.res_layer.5", w.conv(f"{at}.res_layer.4", y, width, 3, stride, padding=1))
            if x.shape[1] == width:
                x = F.max_pool2d(x, 1, stride)
            else:
                x = w.norm(f"{at}.shortcut_layer.1", w.conv(f"{at}.shortcut_layer.0", x, width, 1, stride))
            x, number = x + y, number + 1
    x = w.linear("output_layer.3", w.norm("output_layer.0", x).flatten(1), size)
    return w.norm("output_layer.4", x, affine=False)


def tface_mobilefacenet(w, x, layers=None, size=64, affine=False):
    def block(at, x, channels, kernel, stride=1, padding=0, groups=1, linear=False):
        x = w.norm(f"{at}.bn", w.conv(f"{at}.conv", x, channels, kernel, stride, padding, groups))
        return x if linear else w.prelu(f"{at}.prelu", x)

    def depthwise(at, x, channels, groups, stride):
        x = block(f"{at}.conv", x, groups, 1)
        x = block(f"{at}.conv_dw", x, groups, 3, stride, 1, groups)
        return block(f"{at}.project", x, channels, 1, linear=True)

    def residual(at, x, count, groups):
        for number in range(count):
            x = x + depthwise(f"{at}.model.{number}", x, x.shape[1], groups, 1)
        return x

    x = block("conv2_dw", block("conv1", x, 64, 3, 2, 1), 64, 3, 1, 1, 64)
    x = residual("conv_3", depthwise("conv_23", x, 64, 128, 2), 4, 128)
    x = residual("conv_4", depthwise("conv_34", x, 128, 256, 2), 6, 256)
    x = residual("conv_5", depthwise("conv_45", x, 128, 512, 2), 2, 256)
    x = block("conv_6_sep", x, 512, 1)
    x = block("output_layer.conv_6_dw", x, 512, x.shape[2], groups=512, linear=True)
    return w.norm("output_layer.bn", w.linear("output_layer.linear", x.flatten(1), size, bias=False), affine=affine)


def faces(channels=3):
    return torch.rand(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


IR = {"ir-18": (2, 2, 2, 2), "ir-34": (3, 4, 6, 3), "ir-50": (3, 4, 14, 3), "ir-100": (3, 13, 30, 3)}


@pytest.mark.parametrize(
    ("theirs", "name", "channels"),
    [
        (arcface_torch, "ir-18", 3),
        (arcface_torch, "ir-50", 3),
        (arcface_torch, "ir-100", 3),
        (tface_ir, "ir-34", 3),
        (tface_ir, "ir-50", 27),  # PartialFace's
        (tface_mobilefacenet, "mobilefacenet", 27),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_checkpoint_computes_what_the_code_that_saved_it_does(tmp_path, theirs, name, channels):
    weights, x = Weights(), faces(channels)
    theirs(weights, x, IR.get(name))
    torch.save(dict(weights), tmp_path / "net.pth")
    brought = open_recogniser(tmp_path / "net.pth")
    assert brought.architecture.startswith(f"{name} (")
    assert (brought.channels, brought.input_size, brought.embedding_size) == (channels, (SIDE, SIDE), 64)
    learnt = [value for key, value in weights.items() if key.endswith(("weight", "bias"))]
    assert brought.values == sum(value.numel() for value in learnt)
    fed = 2 * x - 1 if channels == 3 else x
    expected = F.normalize(theirs(weights, fed, IR.get(name)))
    torch.testing.assert_close(F.normalize(brought(x)), expected, rtol=0, atol=1e-5)


def test_a_mobilefacenet_whose_last_norm_has_weights_keeps_them(tmp_path):
    weights, x = Weights(), faces()
    tface_mobilefacenet(weights, x, affine=True)
    torch.save(dict(weights), tmp_path / "net.pth")
    expected = tface_mobilefacenet(weights, 2 * x - 1, affine=True)
    torch.testing.assert_close(open_recogniser(tmp_path / "net.pth")(x), expected, rtol=1e-4, atol=1e-4)


@functools.cache
def ir18():
    weights = Weights()
    tface_ir(weights, faces(), IR["ir-18"])
    return weights


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda w: {"epoch": 3, "state_dict_backbone": dict(w), "state_dict_softmax_fc": {"weight": torch.rand(9, 64)}},
        lambda w: {"state_dict": {f"module.backbone.{name}": value for name, value in w.items()}, "best": 0.9},
        lambda w: {name: value.half() if value.is_floating_point() else value for name, value in w.items()},
    ],
    ids=["arcface_torch", "lightning", "half"],
)
def test_weights_are_found_in_what_training_code_saves(tmp_path, wrapped):
    weights, x = ir18(), faces()
    torch.save(wrapped(weights), tmp_path / "net.pth")
    brought = open_recogniser(tmp_path / "net.pth")
    expected = F.normalize(tface_ir(weights, 2 * x - 1, IR["ir-18"]))
    torch.testing.assert_close(F.normalize(brought(x)), expected, rtol=0, atol=5e-3)
    assert brought(x).dtype == torch.float32


def test_minusfaces_recogniser_is_fed_pictures_as_they_are_decoded(tmp_path):
    weights, x = ir18(), faces()
    saved = {f"recognizer.{name}": value for name, value in weights.items()} | {"generator.w": torch.rand(3)}
    torch.save(saved, tmp_path / "net.pth")
    expected = F.normalize(tface_ir(weights, x, IR["ir-18"]))
    brought = open_recogniser(tmp_path / "net.pth")
    torch.testing.assert_close(F.normalize(brought(x)), expected, rtol=0, atol=1e-5)
    assert brought.input_range == "0..1"


def test_foreign_safetensors_and_old_pickles_are_read_as_well(tmp_path):
    weights, x = ir18(), faces()
    save_file(dict(weights), tmp_path / "net.safetensors")
    torch.save(dict(weights), tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    first, second = (open_recogniser(tmp_path / name) for name in ("net.safetensors", "net.pt"))
    assert (first.format, second.format) == ("safetensors", "state_dict")
    torch.testing.assert_close(first(x), second(x))


def test_a_recogniser_of_this_suite_is_fed_as_it_was_trained(tmp_path):
    recogniser = build_recogniser("ir-tiny", (27, 16, 16), 8).eval()
    save_recogniser(recogniser, tmp_path / "r.safetensors")
    sent = 100 * torch.randn(2, 27, 16, 16, generator=torch.Generator().manual_seed(0))
    brought = open_recogniser(tmp_path / "r.safetensors")
    torch.testing.assert_close(brought(sent), recogniser(sent))
    torch.testing.assert_close(brought.maps(sent), recogniser.maps(sent))
    assert brought.architecture == "ir-tiny (of this suite)"
    assert brought.values == recogniser.parameter_count


def without(weights, *ends):
    return {name: value for name, value in weights.items() if not name.endswith(ends)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda w: {**w, "body.0.res_layer.se_block.fc1.weight": torch.rand(4, 64, 1, 1)}, r"se_block\.fc1"),
        (lambda w: {**w, "body.8.res_layer.4.weight": torch.rand(512, 512, 3, 3)}, r"have \(2, 2, 2, 3\) units"),
        (lambda w: {**w, "output_layer.3.weight": torch.rand(64, 512 * 5)}, "5 places and is not square"),
        (lambda w: without(w, "body.3.res_layer.2.running_var"), r"lacks stages\.3\.residual\.2\.running_var"),
        (lambda w: without(w, "body.2.shortcut_layer.0.weight"), r"lacks stages\.2\.shortcut\.0\.weight"),
        (lambda w: {**w, "body.0.res_layer.3.weight": torch.rand(1)}, r"residual\.3\.weight .* is \(1,\)"),
        (lambda w: without(w, "output_layer.3.weight"), r"output\.linear .* is missing"),
        (lambda w: {**w, **{f"student.{name}": value for name, value in w.items()}}, "several networks"),
        (lambda w: {"fc.weight": torch.rand(3, 3)}, "no network of a known kind"),
        (lambda w: torch.rand(3), "no network of a known kind"),
    ],
    ids=["attention", "depth", "shape", "norm", "shortcut", "slopes", "head", "two", "other", "no names"],
)
def test_other_networks_are_refused_in_one_line(tmp_path, changed, words):
    torch.save(changed(dict(ir18())), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=words) as caught:
        open_recogniser(tmp_path / "net.pth")
    assert "net.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_size_of_an_oblong_input_is_given(tmp_path):
    weights, x = Weights(), torch.rand(2, 3, 32, 48)
    tface_ir(weights, x, IR["ir-18"])
    torch.save(dict(weights), tmp_path / "net.pth")
    brought = open_recogniser(tmp_path / "net.pth", given=InputForm(size=(32, 48)))
    expected = F.normalize(tface_ir(weights, 2 * x - 1, IR["ir-18"]))
    torch.testing.assert_close(F.normalize(brought(x)), expected, rtol=0, atol=1e-5)
