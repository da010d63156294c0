import pytest
import torch
from linear_world import adversary_of, defense_of, error, observe
from undeclared import Silent

from attacks.base import Observation
from attacks.linear import Linear
from attacks.unrolled import Unrolled, UnrolledOptions

TINY = {
    "widths": (4, 8),
    "stem_stride": 2,
    "batch_size": 16,
    "images": 320,
    "learning_rate": 3e-3,
    "rank": 12,
    "state_faces": 120,
    "traffic": 240,
}


def fitted(make_adversary, defense, knowledge="oracle", **options):
    attack = Unrolled(UnrolledOptions(**{**TINY, **options}))
    report = attack.learn(adversary_of(make_adversary, defense, knowledge))
    return attack, report


@pytest.fixture(scope="module")
def partialface(make_adversary):
    defense = defense_of("partialface")
    return defense, *fitted(make_adversary, defense)


def test_an_open_door_is_walked_through(make_adversary):
    attack, _ = fitted(make_adversary, defense_of("none"), images=64)
    faces, observation = observe(defense_of("none"))
    assert error(attack.recover(observation), faces) < 1e-3


def test_it_is_no_worse_than_the_linear_estimate_it_starts_from(partialface):
    defense, attack, _ = partialface
    faces, observation = observe(defense, 32)
    assert error(attack.recover(observation), faces) < 1.02 * error(attack.linear.recover(observation), faces)


def test_it_does_not_contradict_what_was_sent(partialface):
    defense, attack, _ = partialface
    _, observation = observe(defense, 4)
    recovered = attack.run(observation).detach().double()
    for face, sent, state in zip(recovered, observation.representations[:, 0], observation.states[:, 0], strict=True):
        operator = defense.linear_operator(state)
        again = operator(face[None]) + operator.offset
        assert float((again - sent).square().mean().sqrt()) < 2e-3 * float(sent.square().mean().sqrt())


def test_the_report_covers_every_state_and_tells_of_the_linear_start(partialface):
    defense, _, report = partialface
    assert {tuple(s) for s in report.states_seen.tolist()} == {tuple(s) for s in defense.states().tolist()}
    assert report.details["linear_rank"] == 12
    assert [images for images, _ in report.curve] == sorted(images for images, _ in report.curve)


def test_the_spread_is_larger_where_a_subset_says_less(partialface):
    _, attack, _ = partialface
    kinds = attack.linear.kinds()
    for row, kind in enumerate(kinds):
        assert torch.equal(attack.spread[row], attack.spread[kind])
    assert len({float(attack.spread[kind].mean()) for kind in set(kinds)}) == 6


def test_more_interceptions_leak_more(partialface):
    defense, attack, _ = partialface
    errors = []
    for k in (1, 8):
        faces, observation = observe(defense, 8, k)
        errors.append(error(attack.recover(observation), faces))
    assert errors[1] < errors[0]


def test_a_stored_fit_is_read_back_where_faces_are_fewer_than_components(make_adversary):
    defense = defense_of("partialface")
    attack, _ = fitted(make_adversary, defense, "whitebox", images=32, rank=400)
    again = Unrolled(attack.options)
    again.prepare(adversary_of(make_adversary, defense, "whitebox"))
    again.load_state_dict(attack.state_dict())
    assert again.linear.prior.rank == attack.linear.prior.rank < 400


def test_another_scale_of_input_is_refused(partialface):
    defense, attack, _ = partialface
    _, observation = observe(defense, 8)
    with pytest.raises(ValueError, match="un-normalised"):
        attack.recover(Observation(100 * observation.representations, observation.states))


@pytest.mark.slow
def test_it_starts_from_maps_that_nobody_declared(make_adversary):
    defense = Silent(image_size=24)
    attack, report = fitted(make_adversary, defense, "whitebox")
    assert report.details["linearity"] == "undeclared, but linear"
    assert report.states_read == report.details["state_accuracy"] > 0.9
    faces, observation = observe(defense, 16, states=False)
    assert error(attack.recover(observation), faces) < 1.05 * error(attack.linear.recover(observation), faces)


def test_no_more_is_estimated_at_once_than_memory_is_meant_to_hold(make_adversary, monkeypatch):
    most, seen = 3 * 16 * 3 * 24 * 24, []
    monkeypatch.setattr("attacks.unrolled._VALUES_AHEAD", most)
    estimate = Linear.estimate
    monkeypatch.setattr(Linear, "estimate", lambda self, z, rows: seen.append(z.numel()) or estimate(self, z, rows))
    defense = defense_of("none")
    assert defense.representation_shape == (3, 24, 24)
    fitted(make_adversary, defense, images=16 * 8)
    assert max(seen) == most
