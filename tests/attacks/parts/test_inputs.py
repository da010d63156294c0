"""What is shown of representations in which a face is buried but not hidden."""

from __future__ import annotations

import pytest
import torch
from interception import observe
from torch.nn import functional

import attacks.parts.training
from attacks.base import Observation
from attacks.parts.inputs import (
    VIEWS,
    Example,
    InputOptions,
    Inputs,
    Levelled,
    LowOrder,
    Magnitude,
    Oriented,
    Sorted,
    Standardised,
    Unmixed,
)
from attacks.unet import UNet, UNetOptions
from attacks.unet_ensemble import UNetEnsemble, UNetEnsembleOptions
from defenses.base import Defense

SIZE = 32


def uniform(generator, *shape):
    return torch.rand(shape, generator=generator)


def permuted(z, generator):
    order = torch.stack([torch.randperm(z.shape[1], generator=generator) for _ in z])
    return z.gather(1, order[..., None, None].expand_as(z))


def tinted(z):
    """Faces whose colours differ in energy, as skin does."""
    return z * torch.tensor([1.0, 0.7, 0.45])[:, None, None]


def inverted(z, generator):
    return torch.where(uniform(generator, len(z), 3, 1, 1) < 0.5, z, 1 - z)


#: What is sent of faces z, and views of which one is to be chosen.
BURIED = {
    "offset": (lambda z, g: z + 2000 * (uniform(g, len(z), 3, 1, 1) - 0.5), {"levelled", "standardised"}),
    "ramp": (
        lambda z, g: z + 2000 * (uniform(g, len(z), 3, 1, 1) - 0.5) * torch.linspace(-1, 1, z.shape[-1]),
        {"levelled"},
    ),
    "gain": (lambda z, g: z * 10 ** (8 * uniform(g, len(z), 1, 1, 1) - 4), {"scaled", "standardised"}),
    "heavy tails": (lambda z, g: torch.exp(20 * z), {"log"}),
    "low bits": (lambda z, g: torch.randint(256, z.shape, generator=g) + z * 1e-3, {"low-order"}),
    "fraction": (lambda z, g: torch.randint(1000, z.shape, generator=g) + 0.95 * z, {"low-order"}),
    "order": (lambda z, g: permuted(tinted(z), g), {"sorted"}),
    "negatives": (inverted, {"oriented"}),
    "some huge": (
        lambda z, g: z * torch.where(uniform(g, len(z), 1, 1, 1) < 0.1, 1e4, 1.0),
        {"scaled", "standardised"},
    ),
}
OPEN = {
    "plain": lambda z, g: z,
    "blurred": lambda z, g: functional.avg_pool2d(z, 5, 1, 2, count_include_pad=False),
    "noisy": lambda z, g: z + 0.1 * torch.randn(z.shape, generator=g),
    "scaled channel": lambda z, g: z * torch.tensor([1e4, 1.0, 1.0])[:, None, None],
    "pure noise": lambda z, g: torch.randn(z.shape, generator=g),
    "constant": lambda z, g: torch.zeros_like(z),
}


class Sends(Defense):
    """What ``send`` makes of a face."""

    name = "sends"
    summary = "for tests"

    def __init__(self, send, image_size=SIZE):
        super().__init__(image_size=image_size)
        self.send = send

    def transform(self, faces, state, generator):
        return self.send(faces, generator)


@pytest.fixture(scope="module")
def people(make_faces):
    """uint8 (M, 3, H, W): smooth pictures with something in common, as faces have."""

    def make(count, seed=0):
        common = make_faces(1, SIZE, 99).float()
        return (0.5 * common + 0.5 * make_faces(count, SIZE, seed).float()).to(torch.uint8)

    return make


def example(faces, send, generator):
    return Example(faces, send(faces, generator), lambda: send(faces, generator))


def chosen(send, people):
    generator = torch.Generator().manual_seed(3)
    faces, others = people(200).float() / 255, people(40, 7).float() / 255
    inputs = Inputs()
    losses = inputs.choose(example(faces, send, generator), example(others, send, generator), 0)
    return inputs, losses


@pytest.mark.parametrize("kind", BURIED)
def test_a_buried_face_is_brought_to_light(kind, people):
    send, wanted = BURIED[kind]
    inputs, losses = chosen(send, people)
    assert wanted & set(inputs.name.split("+"))
    assert losses[inputs.name] == min(losses[name] for name in losses if name in (inputs.name, "raw"))
    assert losses[inputs.name] < 0.75 * losses["raw"]


@pytest.mark.parametrize("kind", OPEN)
def test_what_needs_no_view_is_left_as_it_is(kind, people):
    inputs, losses = chosen(OPEN[kind], people)
    assert inputs.name == "raw"
    z = OPEN[kind](people(20, 5).float() / 255, torch.Generator().manual_seed(4))
    assert torch.equal(inputs(z), z)
    if kind in ("plain", "blurred", "scaled channel"):
        assert list(losses) == ["raw"]  # nothing else was tried


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_treats_each_face_by_itself_and_survives_any_scale(name):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(80, 6, 8, 8, generator=generator) + 1e3 * uniform(generator, 80, 6, 1, 1)
    view = VIEWS[name]()
    view.mixed_in = torch.randn(20, 6, 8, 8, generator=generator), 2
    view.measure(sample, sample)
    together = view(sample[:4])
    assert together.shape[0] == 4
    assert together.shape[2:] == (8, 8)
    torch.testing.assert_close(view(sample[2:3]), together[2:3], rtol=1e-4, atol=1e-4)
    for scale in (0.0, 1e-25, 1e25):
        assert torch.isfinite(view(scale * sample[:4])).all()


@pytest.mark.parametrize("drawn", ["afresh", "from the face"])
def test_levelling_takes_out_the_offset_and_nothing_else(drawn):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(100, 2, 6, 6, generator=generator)
    flat = maps - maps.mean(dim=(2, 3), keepdim=True)
    offsets = 1e3 * torch.randn(2, 100, 2, 1, 1, generator=generator)
    view = Levelled()
    assert view.measure(flat + offsets[0], flat + offsets[1 if drawn == "afresh" else 0])
    assert len(view.directions) == 2
    # In the representations themselves a few offsets happen to go with what the faces show; in differences none do.
    error = float((view(flat + 500) - flat).abs().max())
    assert error < (1e-3 if drawn == "afresh" else 0.5)
    assert not Levelled().measure(maps, maps.flip(0))  # no direction stands out


def test_standardised_maps_forget_any_gain_and_offset_but_not_what_these_were():
    z = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    view = Standardised()
    changed = view(5 * z + 700)
    torch.testing.assert_close(changed[:, :2], view(z)[:, :2], rtol=0, atol=1e-3)
    torch.testing.assert_close(changed[:, 4:, 0, 0], (5 * z.std(dim=(2, 3), correction=0)).log(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("step", "size"), [(1.0, 1e-3), (0.0371, 2e-3), (1 / 255, 2e-4), (0.25, 0.15)])
def test_the_step_of_a_carrier_is_found_and_what_lies_below_it_is_left(step, size, people):
    generator = torch.Generator().manual_seed(1)
    face = people(30).float() / 255
    view = LowOrder()
    sent = torch.randint(-50, 50, face.shape, generator=generator) * step + size * face
    assert view.measure(sent, sent)
    ratio = float(view.step) / step
    assert ratio == pytest.approx(round(ratio), abs=1e-3)
    left = view(torch.randint(-50, 50, face.shape, generator=generator) * step + size * face) * float(view.step) / size
    pairs = torch.stack((left.flatten(), face.flatten()))
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.99


def test_no_step_is_seen_where_there_is_none(people):
    smooth = functional.avg_pool2d(people(30).float() / 255, 5, 1, 2)
    assert not LowOrder().measure(smooth, torch.empty(0))
    assert not LowOrder().measure(
        torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.empty(0)
    )
    assert not LowOrder().measure(
        people(30).float() / 255, torch.empty(0)
    )  # 8-bit values have a step, and nothing below it


def test_sorted_channels_fall_in_energy_in_whatever_order_they_came():
    z = torch.tensor([1.0, 3.0, 2.0, 5.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert Sorted()(z)[0, :, 0, 0].tolist() == [5, 3, 2, 1]
    colours = VIEWS["sorted-colours"]()
    z = torch.tensor([1.0, 3.0, 2.0]).repeat(3).view(1, 9, 1, 1).expand(1, 9, 2, 2)
    assert colours(z)[0, :, 0, 0].tolist() == [3, 2, 1] * 3


def test_pooled_channels_are_their_mean_and_mean_magnitude():
    z = torch.tensor([1.0, -3.0, 2.0, 4.0, 4.0, -4.0]).view(1, 6, 1, 1).expand(1, 6, 2, 2)
    assert VIEWS["pooled"]()(z)[0, :, 0, 0].tolist() == [-1, 3, 0, 2, 3, 4]


def test_signs_that_change_are_dropped_and_signs_that_stay_are_kept(people):
    z = people(40).float() / 255 - 0.5
    generator = torch.Generator().manual_seed(0)

    def flipped():
        return z * (torch.randint(2, z.shape, generator=generator) * 2 - 1)

    assert Magnitude().measure(flipped(), flipped())
    torch.testing.assert_close(Magnitude()(flipped()), z.abs())
    once = flipped()
    assert not Magnitude().measure(once, once)
    assert not Magnitude().measure(z, z + 0.01)


def detailed(pictures, seed):
    """Smooth pictures, uint8 (N, 3, H, W), with details of their own, float in [0, 1]."""
    drawn = uniform(torch.Generator().manual_seed(seed), *pictures.shape)
    return 0.75 * pictures.float() / 255 + 0.25 * drawn


class Mixture:
    """Under random signs, faces of weight ``share`` with ``count`` pictures of a pool, whose numbers are kept."""

    def __init__(self, pool, count, share):
        self.pool, self.count, self.share, self.numbers = pool, count, share, None

    def __call__(self, z, generator):
        self.numbers = torch.rand(len(z), len(self.pool), generator=generator).argsort(dim=1)[:, : self.count]
        self.public = self.pool[self.numbers].mean(dim=1) * (1 - self.share)
        signs = torch.randint(2, z.shape, generator=generator) * 2 - 1
        return signs * (self.share * (4 * z - 2) + self.public)


@pytest.mark.parametrize(("count", "least"), [(1, 0.95), (2, 0.8)])
def test_the_public_pictures_of_a_mixture_are_found_and_taken_out(people, count, least):
    generator, faces = torch.Generator().manual_seed(2), detailed(people(60, 7), 0)
    send = Mixture(4 * detailed(people(150, 5), 1) - 2, count, 0.5)
    view = Unmixed()
    assert not view.measure(send(faces, generator), send(faces, generator))  # of no pool
    view.mixed_in = send.pool, count
    assert view.measure(send(faces, generator), send(faces, generator))
    _, public, face, weight = view(send(faces, generator)).split((3, 3, 3, 1), dim=1)
    right = (public - send.public).flatten(1).norm(dim=1) < 0.2 * send.public.flatten(1).norm(dim=1)
    assert float(right.float().mean()) > least
    assert float((weight[right] - 0.5).abs().mean()) < 0.05
    assert float((face[right] - (4 * faces[right] - 2)).abs().median()) < 0.1
    sent = send(faces, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as where networks are trained: the search is not
        hurried = view(sent)
    assert torch.equal(hurried, view(sent))


def test_a_mixture_is_seen_through_where_its_pool_is_known(people):
    generator, send = torch.Generator().manual_seed(3), Mixture(4 * detailed(people(150, 5), 1) - 2, 1, 0.5)
    known, unseen = (example(detailed(people(*which), which[0]), send, generator) for which in ((120, 0), (30, 7)))
    losses = {}
    for mixed_in in (None, (send.pool, 1)):
        inputs = Inputs(mixed_in)
        losses[mixed_in is None] = inputs.choose(known, unseen, 0)[inputs.name]
    assert "unmixed" in inputs.name
    assert losses[False] < 0.6 * losses[True]
    again = Inputs((send.pool, 1))  # as weights are loaded: the pool is the mechanism's, and not among them
    weights = {name: value.clone() for name, value in inputs.state_dict().items()}
    assert again.restore(weights, "")
    again.load_state_dict(weights)
    assert all(value.numel() < send.pool.numel() for value in weights.values())
    assert torch.equal(again(known.sent[:2]), inputs(known.sent[:2]))


def test_a_negative_is_turned_round(people):
    faces = people(40).float() / 255
    view = Oriented()
    view.measure(inverted(faces, torch.Generator().manual_seed(0)), faces)
    torch.testing.assert_close(view(1 - faces)[:, :3], view(faces)[:, :3], rtol=0, atol=1e-5)


def test_one_in_hundreds_at_another_scale_moves_no_limit(people):
    faces = people(200).float() / 255
    faces[17] *= 1e4
    inputs = Inputs()
    inputs.limit(faces)
    assert torch.equal(inputs(faces[:17]), faces[:17])
    assert float(inputs(faces).max()) < 20


@pytest.mark.parametrize("text", ["log+standardised", "raw", "auto"])
def test_views_are_named_in_options(text):
    assert InputOptions(input=text).input == text


@pytest.mark.parametrize("text", ["logs", "raw+log", "auto+log", "", "log+"])
def test_unknown_views_are_refused(text):
    with pytest.raises(ValueError, match=r"no view .*choose from raw, levelled"):
        InputOptions(input=text)


def test_a_view_with_nothing_to_undo_cannot_be_pinned(people):
    with pytest.raises(ValueError, match="'levelled' finds nothing to undo"):
        Inputs().pin(["levelled"], example(people(80).float() / 255, OPEN["plain"], None))
    with pytest.raises(ValueError, match="at most 3"):
        Inputs().pin(["log", "scaled", "sorted", "standardised"], example(people(8).float(), OPEN["plain"], None))


TINY = {"widths": (8, 16), "stem_stride": 2, "batch_size": 16, "learning_rate": 4e-3, "images": 1600}
KINDS = {"unet": (UNet, UNetOptions), "unet-ensemble": (UNetEnsemble, UNetEnsembleOptions)}


def fit(make_adversary, people, kind, name="unet", **more):
    make, options = KINDS[name]
    attack = make(options(**TINY | more.pop("options", {})))
    defense = Sends({**BURIED, "plain": (OPEN["plain"], None)}[kind][0])
    return defense, attack, attack.learn(make_adversary(defense, faces=people(150), **more))


def error(attack, defense, people):
    unseen = people(30, 7)
    return float((attack.recover(observe(defense, unseen)) - unseen / 255).abs().mean())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["offset", "gain", "low bits", "some huge"])
def test_a_network_recovers_a_buried_face(make_adversary, people, kind, name):
    defense, attack, report = fit(make_adversary, people, kind, name)
    assert report.details["input"] == attack.inputs.name != "raw"
    assert report.details["input_losses"]["raw"] > 2 * report.details["input_losses"][attack.inputs.name]
    assert error(attack, defense, people) < 0.6 * report.details["floor_loss"]


def test_an_ordinary_defence_trains_as_if_there_were_no_ladder(make_adversary, people):
    few = {"images": 160}
    _, free, report = fit(make_adversary, people, "plain", options=few)
    _, pinned, _ = fit(make_adversary, people, "plain", options=few | {"input": "raw"})
    assert report.details["input"] == "raw"
    assert list(report.details["input_losses"]) == ["raw"]
    for name, value in free.network.state_dict().items():
        assert torch.equal(value, pinned.network.state_dict()[name])


def test_a_face_at_another_scale_is_no_reason_to_refuse_the_others(make_adversary, people):
    defense, attack, _ = fit(make_adversary, people, "plain", options={"images": 640})
    sent = observe(defense, people(20, 7)).representations
    alone = attack.recover(Observation(sent))
    sent[3] *= 1e4
    beside = attack.recover(Observation(sent))
    rest = torch.arange(20) != 3
    torch.testing.assert_close(beside[rest], alone[rest])
    with pytest.raises(ValueError, match="trained on"):
        attack.recover(Observation(sent * 255))


class Killed(Exception):
    pass


def test_stored_and_resumed_inputs_are_the_same(make_adversary, people, tmp_path, monkeypatch):
    few = {"images": 160}
    defense, whole, report = fit(make_adversary, people, "offset", options=few)
    sent = observe(defense, people(10, 7))
    fresh = UNet(whole.options)
    fresh.prepare(make_adversary(defense, faces=people(150)))
    fresh.load_state_dict(whole.state_dict())
    assert torch.equal(fresh.recover(sent), whole.recover(sent))
    assert fresh.inputs.name == report.details["input"]

    monkeypatch.setattr(attacks.parts.training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)

    def killing(done, total, **fields):
        if done == 80:
            raise Killed

    with pytest.raises(Killed):
        fit(make_adversary, people, "offset", options=few, checkpoint=tmp_path, report=killing)
    _, resumed, again = fit(make_adversary, people, "offset", options=few, checkpoint=tmp_path)
    assert again.details == report.details
    assert torch.equal(resumed.recover(sent), whole.recover(sent))


def test_weights_of_something_else_are_refused(make_adversary, people):
    defense = Sends(OPEN["plain"])
    other = UNet(UNetOptions(**TINY))
    other.prepare(make_adversary(defense, faces=people(150)))
    with pytest.raises(RuntimeError, match="network"):
        other.load_state_dict({"network.mean": torch.zeros(3)})
