"""Noise that is not the same everywhere, and noise that averages out: against the textbook with its true variances."""

import pytest
import torch
from interception import observe
from linear_world import defense_of, error
from pictures import smooth
from undeclared import tinted
from uneven import Windows

from attacks.base import Observation
from attacks.linear import Linear, LinearOptions

SIZE = 16


def of_kind(kind):
    return type(kind.capitalize(), (Windows,), {"kind": kind})(image_size=SIZE)


def fitted(make_adversary, defense, **options):
    attack = Linear(LinearOptions(**{"rank": 8, **options}))
    report = attack.learn(make_adversary(defense, faces=tinted(160, defense.image_size, 1)))
    return attack, report


def textbook(attack, defense, variance, sent):
    """mean + S A^T (A S A^T + V)^-1 (z - A mean - offset) with V = diag(variance), all written out."""
    operator, size = defense.linear_operator(None), defense.image_size
    unit = torch.eye(3 * size**2, dtype=torch.float64).view(-1, 3, size, size)
    covariance = torch.cat([attack.covariance.times(part) for part in unit.split(64)]).flatten(1)
    spread = operator(covariance.view(-1, 3, size, size)).flatten(1)  # S A^T, row by row
    system = operator(spread.T.reshape(-1, 3, size, size)).flatten(1) + torch.diag(variance.flatten())
    residual = sent.double() - operator(attack.mean_face()[None]) - operator.offset
    answer = spread @ torch.linalg.solve((system + system.T) / 2, residual.flatten(1).T)
    return attack.mean_face() + answer.T.view(-1, 3, size, size)


@pytest.mark.parametrize("kind", ["equal", "channel", "element"])
def test_each_value_counts_by_its_own_noise(make_adversary, kind):
    defense = of_kind(kind)
    attack, report = fitted(make_adversary, defense)
    shape = {"equal": (1, 1, 1), "channel": (5, 1, 1), "element": (5, SIZE, SIZE)}[kind]
    assert attack.spread.shape == shape
    true = defense.scale / defense.scale.square().mean().sqrt()
    assert float(((attack.spread / true).log()).square().mean().sqrt()) < 0.12
    assert ("noise_most" in report.details) is (kind != "equal")
    victims = tinted(24, SIZE, 50)
    observation = observe(defense, victims)
    recovered = attack.run(observation)
    sent, variance = observation.representations[:, 0], (attack.noise * attack.spread).square()
    exact = textbook(attack, defense, variance.expand(defense.representation_shape), sent)
    torch.testing.assert_close(recovered, exact, rtol=0, atol=1e-6)
    faces = victims.float() / 255
    best = textbook(attack, defense, defense.scale.square(), sent)
    assert error(recovered, faces) < 1.02 * error(best, faces)
    if kind != "equal":
        flat = textbook(attack, defense, attack.noise.square().expand(defense.representation_shape), sent)
        assert error(recovered, faces) < 0.9 * error(flat, faces)


def test_conjugate_gradients_weigh_alike(make_adversary):
    defense = of_kind("element")
    factored, _ = fitted(make_adversary, defense)
    iterated, _ = fitted(make_adversary, defense, solver="cg")
    observation = observe(defense, tinted(6, SIZE, 50), 2)
    torch.testing.assert_close(iterated.run(observation), factored.run(observation), rtol=0, atol=1e-5)


def test_a_stored_fit_keeps_what_it_measured(make_adversary):
    defense = of_kind("element")
    attack, _ = fitted(make_adversary, defense)
    again = Linear(LinearOptions(rank=8))
    again.prepare(make_adversary(defense, faces=tinted(160, SIZE, 1)))
    again.load_state_dict(attack.state_dict())
    observation = observe(defense, tinted(4, SIZE, 50))
    torch.testing.assert_close(again.recover(observation), attack.recover(observation), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_fresh_noise_averages_out(make_adversary, solver):
    defense = defense_of("noise", scale=0.3)
    attack, report = fitted(make_adversary, defense, solver=solver)
    assert report.details["noise_fresh"] == 1
    victims = smooth(24, 24, seed=50)
    for k in (1, 2, 8):
        observation = observe(defense, victims, k)
        # k values of variance s^2 say what their mean says, whose variance is s^2 / k.
        mean = observation.representations.double().mean(dim=1)
        quiet, _ = fitted(make_adversary, defense)
        quiet.noise.div_(k**0.5)
        expected = quiet.run(Observation(mean[:, None]))
        torch.testing.assert_close(attack.run(observation), expected, rtol=0, atol=1e-5)


def test_rounding_is_no_fresh_noise(make_adversary):
    attack, report = fitted(make_adversary, defense_of("blur"))
    assert "noise_fresh" not in report.details
    observation = observe(defense_of("blur"), smooth(4, 24, seed=50))
    twice = Observation(observation.representations.repeat(1, 2, 1, 1, 1))
    torch.testing.assert_close(attack.run(twice), attack.run(observation), rtol=0, atol=1e-7)
