from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from interception import observe

from attacks.base import Observation
from attacks.parts.unet_network import UNetNetwork
from attacks.unet import UNet, UNetOptions
from bench.muon import matrices
from bench.run.textbook import textbook_unet
from defenses.base import Defense
from defenses.noise import Noise, NoiseOptions

SIZE = 16
TINY = {"widths": (8, 8), "stem_stride": 2, "batch_size": 10, "images": 200}
SMALL = {"widths": (8, 16), "stem_stride": 2, "batch_size": 15, "learning_rate": 3e-3}


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize(
    ("channels", "height", "width", "size"),
    [(3, 16, 16, 16), (27, 20, 20, 20), (1, 4, 4, 23), (16, 7, 7, 16), (3, 40, 24, 16), (8, 1, 1, 9)],
)
def test_any_representation_becomes_a_face(stride, channels, height, width, size):
    options = UNetOptions(widths=(4, 6, 8), stem_stride=stride)
    network = UNetNetwork(channels, size, options, side=max(height, width))
    faces = network(torch.rand(2, channels, height, width))
    assert faces.shape == (2, 3, size, size)
    assert faces.dtype == torch.float32


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (3, 2), (12, 2), (5, 4)])
def test_it_is_the_textbook_network_and_so_are_its_gradients(channels, stride, norm):
    torch.manual_seed(0)
    options = UNetOptions(widths=(8, 12, 16), stem_stride=stride, norm=norm)
    network = UNetNetwork(channels, 16, options).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.mean.normal_()
    network.std.uniform_(0.5, 2)
    plain = copy.deepcopy(network)
    sent = torch.randn(3, channels, 16, 16)
    ours, expected = network.to(memory_format=torch.channels_last)(sent), textbook_unet(plain, sent)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    direction = torch.randn_like(expected)
    expected.backward(direction)
    ours.backward(direction)
    for parameter, of_plain in zip(network.parameters(), plain.parameters(), strict=True):
        largest = max(1.0, float(of_plain.grad.abs().max()))
        torch.testing.assert_close(parameter.grad, of_plain.grad, rtol=1e-4, atol=1e-4 * largest)


def test_an_untrained_network_returns_the_mean_face():
    network = UNetNetwork(3, SIZE, UNetOptions(widths=(4, 8)))
    network.mean_face.copy_(torch.rand(3, SIZE, SIZE))
    torch.testing.assert_close(network(torch.rand(2, 3, SIZE, SIZE)), network.mean_face.expand(2, -1, -1, -1))


def test_the_layout_selects_statistics_and_weights():
    """A sparse input with its layout equals the spread input without them."""
    torch.manual_seed(0)
    network = UNetNetwork(2, 8, UNetOptions(widths=(4, 4), norm="none"), width=6)
    network.std.copy_(torch.rand(6) + 0.5)
    network.head.weight.data.normal_()
    layout = torch.tensor([[4, 1], [0, 5]])
    sent = torch.randn(2, 2, 8, 8)
    spread = torch.zeros(2, 6, 8, 8).scatter(1, layout[:, :, None, None].expand_as(sent), sent)
    torch.testing.assert_close(network(sent, layout), network(spread))


def test_the_published_widths_have_the_size_of_the_published_network():
    parameters = sum(p.numel() for p in UNetNetwork(27, 112, UNetOptions()).parameters())
    assert 30e6 < parameters < 32e6  # 31.0 M for the original with 64 to 1024 channels


@pytest.mark.parametrize(("loss", "optimiser"), [("l1", "adam"), ("l1+ssim", "adam"), ("l1+ssim", "muon")])
def test_it_inverts_the_identity_on_faces_it_never_saw(make_adversary, plain, make_faces, loss, optimiser):
    attack = UNet(UNetOptions(**SMALL, images=2100, loss=loss, optimiser=optimiser))
    defense = plain(image_size=SIZE)
    report = attack.learn(make_adversary(defense))
    unseen = make_faces(20, seed=7)
    error = (attack.recover(observe(defense, unseen)) - unseen / 255).abs().mean()
    assert error < 0.03
    assert error < report.details["floor_loss"] / 5
    assert report.details["validation_loss"] == report.curve[-1][1] < 0.03
    assert report.states_seen is None


def test_muon_turns_convolutions_and_keeps_their_norms(make_adversary, plain):
    adversary, grown = make_adversary(plain(image_size=SIZE)), {}
    for optimiser in ("muon", "adam"):
        attack = UNet(UNetOptions(**SMALL, images=2100, optimiser=optimiser))
        attack.prepare(adversary)
        chosen = {id(weight) for weight in matrices(attack.network)}
        names = [name for name, weight in attack.network.named_parameters() if id(weight) in chosen]
        before = copy.deepcopy(attack.network)
        attack.fit(adversary)
        first, last = (torch.stack([net.get_parameter(n).norm() for n in names]) for net in (before, attack.network))
        grown[optimiser] = last / first
    assert grown["muon"].tolist() == pytest.approx([1.0] * 7, abs=5e-3)  # averaging weights shortens them
    assert (grown["adam"] > 1.1).all()


def test_only_the_states_drawn_are_recorded(make_adversary, pick):
    class Stuck(pick):
        def draw(self, count, generator, labels=None):
            return torch.ones(count, 1, dtype=torch.int64)

    report = UNet(UNetOptions(**TINY | {"infer_state": False})).learn(make_adversary(Stuck()))
    assert report.states_seen.tolist() == [[1]]


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-9])
def test_a_few_steps_are_flagged_unsaturated_even_where_the_loss_is_flat(make_adversary, plain, learning_rate):
    options = UNetOptions(**TINY | {"images": 60, "learning_rate": learning_rate})
    report = UNet(options).learn(make_adversary(plain(image_size=SIZE)))
    assert report.saturated is False
    assert report.details["steps"] == 6


@pytest.mark.slow
def test_what_learns_nothing_stops_early_and_is_not_called_saturated(make_adversary, plain):
    class Nothing(plain):
        def transform(self, faces, state, generator):
            return torch.rand(faces.shape, generator=generator)

    attack = UNet(UNetOptions(**TINY | {"images": 8000, "early_stop": True}))
    report = attack.learn(make_adversary(Nothing(image_size=SIZE)))
    assert report.saturated is False  # at the floor a loss rests whether or not there is something to find
    assert report.details["stopped_early"] is True
    assert report.details["images_seen"] < 5000


def test_the_curve_ends_with_all_images_and_validates_on_other_identities(make_adversary, plain):
    adversary = make_adversary(plain(image_size=SIZE))
    report = UNet(UNetOptions(**TINY | {"validation": 0.25})).learn(adversary)
    images = [count for count, _ in report.curve]
    assert images == sorted(images)
    assert images[-1] == 200
    assert report.details["validation_faces"] == 15  # 5 of 20 identities, 3 faces each
    assert report.details["training_faces"] == 45


def fitted(make_adversary, defense, knowledge, **options):
    attack = UNet(UNetOptions(**TINY | {"images": 750, "learning_rate": 2e-3} | options))
    return attack, attack.learn(make_adversary(defense, knowledge))


def error_of(attack, defense, faces, **how):
    return (attack.recover(observe(defense, faces, **how)) - faces / 255).abs().mean().item()


@pytest.fixture(scope="module")
def on_pick(make_adversary, pick):
    """A white box fitted behind the defence with states, and its report."""
    return fitted(make_adversary, pick(), "whitebox")


def test_more_knowledge_recovers_more(on_pick, make_adversary, pick, make_faces):
    unseen, defense, (inferred, report) = make_faces(30, seed=7), pick(), on_pick
    oracle, _ = fitted(make_adversary, defense, "oracle")
    mixture, plain_report = fitted(make_adversary, defense, "whitebox", infer_state=False, input="raw")
    black, _ = fitted(make_adversary, defense, "blackbox", input="raw")
    errors = [
        error_of(oracle, defense, unseen, states=True),
        error_of(inferred, defense, unseen),
        error_of(mixture, defense, unseen),
        error_of(black, defense, unseen),
    ]
    assert report.details["states_inferred"] is True
    assert report.details["state_inference_accuracy"] > 0.95
    assert plain_report.details["states_inferred"] is False
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert errors[1] < errors[2] < errors[3]


def test_a_black_box_trains_on_what_the_client_sends(make_adversary, pick, make_faces):
    """One fixed secret row: guesses mix six maps, the client shows the two that are sent."""
    defense, draws = pick(table=torch.tensor([[5, 0]])), torch.Generator().manual_seed(2)

    def client(faces):
        return defense.protect(faces, draws).representation

    errors = {}
    for way, given in (("client", True), ("guesses", False)):
        attack = UNet(UNetOptions(**SMALL, images=1200, client=given))
        report = attack.learn(make_adversary(defense, "blackbox", client=client))
        assert report.states_seen is None or not given
        errors[way] = error_of(attack, defense, make_faces(20, seed=7))
    assert errors["client"] < 0.7 * errors["guesses"]


def test_a_black_box_with_traffic_infers_the_table_and_recovers_as_much_as_a_white_one(
    on_pick, make_adversary, pick, make_faces
):
    unseen, defense, (known, _) = make_faces(30, seed=7), pick(), on_pick
    intercepted = observe(defense, make_faces(300, seed=8)).representations[:, 0]
    adversary = replace(make_adversary(defense, "blackbox"), traffic=lambda count: iter(intercepted.split(64)))
    attack = UNet(known.options)
    report = attack.learn(adversary)
    assert report.details["states_inferred"]
    assert report.details["states_found"] == len(defense.states())
    assert error_of(attack, defense, unseen) == pytest.approx(error_of(known, defense, unseen), rel=0.1)


def test_the_oracle_heeds_the_states_and_refuses_to_go_without(make_adversary, pick, make_faces):
    defense, unseen = pick(), make_faces(9, seed=7)
    attack, _ = fitted(make_adversary, defense, "oracle", images=200)
    told = observe(defense, unseen, states=True)
    lied = Observation(told.representations, (told.states + 1) % 3)
    assert not torch.allclose(attack.recover(told), attack.recover(lied))
    with pytest.raises(ValueError, match="states"):
        attack.recover(Observation(told.representations))


def test_states_that_look_alike_are_not_inferred(make_adversary, pick):
    class Alike(pick):
        """Without scales of their own, no map is told from another."""

        ratio = 1.0

    _, report = fitted(make_adversary, Alike(), "whitebox", images=20)
    assert report.details["states_inferred"] is False
    assert report.details["state_inference_accuracy"] < 0.95


def test_a_canonical_that_is_no_placement_is_used_at_oracle(make_adversary, pick):
    class Scales(pick):
        def canonical(self, representation, state):
            return super().canonical(representation, state) / 2

    attack, _ = fitted(make_adversary, Scales(), "oracle", images=20)
    assert len(attack.network.mean) == 6


def test_states_that_cannot_be_listed_are_heeded_at_oracle(make_adversary, pick, make_faces):
    class Unlisted(pick):
        def states(self):
            return None

    defense, unseen = Unlisted(), make_faces(9, seed=7)
    attack, report = fitted(make_adversary, defense, "oracle", images=200)
    assert len(attack.network.mean) == 6
    assert report.states_seen is None
    told = observe(defense, unseen, states=True)
    lied = Observation(told.representations, (told.states + 1) % 3)
    assert not torch.allclose(attack.recover(told), attack.recover(lied))


class Jumbled(Defense):
    """Pixels in an order that is the same for all faces, and secret."""

    name = "jumbled"

    def __init__(self, seed=1):
        super().__init__(image_size=SIZE)
        self.register_buffer("order", torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(seed)))

    @property
    def secret(self):
        return {"order": self.order}

    def guess(self, generator):
        return Jumbled(int(torch.randint(1000, (1,), generator=generator)) + 2)

    def transform(self, faces, state, generator):
        return faces.flatten(2)[:, :, self.order].view_as(faces)

    def canonical(self, representation, state):
        return representation.flatten(2)[:, :, self.order.argsort()].view_as(representation)


def test_an_order_of_places_that_is_known_is_undone(make_adversary, make_faces):
    defense, unseen = Jumbled(), make_faces(9, seed=7)
    plain, _ = fitted(make_adversary, Noise(NoiseOptions(scale=1e-6), image_size=SIZE), "whitebox")
    known, _ = fitted(make_adversary, defense, "whitebox")
    guessed, _ = fitted(make_adversary, defense, "blackbox")
    open_door = error_of(plain, plain.mechanism, unseen)
    assert error_of(known, defense, unseen) == pytest.approx(open_door, rel=0.2)
    assert error_of(guessed, defense, unseen) > 2 * open_door


def test_several_interceptions_are_averaged(make_adversary, pick, make_faces):
    defense, unseen = pick(), make_faces(6, seed=7)
    attack, _ = fitted(make_adversary, defense, "whitebox", images=200)
    several = observe(defense, unseen, k=3)
    each = [attack.run(Observation(several.representations[:, i : i + 1])) for i in range(3)]
    torch.testing.assert_close(attack.run(several), torch.stack(each).mean(dim=0))
    assert not torch.allclose(each[0], each[1])


class Gathered(Defense):
    """Squares of 4 x 4 pixels as 48 channels, in which nothing is lost."""

    name = "gathered"

    @property
    def representation_shape(self):
        return (48, self.image_size // 4, self.image_size // 4)

    def transform(self, faces, state, generator):
        return torch.nn.functional.pixel_unshuffle(faces, 4)


def test_small_maps_become_squares_of_pixels(make_adversary, make_faces):
    attack = UNet(UNetOptions(**SMALL, images=1500))
    defense = Gathered(image_size=SIZE)
    attack.learn(make_adversary(defense))
    assert attack.network.lift == 4
    faces, flat = make_faces(20, seed=7), make_faces(20, seed=7).float().div(255)
    recovered = attack.recover(observe(defense, faces))
    coarse = torch.nn.functional.avg_pool2d(flat, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (recovered - flat).abs().mean() < 0.5 * (coarse - flat).abs().mean()


@pytest.mark.parametrize(("fresh", "chosen"), [(True, True), (False, None)])
def test_fresh_noise_is_averaged_before_the_network(make_adversary, plain, make_faces, fresh, chosen):
    defense = Noise(NoiseOptions(scale=0.4), image_size=SIZE) if fresh else plain(image_size=SIZE)
    attack = UNet(UNetOptions(widths=(8, 16), stem_stride=2, batch_size=15, images=2000 if fresh else 300))
    report = attack.learn(make_adversary(defense))
    assert report.details.get("averages_interceptions") is chosen
    faces = make_faces(30, seed=7)
    observation, errors = observe(defense, faces, 8), []
    for averages in (True, False):
        attack.averages.fill_(averages)
        errors.append(float((attack.recover(observation) - faces / 255).abs().mean()))
    assert (errors[0] < errors[1]) if fresh else (errors[0] == pytest.approx(errors[1], rel=1e-4))


@pytest.fixture(scope="module")
def inverter(make_adversary, plain):
    attack = UNet(UNetOptions(**TINY))
    attack.learn(make_adversary(plain(image_size=SIZE)))
    return attack


@pytest.mark.parametrize("drive", [lambda z: z * 255, lambda z: z - 3, lambda z: z / 255])
def test_input_of_another_range_is_refused(inverter, make_faces, drive):
    z = make_faces(12, seed=7)[:, None] / 255
    inverter.recover(Observation(z))
    with pytest.raises(ValueError, match="trained on"):
        inverter.recover(Observation(drive(z)))


def test_unusual_faces_are_not(inverter):
    extremes = torch.stack((torch.zeros(3, SIZE, SIZE), torch.ones(3, SIZE, SIZE)))
    assert inverter.recover(Observation(extremes[:, None])).shape == (2, 3, SIZE, SIZE)
    assert inverter.recover(Observation(extremes[:1, None])).shape == (1, 3, SIZE, SIZE)


def test_recovery_does_not_depend_on_the_batch(inverter, make_faces):
    z = make_faces(70, seed=7)[:, None] / 255
    together = inverter.recover(Observation(z))
    alone = torch.cat([inverter.recover(Observation(z[i : i + 1])) for i in (0, 65)])
    torch.testing.assert_close(together[[0, 65]], alone)
