from __future__ import annotations

import pytest
import torch

from bench.nets.recogniser import InputNormalisation, build_recogniser

SHAPE = (27, 16, 16)


def batches(count: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 5, 27).view(1, 27, 1, 1)
    offset = torch.linspace(-3, 3, 27).view(1, 27, 1, 1)
    return [scale * (offset + 0.3 * i + spread * torch.randn(8, 27, 9, 7, generator=generator)) for i in range(count)]


def test_normalisation_measures_the_mean_and_variance_of_all_batches() -> None:
    layer = InputNormalisation(27)
    seen = batches(5)
    for batch in seen:
        layer(batch)
    variance, mean = torch.var_mean(torch.cat(seen), (0, 2, 3), correction=0)
    torch.testing.assert_close(layer.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.variance, variance, rtol=1e-4, atol=1e-4)
    assert int(layer.batches) == 5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 750.0])
def test_normalised_channels_have_mean_0_and_variance_1(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(InputNormalisation, "smallest_map", 9 * 7 + 1)
    layer = InputNormalisation(27)
    for batch in batches(5, scale):
        layer(batch)
    output = layer.eval()(torch.cat(batches(5, scale)))
    variance, mean = torch.var_mean(output, (0, 2, 3), correction=0)
    assert output.dtype == torch.float32
    assert float(mean.abs().max()) < 1e-3
    assert float((variance - 1).abs().max()) < 1e-3


def test_maps_whose_sizes_differ_a_hundredfold_come_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputNormalisation, "smallest_map", 9 * 7)
    layer = InputNormalisation(27)
    sizes = 100 ** torch.rand(8, 27, 1, 1, generator=torch.Generator().manual_seed(0))
    (noise,) = batches(1)
    maps = sizes * (noise - noise.mean((2, 3), keepdim=True))
    output = layer(maps)
    torch.testing.assert_close(output.square().mean((2, 3)), torch.ones(8, 27), rtol=1e-3, atol=0)
    # Only the size of a map changes, never its pattern; and no sample depends on another in evaluation.
    centred = (maps - layer.mean.view(27, 1, 1)).flatten(2)
    pattern = torch.nn.functional.cosine_similarity(output.flatten(2), centred, dim=2)
    torch.testing.assert_close(pattern, torch.ones(8, 27))
    layer.eval()
    torch.testing.assert_close(layer(maps[:1]), layer(maps)[:1])


def test_small_maps_keep_their_size() -> None:
    layer = InputNormalisation(16)
    noise = torch.randn(64, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    output = layer(noise * torch.linspace(0.5, 2, 64).view(-1, 1, 1, 1))
    size = output.square().mean((1, 2, 3)).sqrt()
    assert float(size[-1] / size[0]) == pytest.approx(4, rel=0.1)


def test_normalisation_stops_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputNormalisation, "measured", 2)
    layer = InputNormalisation(27)
    first, second, third = batches(3)
    layer(first)
    layer(second)
    kept = layer.mean.clone()
    layer(third)
    assert torch.equal(layer.mean, kept)
    assert int(layer.batches) == 2

    reloaded = InputNormalisation(27)
    reloaded.load_state_dict(layer.state_dict())
    reloaded(third)
    assert torch.equal(reloaded.mean, kept)

    half = InputNormalisation(27)
    half(first)
    layer.load_state_dict(half.state_dict())  # an earlier state makes it measure on
    layer(second)
    torch.testing.assert_close(layer.mean, kept)


def test_evaluation_measures_nothing_and_matches_training() -> None:
    layer = InputNormalisation(27)
    (batch,) = batches(1)
    trained = layer(batch)
    layer.eval()
    assert torch.equal(layer(batch), trained)
    assert int(layer.batches) == 1


def test_a_constant_channel_becomes_zero_not_noise() -> None:
    layer = InputNormalisation(2)
    batch = torch.stack((torch.full((4, 8, 8), 511.7), torch.zeros(4, 8, 8)), 1)
    assert float(layer(batch).abs().max()) < 0.05


def test_the_scale_of_a_representation_does_not_matter() -> None:
    representation = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    embeddings = []
    for scale in (1.0, 750.0):
        recogniser = build_recogniser("ir-tiny", SHAPE, 32)
        recogniser(scale * representation)
        embeddings.append(recogniser.eval().embed(scale * representation))
    torch.testing.assert_close(embeddings[0].norm(dim=1), torch.ones(6))
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-3)


def test_the_seed_decides_the_weights_and_leaves_torch_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (build_recogniser("ir-tiny", SHAPE, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    weight = "backbone.output.linear.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_autocast_reaches_the_backbone_but_neither_end() -> None:
    recogniser = build_recogniser("ir-tiny", SHAPE, 32)
    seen: list[torch.Tensor] = []
    recogniser.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    representation = 750 * torch.randn(4, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        embedding = recogniser(representation)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert embedding.dtype == torch.float32
    assert recogniser.normalisation.variance.dtype == torch.float32
    recogniser(representation)
    assert seen[1].dtype == torch.float32


def test_another_shape_is_refused() -> None:
    recogniser = build_recogniser("ir-tiny", SHAPE, 32)
    with pytest.raises(ValueError, match=r"takes representations \(N, 27, 16, 16\), got \(2, 3, 16, 16\)"):
        recogniser(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"takes representations \(N, 27, 16, 16\)"):
        recogniser.maps(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("backbone", "shape"), [("ir-tiny", (256, 2, 2)), ("mobilefacenet", (512, 2, 2)), ("vit-tiny", (32, 1, 1))]
)
def test_maps_are_what_the_embedding_is_made_of(backbone: str, shape: tuple[int, int, int]) -> None:
    recogniser = build_recogniser(backbone, (3, 24, 24), 32).eval()
    representation = torch.rand(2, 3, 24, 24)
    maps = recogniser.maps(representation)
    assert tuple(maps.shape) == (2, *shape)
    if backbone == "ir-tiny":
        torch.testing.assert_close(recogniser.backbone.output(maps), recogniser(representation))
    if shape[1:] == (1, 1):
        torch.testing.assert_close(maps.flatten(1), recogniser(representation))
