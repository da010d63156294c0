from __future__ import annotations

import pytest
import torch

from bench.errors import UsageError
from bench.recognition.backbones import BACKBONES

NAMES = ("ir-tiny", "ir-18", "ir-34", "ir-50", "ir-100", "mobilefacenet")


def build(name: str, channels: int, size: tuple[int, int], dimensions: int = 512, **options: float) -> torch.nn.Module:
    return BACKBONES.get(name)(in_channels=channels, input_size=size, embedding_size=dimensions, **options)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_registry_holds_these_names() -> None:
    assert set(BACKBONES) == set(NAMES)
    with pytest.raises(UsageError, match="did you mean 'ir-50'"):
        BACKBONES.get("ir50")


@pytest.mark.parametrize(
    ("size", "channels"),
    [((112, 112), 3), ((112, 112), 192), ((64, 64), 27), ((57, 57), 27), ((40, 23), 3), ((7, 7), 16), ((1, 1), 1)],
)
@pytest.mark.parametrize("name", NAMES)
def test_any_channels_and_size_give_one_embedding(name: str, size: tuple[int, int], channels: int) -> None:
    # The meta device computes shapes alone, so that the deep networks cost nothing.
    with torch.device("meta"):
        net = build(name, channels, size, 96)
        assert net(torch.empty(2, channels, *size)).shape == (2, 96)


@pytest.mark.parametrize("name", ["ir-tiny", "ir-18", "mobilefacenet"])
def test_values_and_gradients_are_finite(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, 27, (33, 33), 64)
    embedding = net(torch.randn(4, 27, 33, 33))
    assert embedding.shape == (4, 64)
    assert embedding.dtype == torch.float32
    embedding.square().sum().backward()
    for parameter in net.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()


# Published sizes at 112x112 RGB: the authors' IResNet with 512 dimensions, MobileFaceNet with 128.
@pytest.mark.parametrize(
    ("name", "dimensions", "millions", "tolerance"),
    [
        ("ir-18", 512, 24.03, 0.01),
        ("ir-34", 512, 34.14, 0.01),
        ("ir-50", 512, 43.59, 0.01),
        ("ir-100", 512, 65.16, 0.01),
        ("mobilefacenet", 128, 0.99, 0.02),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, dimensions: int, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        net = build(name, 3, (112, 112), dimensions)
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=tolerance)


def test_more_channels_widen_the_first_convolution_only() -> None:
    with torch.device("meta"):
        three, many = (build("ir-50", channels, (112, 112)) for channels in (3, 27))
    assert parameters(many) - parameters(three) == 24 * 64 * 9


def test_the_output_layer_tells_places_apart() -> None:
    # Global average pooling would map a face and its mirror image to nearly the same embedding.
    torch.manual_seed(0)
    net = build("ir-tiny", 3, (64, 64)).eval()
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :16, :16] = 1
    images[1, :, -16:, -16:] = 1
    first, second = torch.nn.functional.normalize(net(images))
    assert float((first @ second).detach()) < 0.9


@pytest.mark.parametrize("name", ["ir-tiny", "mobilefacenet"])
def test_dropout_acts_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, 3, (32, 32), 64, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_the_tiny_network_stays_within_its_budget() -> None:
    """Multiply-accumulates per face, which decide what two cores can train."""
    macs = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, torch.Tensor)
        macs += output[0].numel() * module.weight[0].numel()

    with torch.device("meta"):
        net = build("ir-tiny", 27, (64, 64), 256)
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(count)
        net(torch.empty(2, 27, 64, 64))
    assert macs < 60e6
