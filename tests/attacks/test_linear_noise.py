"""Noise that is not the same everywhere, and noise that averages out: against the textbook with its true variances."""

import pytest
import torch
from interception import observe
from linear_world import defense_of, error
from pictures import smooth
from undeclared import Silent, tinted
from uneven import Partly, Reassembled, Shared, Weighed, Windows

from attacks.base import Observation
from attacks.linear import Linear, LinearOptions
from attacks.parts.operators import linear_maps
from attacks.parts.posterior import IterativePosterior
from attacks.unrolled import Unrolled, UnrolledOptions
from defenses.base import noise_is_shared

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


@pytest.mark.parametrize("off", [0, 0.05, 0.8])
def test_noise_of_colours_and_maps_leaves_the_planes_apart_where_that_does_no_harm(make_adversary, off):
    defense = type("Weighed", (Weighed,), {"off": off})(image_size=SIZE)
    attack, _ = fitted(make_adversary, defense)
    victims = tinted(48, SIZE, 50)
    faces, observation = victims.float() / 255, observe(defense, victims)
    recovered = attack.run(observation)
    (posterior, _), *others = attack.posteriors(torch.zeros(48, 1, dtype=torch.int64))
    assert posterior.joint is (off == 0.8)
    assert not others
    sent, reckoned = observation.representations[:, 0], (attack.noise * attack.spread).square()
    exact = textbook(attack, defense, reckoned.expand(defense.representation_shape), sent)
    torch.testing.assert_close(recovered, exact, rtol=0, atol=1e-6)
    best = textbook(attack, defense, defense.scale.square().expand(defense.representation_shape), sent)
    assert error(recovered, faces) < 1.005 * error(best, faces)
    again = Linear(LinearOptions(rank=8))
    again.prepare(make_adversary(defense, faces=tinted(160, SIZE, 1)))
    again.load_state_dict(attack.state_dict())
    torch.testing.assert_close(again.run(observation), recovered, rtol=0, atol=1e-9)


def test_the_same_rounding_of_the_same_faces_is_no_noise_of_few_directions(make_adversary):
    defense = defense_of("quantise", bits=3)
    attack = Linear(LinearOptions(rank=8))
    report = attack.learn(make_adversary(defense, faces=smooth(40, 24, seed=1)))
    assert "noise_directions" not in report.details


def test_noise_beside_hidden_states_is_drawn_anew_for_every_face():
    class Noisy(Silent):
        name = "noisy-silent"

        def transform(self, faces, state, generator):
            sent = super().transform(faces, state, generator)
            return sent + 0.3 * torch.randn(sent.shape, generator=generator, dtype=sent.dtype)

    maps = linear_maps(Noisy(image_size=SIZE))
    assert maps.details["states_found"] == 18
    faces = tinted(48, SIZE, 60).float() / 255
    sent, rows = maps.send(faces, torch.Generator().manual_seed(1))
    noise = torch.empty(48, sent[0].numel(), dtype=torch.float64)
    for row in rows.unique().tolist():
        at, operator = rows == row, maps.operators[row]
        noise[at] = (sent[at] - operator(faces[at].double()) - operator.offset).flatten(1)
    # Another state's map would leave far more.
    assert float(noise.std()) == pytest.approx(0.3, rel=0.1)
    alike = torch.corrcoef(noise) - torch.eye(48, dtype=torch.float64)
    assert float(alike.abs().max()) < 0.25


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


# -- noise that a batch shares -------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_noise_of_a_batch_is_taken_off(make_adversary, declared):
    defense = type("Shared", (Shared,), {"shares": declared})(image_size=SIZE)
    attack, report = fitted(make_adversary, defense)
    assert report.details["noise_shared"] == pytest.approx(float(defense.scale.square().mean().sqrt()), rel=0.1)
    assert report.details["noise"] < 1e-5
    victims = tinted(8, SIZE, 50)
    faces, observation = victims.float() / 255, observe(defense, victims)
    recovered = attack.run(observation)
    # Eight faces and one noise, all of them unknown, in one textbook solve.
    operator, sent = defense.linear_operator(None), observation.representations[:, 0].double()
    unit = torch.eye(3 * SIZE**2, dtype=torch.float64).view(-1, 3, SIZE, SIZE)
    spread = operator(torch.cat([attack.covariance.times(part) for part in unit.split(64)])).flatten(1)
    own = operator(spread.T.reshape(-1, 3, SIZE, SIZE)).flatten(1)
    variance = torch.diag((attack.shared * attack.spread).square().expand(defense.representation_shape).flatten())
    residual = (sent - operator(attack.mean_face()[None]) - operator.offset).flatten(1)
    mean = residual.mean(dim=0)
    of_mean = torch.linalg.solve(own / len(sent) + variance, mean) / len(sent)
    rest = torch.linalg.lstsq(own, (residual - mean).T, rcond=1e-12, driver="gelsd").solution
    exact = attack.mean_face() + (spread @ (rest + of_mean[:, None])).T.view(-1, 3, SIZE, SIZE)
    torch.testing.assert_close(recovered, exact, rtol=0, atol=2e-3)
    alone = torch.cat([attack.run(Observation(observation.representations[[i]])) for i in range(len(victims))])
    assert error(recovered, faces) < 0.6 * error(alone, faces)


def test_several_turns_show_the_shared_noise_better(make_adversary):
    defense = Shared(image_size=SIZE)
    attack, _ = fitted(make_adversary, defense)
    victims = tinted(8, SIZE, 50)
    errors = [error(attack.run(observe(defense, victims, k)), victims.float() / 255) for k in (1, 4)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_the_network_sees_faces_without_the_noise_they_share(make_adversary):
    defense = Shared(image_size=SIZE)
    small = {"rank": 8, "widths": (4, 8), "steps": 12, "batch_size": 16, "learning_rate": 2e-3}
    attack = Unrolled(UnrolledOptions(**small))
    attack.learn(make_adversary(defense, faces=tinted(160, SIZE, 1)))
    victims = tinted(16, SIZE, 50)
    observation = observe(defense, victims, 2)
    alone = torch.cat([attack.recover(Observation(observation.representations[[i]])) for i in range(4)])
    faces = victims.float() / 255
    assert error(attack.recover(observation)[:4], faces[:4]) < 0.7 * error(alone, faces[:4])


def test_sharing_is_seen_in_numbers():
    assert noise_is_shared(type("Quiet", (Shared,), {"shares": False})(image_size=SIZE))
    others = [of_kind("equal"), *(defense_of(name) for name in ("none", "noise", "partialface"))]
    assert not any(noise_is_shared(defense) for defense in others)


# -- what is linear in some channels alone -------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_channels_that_are_linear_are_used(make_adversary, declared):
    defense = type("Partly", (Partly,), {"declares": declared})(image_size=SIZE)
    attack, report = fitted(make_adversary, defense)
    assert report.details["linearity"].endswith(", in 2 of 4 channels")
    assert report.details["noise"] == pytest.approx(0.02, rel=0.05)
    assert attack.maps.channels.tolist() == [0, 3]
    observation = observe(defense, tinted(4, SIZE, 50))
    operator = type("Told", (Partly,), {"declares": True})(image_size=SIZE).linear_operator(None)
    kept = observation.representations[:, 0, [0, 3]]
    exact = IterativePosterior(attack.covariance, operator, float(attack.noise), 400)
    mean = attack.mean_face()[None]
    expected = mean + exact(kept.double() - operator(mean))
    # The offset of a map that nobody declared is the mean of some noisy draws.
    torch.testing.assert_close(attack.run(observation), expected, rtol=0, atol=1e-5 if declared else 0.02)


def test_the_network_is_shown_the_channels_that_are_not(make_adversary):
    defense = Partly(image_size=SIZE)
    attack = Unrolled(UnrolledOptions(rank=8, widths=(8, 16), steps=4, batch_size=16))
    attack.learn(make_adversary(defense, faces=tinted(160, SIZE, 1)))
    assert len(attack.network.mean) == 8
    observation = observe(defense, tinted(4, SIZE, 50))
    shown = attack._show(observation.representations, torch.zeros(4, 1, dtype=torch.int64))
    torch.testing.assert_close(shown[:, 6:], observation.representations[:, 0, [1, 2]])
    assert attack.recover(observation).shape == (4, 3, SIZE, SIZE)


# -- noise of few directions ---------------------------------------------------------------------


def test_noise_that_was_put_together_again_is_taken_apart(make_adversary):
    defense = Reassembled(image_size=SIZE)
    attack, report = fitted(make_adversary, defense)
    assert report.details["noise_directions"] == 12
    assert report.saturated is True
    victims = tinted(24, SIZE, 50)
    faces, observation = victims.float() / 255, observe(defense, victims)
    # The twelve sums and their own noises, all written out.
    unit = defense.basis.view(12, 3, SIZE, SIZE)
    spread = attack.covariance.times(unit).flatten(1)  # rows of (S B^T)^T
    system = spread @ defense.basis.T + torch.diag(defense.scale.square())
    known = defense.coefficients(observation.representations[:, 0] - attack.mean_face())
    best = attack.mean_face() + (torch.linalg.solve(system, known.T).T @ spread).view(-1, 3, SIZE, SIZE)
    recovered = attack.run(observation)
    assert error(recovered, faces) == pytest.approx(error(best, faces), rel=0.02)
    assert error(recovered, faces) < 0.92 * error(attack.mean_face().float().expand_as(faces), faces)
