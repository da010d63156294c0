"""DuetFace: the released code's arrays, what is sent, and what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import COEFFICIENTS, golden, on_grid, pictures
from pictures import generator, noise
from pydantic import ValidationError
from scipy.spatial import ConvexHull

from defenses.duetface import (
    CLIENT_CHANNELS,
    OUTLINE,
    SERVER_CHANNELS,
    DuetFace,
    DuetFaceOptions,
    attention_mask,
    inside,
)
from defenses.frequency import block_dct

GOLDEN = golden("duetface")


def made(size=32, **options):
    """Not fitted, with weights that are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DuetFace(DuetFaceOptions(**options), image_size=size).requires_grad_(False).eval()


def hull(landmarks):
    """Vertices of the convex hull of points (P, 2)."""
    return landmarks[torch.from_numpy(ConvexHull(landmarks.numpy()).vertices).long()]


def test_channels_are_those_of_the_released_code():
    assert torch.equal(torch.tensor(CLIENT_CHANNELS), GOLDEN["sub_channels"].long())
    sent = made(112, sends="channels").protect(pictures(), generator()).representation
    torch.testing.assert_close(on_grid(sent), GOLDEN["server_grid"], rtol=0, atol=COEFFICIENTS)
    kept = block_dct(pictures(), torch.tensor(CLIENT_CHANNELS))
    torch.testing.assert_close(on_grid(kept), GOLDEN["client_grid"], rtol=0, atol=COEFFICIENTS)


@pytest.mark.parametrize("face", range(3))
def test_the_region_of_interest_is_that_of_the_released_code(face):
    landmarks = GOLDEN["landmarks"][face].double().view(98, 2) * 112
    assert torch.equal(inside(hull(landmarks), 112), GOLDEN["roi"][face, 0].bool())


def test_masks_gate_as_in_the_released_code():
    """The released gate multiplies a mask onto squashed features of the server, s + w mask s."""
    weights = GOLDEN["ib_W"].mean(dim=0)  # of a 1x1 convolution whose outputs are averaged
    mask = attention_mask(GOLDEN["ib_client"], weights, GOLDEN["roi"].float(), (28, 28))
    assert torch.equal(mask.amax(dim=(1, 2, 3)), torch.ones(3))
    assert torch.equal(mask.amin(dim=(1, 2, 3)), torch.zeros(3))
    server = torch.sigmoid(GOLDEN["ib_server"])
    gated = server + float(GOLDEN["ib_weight"]) * mask * server
    torch.testing.assert_close(gated, GOLDEN["ib_out"], rtol=0, atol=1e-5)


def test_a_constant_map_gates_nothing():
    """Where the released code divides by zero."""
    mask = attention_mask(torch.ones(1, 3, 4, 4), torch.ones(3), torch.ones(8, 8), (8, 8))
    assert torch.equal(mask, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("size", [24, 112])
def test_the_outline_is_a_face(size):
    outline = torch.tensor(OUTLINE, dtype=torch.float64)
    assert len(ConvexHull(outline.numpy()).vertices) == len(OUTLINE)
    shown = inside(outline * size / 112, size)
    for x, y in ((38.3, 51.7), (73.5, 51.5), (56.0, 71.7), (41.5, 92.4), (70.7, 92.2)):  # ArcFace's five points
        assert shown[round(y * size / 112), round(x * size / 112)]
    assert not shown[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert torch.equal(shown, shown.flip(1).roll(1, 1))  # the pixel grid starts at 0


def test_what_is_sent():
    assert sorted(CLIENT_CHANNELS + SERVER_CHANNELS) == list(range(64))
    shapes = {sends: list(made(112, sends=sends).parts.values()) for sends in ("channels", "masks", "features")}
    channels = (162, 112, 112)
    assert shapes["channels"] == [channels]
    assert shapes["masks"] == [channels, (1, 56, 56), (1, 28, 28), (1, 14, 14), (1, 7, 7)]
    assert shapes["features"] == [channels, (64, 28, 28), (128, 14, 14), (128, 7, 7), (512, 7, 7)]
    assert made(112).bytes_per_face() == 4 * (162 * 112**2 + 56**2 + 28**2 + 14**2 + 7**2)
    faces = noise(2, 32, dtype=torch.float32)
    defense = made(32, sends="features")
    sent = defense.unpack(defense.protect(faces, generator()).representation)
    for name, maps in zip(("features_1", "features_2", "features_3", "features_4"), defense.tapped(faces), strict=True):
        assert torch.equal(sent[name], maps)


def test_masks_show_nothing_outside_the_outline():
    faces = noise(2, 64, dtype=torch.float32)
    defense = made(64, roi="outline")
    mask = defense.unpack(defense.protect(faces, generator()).representation)["mask_1"]
    assert torch.equal(mask[..., 0, :], torch.zeros(2, 1, 32))
    everywhere = made(64, roi="none")
    mask = everywhere.unpack(everywhere.protect(faces, generator()).representation)["mask_1"]
    assert float(mask[..., 0, :].max()) > 0


def test_official_gates_are_drawn_in_every_call():
    faces = noise(2, 32, dtype=torch.float32)
    for gate, same in (("paper", True), ("official", False)):
        defense = made(32, gate=gate)
        first, second = (defense.unpack(defense.protect(faces, generator(seed)).representation) for seed in (0, 1))
        assert torch.equal(first["channels"], second["channels"])
        for stage in range(1, 5):
            assert torch.equal(first[f"mask_{stage}"], second[f"mask_{stage}"]) is same


def test_client_and_gates_learn(make_training):
    """First the client's network alone, to tell people by what it keeps; then the gates, with a recogniser behind."""
    training = make_training(size=24)
    made_for, losses, reports = [], [], []

    def make_recogniser(shape):
        recogniser, head = training.make_recogniser(shape)
        made_for.append(shape)
        head.register_forward_hook(lambda module, inputs, output: losses.append(float(output[0].detach())))
        return recogniser, head

    def report(done, total, **fields):
        reports.append((done, total))

    torch.manual_seed(0)
    defense = DuetFace(DuetFaceOptions(epochs=3, gate_epochs=1, batch_size=8, learning_rate=0.05), image_size=24)
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    defense.fit(replace(training, make_recogniser=make_recogniser, report=report))
    moved = {name for name, value in defense.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"gates.{stage}" for stage in range(4)} <= moved
    assert any(name.startswith("client.1.") for name in moved)
    assert {"roi", "server_channels"}.isdisjoint(moved)
    assert made_for[-1] == defense.representation_shape
    assert reports == [(done, 128) for done in range(8, 136, 8)]
    client = torch.tensor(losses[:12])  # four steps an epoch
    assert float(client[-4:].mean()) < 0.7 * float(client[:4].mean())


def test_it_is_linear_but_for_what_the_network_makes(make_training):
    faces, only = noise(3, 24), made(24, sends="channels")
    assert only.linear_channels is None
    for defense in (only, made(24, sends="masks")):
        operator, sent = defense.linear_operator(None), defense.protect(faces, generator()).representation
        torch.testing.assert_close(operator(faces) + operator.offset, sent[:, :162])
    assert torch.equal(defense.linear_channels, torch.arange(162))
    before = {name: value.clone() for name, value in only.state_dict().items()}
    only.fit(make_training(size=24))  # of what is not sent, nothing is trained
    assert all(torch.equal(value, before[name]) for name, value in only.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sends": "everything"}, "masks"),
        ({"gate": "random"}, "official"),
        ({"roi": "landmarks"}, "outline"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DuetFaceOptions(**options)
