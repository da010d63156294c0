from __future__ import annotations

import pytest
import torch

from attacks.parts import training as checkpoint
from attacks.parts.training import Plateau, Trainer, Training, TrainingOptions, WarmHoldDecay


def test_round_trip_of_tensors_and_json(tmp_path):
    folder = tmp_path / "deep" / "fit"
    tensors = {"scalar": torch.tensor(3.5), "view": torch.arange(6).view(2, 3).T, "flags": torch.tensor([True])}
    checkpoint.save(folder, tensors, {"step": 7, "curve": [[1, 0.5]]})
    loaded, meta = checkpoint.load(folder)
    assert meta == {"step": 7, "curve": [[1, 0.5]]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_nothing_stored_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "absent") is None


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_file_is_named(tmp_path, content):
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {"step": 1})
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(tmp_path)


FLOOR = 0.2


@pytest.mark.parametrize(
    ("curve", "reached"),
    [
        ([(1, 0.2), (2, 0.1), (4, 0.0995)], True),  # flat, whatever came before
        ([(1, 0.11), (2, 0.1), (4, 0.09)], False),
        ([(1, 0.1), (2, 0.12)], True),  # a rise
    ],
)
def test_a_plateau_is_a_last_doubling_that_gained_nothing(curve, reached):
    assert Plateau().reached(curve, FLOOR) is reached


@pytest.mark.parametrize(
    ("tolerances", "earlier", "loss", "reached"),
    [
        ((0.03, 1e-9), 0.1, 0.0971, True),  # a share of the earlier loss
        ((0.03, 1e-9), 0.1, 0.0969, False),
        ((1e-9, 0.01), 0.01, 0.0081, True),  # a share of the floor
        ((1e-9, 0.01), 0.01, 0.0079, False),
    ],
)
def test_what_counts_as_nothing(tolerances, earlier, loss, reached):
    assert Plateau(*tolerances).reached([(100, earlier), (200, loss)], FLOOR) is reached


@pytest.mark.parametrize("curve", [[], [(8, 0.1)], [(5, 0.1), (8, 0.1)], [(1, 0.1), (8, 0.1)]])
def test_without_a_point_near_half_nothing_is_claimed(curve):
    assert Plateau().gain(curve) is None
    assert not Plateau().reached(curve, FLOOR)


@pytest.mark.parametrize(("loss", "reached"), [(1.02, True), (1.04, False)])
def test_what_does_worse_than_the_floor_has_not_come_to_rest(loss, reached):
    assert Plateau(relative=0.03).reached([(100, loss * FLOOR), (200, loss * FLOOR)], FLOOR) is reached


@pytest.mark.parametrize(("loss", "better"), [(1.1, False), (0.98, False), (0.96, True)])
def test_what_rests_at_the_floor_has_learnt_nothing(loss, better):
    assert Plateau(relative=0.03).beats(loss * FLOOR, FLOOR) is better


def test_the_point_nearest_to_half_is_compared():
    assert Plateau().gain([(30, 0.5), (50, 0.3), (60, 0.25), (100, 0.2)]) == pytest.approx(0.1)


def test_rises_holds_and_falls():
    schedule = WarmHoldDecay(steps=100, warmup=0.1, decay=0.3)
    factors = [schedule.factor(step) for step in range(schedule.end())]
    assert len(factors) == 100
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:70] == [1.0] * 60
    assert factors[70] == pytest.approx(30 / 31)
    assert factors[99] == pytest.approx(1 / 31)
    assert factors[:10] == sorted(factors[:10])
    assert factors[70:] == sorted(factors[70:], reverse=True)


def test_an_early_decay_keeps_the_shares():
    schedule = WarmHoldDecay(steps=1000, warmup=0.0, decay=0.2)
    assert schedule.end(400) == 500
    assert schedule.factor(399, 400) == 1.0
    assert schedule.factor(499, 400) == pytest.approx(1 / 101)
    assert schedule.end(800) == schedule.end() == 1000


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_every_step_has_a_positive_factor_even_in_the_shortest_training(steps, decay):
    schedule = WarmHoldDecay(steps=steps, warmup=0.5, decay=decay)
    assert 1 <= schedule.hold_end <= steps
    assert all(0 < schedule.factor(step) <= 1 for step in range(steps))


def test_checks_end_with_the_hold_and_hold_its_half():
    schedule = WarmHoldDecay(steps=100, warmup=0.0, decay=0.2)
    assert schedule.checks()[-1] == schedule.hold_end == 80
    assert 40 in schedule.checks()
    assert schedule.checks() == sorted(set(schedule.checks()))
    assert WarmHoldDecay(1, 0.0, 0.0).checks() == [1]


@pytest.mark.parametrize(("name", "what"), [("", "trial's loss"), ("student", "trial: the student's loss")])
def test_a_loss_that_is_not_finite_names_the_training_and_the_step(make_adversary, plain, name, what):
    network = torch.nn.Linear(1, 1)
    trainer = Trainer("trial", make_adversary(plain(image_size=8)), 0, TrainingOptions())

    def loss(step):
        return network(torch.ones(1, 1)).sum() * (float("nan") if step == 3 else 1.0)

    training = Training(network=network, loss=loss, validate=lambda network: 0.0, floor=1.0, steps=9, name=name)
    with pytest.raises(FloatingPointError, match=rf"{what} became nan at step 4.*learning_rate"):
        trainer.train(training)


def test_states_are_noted_once_each(make_adversary, plain):
    trainer = Trainer("trial", make_adversary(plain(image_size=8)), 0, TrainingOptions())
    for step in range(5):
        trainer.note(torch.tensor([[step % 3, 0], [1, 1]]))
    assert trainer.states_seen.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0]]
