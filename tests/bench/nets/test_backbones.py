from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cost import backbone_cost

from bench.errors import UsageError
from bench.nets.backbones import BACKBONES
from bench.nets.recogniser import Recogniser, RecogniserSpec
from bench.nets.vit import patch_size

CONVOLUTIONAL = ("ir-tiny", "ir-18", "ir-34", "ir-50", "ir-100", "mobilefacenet", "mobilefacenet-tiny")
PLAIN = ("vit-tiny", "vit-tiny-equal", "vit-small", "vit-small-equal")
TRANSFORMERS = ("partialformer-tiny", "partialformer-small", *PLAIN)
NAMES = CONVOLUTIONAL + TRANSFORMERS
#: Without one of its parts, or with tokens of another kind.
VARIANTS = (
    "partialformer-tiny:no-small-nets",
    "partialformer-tiny:no-head-scaling",
    "partialformer-tiny:no-residual-attention",
    "partialformer-tiny:channels",
    "partialformer-tiny:class-token",
    "partialformer-tiny:mean",
    "partialformer-tiny:no-small-nets+no-head-scaling+no-residual-attention+channels+class-token",
    "vit-tiny:channels+class-token",
)


def build(name: str, channels: int, size: tuple[int, int], dimensions: int = 512, **options: Any) -> torch.nn.Module:
    return BACKBONES.get(name)(in_channels=channels, input_size=size, embedding_size=dimensions, **options)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_registry_holds_these_names() -> None:
    assert set(BACKBONES) == set(NAMES)
    with pytest.raises(UsageError, match="did you mean 'ir-50'"):
        BACKBONES.get("ir50")


@pytest.mark.parametrize(
    ("size", "channels"),
    [((112, 112), 192), ((57, 57), 27), ((40, 23), 3), ((7, 7), 16), ((1, 1), 1)],
)
@pytest.mark.parametrize("name", NAMES + VARIANTS)
def test_any_channels_and_size_give_one_embedding(name: str, size: tuple[int, int], channels: int) -> None:
    # The meta device computes shapes alone, which takes less than the deep networks do.
    with torch.device("meta"):
        net = build(name, channels, size, 96)
        assert net(torch.empty(2, channels, *size)).shape == (2, 96)


@pytest.mark.parametrize(
    "name", ["ir-tiny", "ir-18", "mobilefacenet", "mobilefacenet-tiny", "vit-tiny", "partialformer-tiny", *VARIANTS]
)
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


@pytest.mark.parametrize("name", ["mobilefacenet", "ir-18"])
def test_what_trains_fast_on_a_processor_trains_as_torchs_own_layers(name: str) -> None:
    """Embedding and gradients in float64, of depthwise convolutions with a stride and over a whole map, and slopes."""
    torch.manual_seed(0)
    net = build(name, 3, (16, 19), 8).double()
    for module in net.modules():
        if isinstance(module, torch.nn.PReLU):
            torch.nn.init.uniform_(module.weight, -0.2, 0.6)
    plain = copy.deepcopy(net)
    for module in plain.modules():
        for own in (torch.nn.PReLU, torch.nn.Conv2d):
            if isinstance(module, own):
                module.__class__ = own
    faces, weights = torch.randn(4, 3, 16, 19, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    found = []
    for each in (net, plain):
        shown = faces.clone().requires_grad_()
        embedding = each(shown)
        (embedding * weights).sum().backward()
        gradients = [p.grad for p in each.parameters() if p.grad is not None]
        found.append((embedding.detach(), shown.grad, *gradients))
    assert len(found[0]) > 30
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


# Published sizes at 112x112 RGB: the authors' IResNet with 512 dimensions, MobileFaceNet with 128.
@pytest.mark.parametrize(
    ("name", "dimensions", "millions", "tolerance"),
    [
        ("ir-18", 512, 24.03, 0.01),
        ("ir-34", 512, 34.14, 0.01),
        ("ir-50", 512, 43.59, 0.01),
        ("ir-100", 512, 65.16, 0.01),
        ("mobilefacenet", 128, 0.99, 0.02),
        # By hand from table 1 with every width halved.
        ("mobilefacenet-tiny", 128, 0.284928, 1e-6),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, dimensions: int, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        net = build(name, 3, (112, 112), dimensions)
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=tolerance)


#: Side of the maps of a face of 64 or 112 pixels at each up-sampling factor, and how often it is halved less.
SMALLER = [(64, 64, 0), (64, 32, 1), (64, 24, 1), (64, 16, 2), (64, 8, 3), (112, 56, 1), (112, 42, 1), (112, 14, 3)]


@pytest.mark.parametrize(("face", "side", "reduced"), SMALLER)
def test_how_often_maps_are_halved_less_than_a_face(face: int, side: int, reduced: int) -> None:
    spec = RecogniserSpec(backbone="ir-tiny", representation_shape=(27, side, side), embedding_size=8, image_size=face)
    assert spec.reduced == reduced
    assert spec.model_copy(update={"image_size": None}).reduced == 0


@pytest.mark.parametrize(("face", "side", "reduced"), SMALLER)
@pytest.mark.parametrize("name", ["ir-18", "ir-tiny", "mobilefacenet"])
def test_small_maps_end_with_as_many_places_as_a_face(name: str, face: int, side: int, reduced: int) -> None:
    """What reaches the output layer, 1/16 of a face a side (to the rounding of 24 and 42 pixels), and one embedding."""
    with torch.device("meta"):
        whole, small, blind = (
            build(name, 27, (size, size), 16, reduced=fewer) for size, fewer in ((face, 0), (side, reduced), (side, 0))
        )
        assert small(torch.empty(2, 27, side, side)).shape == (2, 16)

    def places(net: torch.nn.Module) -> int:
        if name == "mobilefacenet":
            return int(net.get_submodule("global_depthwise.0").kernel_size[0])
        channels = net.get_submodule("output.norm").num_features
        return round((net.get_submodule("output.linear").in_features / channels) ** 0.5)

    assert places(whole) == face // 16
    assert places(small) == -(-side * 2**reduced // 16)
    assert abs(places(small) - places(whole)) <= 1
    assert places(blind) == -(-side // 16)
    if side * 2**reduced == face:
        assert places(small) == places(whole)


@pytest.mark.parametrize(("face", "side", "reduced"), SMALLER[1:])
@pytest.mark.parametrize("name", ["vit-tiny", "partialformer-tiny", "vit-small"])
def test_small_maps_become_as_many_tokens_as_the_grid_takes(name: str, face: int, side: int, reduced: int) -> None:
    grid = 14 if name == "vit-small" else 8
    with torch.device("meta"):
        net = build(name, 27, (side, side), 16, reduced=reduced)
        assert net(torch.empty(2, 27, side, side)).shape == (2, 16)
    patch = -(-side // grid)
    assert net.get_parameter("tokens.positions").shape[1] == (-(-side // patch)) ** 2
    assert net.get_submodule("tokens.embed").kernel_size == (patch, patch)


@pytest.mark.parametrize("name", ["ir-18", "ir-tiny", "mobilefacenet", "vit-tiny", "partialformer-small"])
def test_of_a_whole_face_nothing_changes(name: str) -> None:
    with torch.device("meta"):
        before = {key: value.shape for key, value in build(name, 27, (64, 64)).state_dict().items()}
        spec = {"representation_shape": (27, 64, 64), "embedding_size": 512, "backbone": name}
        now = Recogniser(RecogniserSpec.model_validate({**spec, "image_size": 64})).backbone.state_dict()
    assert {key: value.shape for key, value in now.items()} == before


@pytest.mark.parametrize("name", ["ir-tiny", "mobilefacenet", "vit-tiny"])
def test_small_maps_train(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, 27, (8, 8), 16, reduced=3)
    net(torch.randn(4, 27, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


def likeness_of_opposite_corners(name: str) -> float:
    """Cosine of a fresh network's embeddings of two pictures, each with a bright square in another corner."""
    torch.manual_seed(0)
    net = build(name, 3, (64, 64)).eval()
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :16, :16] = 1
    images[1, :, -16:, -16:] = 1
    first, second = torch.nn.functional.normalize(net(images)).detach()
    return float(first @ second)


def test_the_output_layer_tells_places_apart() -> None:
    # Averages over places would map a face and its mirror image to nearly the same embedding.
    assert likeness_of_opposite_corners("ir-tiny") < 0.9
    assert likeness_of_opposite_corners("partialformer-tiny") < 0.95 < likeness_of_opposite_corners("vit-tiny:mean")


@pytest.mark.parametrize("name", ["partialformer-tiny:mean", "vit-tiny:class-token"])
@torch.no_grad()
def test_positions_are_what_tells_patches_apart(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, 3, (64, 64)).eval()
    image = torch.randn(1, 3, 64, 64)
    moved = image.roll((8, 24), (2, 3))  # by whole patches
    assert not torch.allclose(net(moved), net(image), rtol=0, atol=1e-4)
    net.get_parameter("tokens.positions").zero_()
    torch.testing.assert_close(net(moved), net(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ir-tiny", "mobilefacenet", "partialformer-tiny"])
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partialformer-tiny:no-ffn", "partialformer-tiny: unknown modifier 'no-ffn'; available: .*no-small-nets"),
        ("vit-small:no-small-nets", "vit-small: unknown modifier 'no-small-nets'; available: channels, class-token"),
        ("vit-tiny:channels+channels", "'channels' is given twice"),
        ("vit-tiny:mean+class-token", "exclude each other"),
        ("ir-18:channels", "unknown backbone 'ir-18:channels': did you mean 'ir-18'"),
        ("partialformr-tiny", "did you mean 'partialformer-tiny'"),
    ],
)
def test_variants_are_checked(name: str, message: str) -> None:
    assert "partialformer-tiny:no-small-nets" in BACKBONES
    with pytest.raises(UsageError, match=message):
        BACKBONES.get(name)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("shape", [(3, 112, 112), (27, 64, 64)])
def test_plain_transformers_have_the_same_width_or_the_same_parameters(size: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        ours, same_width, same_parameters = (
            build(name, shape[0], shape[1:]) for name in (f"partialformer-{size}", f"vit-{size}", f"vit-{size}-equal")
        )
    assert ours.get_parameter("tokens.positions").shape == same_width.get_parameter("tokens.positions").shape
    layers = (
        len(list(net.get_submodule(path).children()))
        for net, path in ((ours, "encoder.layers"), (same_width, "encoder"))
    )
    assert next(layers) + 1 == next(layers)  # a plain encoder's norm stands in line with its layers
    assert parameters(same_width) > 1.2 * parameters(ours)
    assert parameters(same_parameters) == pytest.approx(parameters(ours), rel=0.03)


def test_each_part_of_partialformer_can_be_taken_away() -> None:
    with torch.device("meta"):
        whole = build("partialformer-tiny", 27, (64, 64))
        counts = {
            part: parameters(whole) - parameters(build(f"partialformer-tiny:no-{part}", 27, (64, 64)))
            for part in ("small-nets", "head-scaling", "residual-attention")
        }
    width, head, depth = 128, 16, 6
    assert counts["small-nets"] == depth * (head * 64 + 64 + 64 * head + head)
    # The global map: its norm, queries and keys of 16 heads.
    assert counts["residual-attention"] == 2 * width + 2 * (width * 256 + 256)
    # 8 heads instead of 16 in values, gate, output and the global map, and no network across heads.
    narrower = 3 * width * 128 + 2 * 128
    assert counts["head-scaling"] == depth * (narrower + 8 * 16 + 16 + 16 * 16 + 16) + 2 * (width * 128 + 128)


@pytest.mark.parametrize(
    ("size", "grid", "patch"),
    [((112, 112), 14, 8), ((112, 112), 8, 16), ((64, 64), 8, 8), ((57, 57), 8, 8), ((40, 23), 8, 8), ((7, 7), 8, 1)],
)
def test_patches_are_as_small_as_the_grid_allows(size: tuple[int, int], grid: int, patch: int) -> None:
    assert patch_size(size, grid) == patch


@torch.no_grad()
def test_patches_cover_the_whole_picture() -> None:
    """A size that patches do not divide: the last row and column still reach the embedding."""
    torch.manual_seed(0)
    net = build("vit-tiny", 1, (57, 57), 32).eval()
    picture = torch.zeros(1, 1, 57, 57)
    for corner in ((0, 0), (56, 56), (0, 56)):
        marked = picture.clone()
        marked[0, 0, corner[0], corner[1]] = 1
        assert not torch.allclose(net(marked), net(picture), atol=1e-6)


@torch.no_grad()
def test_a_channel_token_is_a_whole_map() -> None:
    net = build("vit-tiny:channels", 5, (9, 7), 32)
    tokens = net.get_submodule("tokens")
    x = torch.randn(2, 5, 9, 7)
    linear, positions = net.get_submodule("tokens.embed"), net.get_parameter("tokens.positions")
    assert isinstance(linear, torch.nn.Linear)
    for channel in range(5):
        expected = linear.weight @ x[1, channel].flatten() + linear.bias + positions[0, channel]
        torch.testing.assert_close(tokens(x)[1, channel], expected)


def test_costs_are_those_of_the_definition() -> None:
    """A plain layer by hand: T tokens of width d take 12 T d^2 + 2 T^2 d multiply-accumulates."""
    cost = backbone_cost("vit-tiny", (27, 64, 64), 512)
    tokens, width, patch = 64, 128, 8
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert cost.flops == 2 * (tokens * 27 * patch**2 * width + 6 * layer + width * 512)
    with torch.device("meta"):
        assert cost.parameters == parameters(build("vit-tiny", 27, (64, 64)))


def test_costs_of_partialformer_are_those_of_the_definition() -> None:
    cost = backbone_cost("partialformer-tiny", (27, 64, 64), 512)
    tokens, width, head, heads, many, patch = 64, 128, 16, 8, 16, 8
    projections = tokens * width * (2 * width + 3 * many * head)
    attention = tokens**2 * (width + many * head) + tokens**2 * (heads * many + many * many)
    small = tokens * many * 2 * head * 64
    global_map = tokens * width * 2 * many * head + tokens**2 * many * head
    expected = tokens * 27 * patch**2 * width + global_map + 6 * (projections + attention + small) + width * 512
    assert cost.flops == 2 * expected


@pytest.mark.filterwarnings("ignore")  # the exporter that needs no further package is on its way out
@pytest.mark.parametrize("name", ["partialformer-tiny", "partialformer-tiny:channels+class-token", "vit-tiny"])
def test_exported_transformers_take_any_number_of_faces(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = build(name, 5, (24, 24), 16).eval()
    file = tmp_path / "net.onnx"
    torch.onnx.export(
        net, (torch.randn(2, 5, 24, 24),), str(file), input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
    )
    faces = torch.randn(3, 5, 24, 24)
    (embedding,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": faces.numpy()})
    torch.testing.assert_close(torch.from_numpy(embedding), net(faces).detach(), rtol=1e-4, atol=1e-5)
