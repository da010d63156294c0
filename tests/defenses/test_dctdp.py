"""DCTDP: the released code's arrays, the law of the noise, the budget, and what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats
import torch
from golden import COEFFICIENTS, golden, on_grid, pictures
from pictures import generator, noise
from pydantic import ValidationError
from torch import nn

import defenses.dctdp
from bench.nets.heads import CosFace
from defenses.dctdp import DCTDP, DCTDPOptions

GOLDEN = golden("dctdp")


def made(size=16, **options):
    """Not fitted, and with a sensitivity that needs no fit, as in the released code."""
    return DCTDP(DCTDPOptions(sensitivity="ones", **options), image_size=size).requires_grad_(False)


def with_learnt_noise(**options):
    """The noise that the released code was given for its arrays, a function of the coefficient's number."""
    defense = made(112, **options)
    number = torch.arange(defense.rho.numel(), dtype=torch.float64).view(defense.rho.shape)
    defense.rho.copy_(0.5 * torch.sin(0.001 * number))
    defense.loc.copy_(0.1 * torch.cos(0.002 * number))
    return defense


def test_the_spectrum_is_that_of_the_released_code():
    operator = made(112).linear_operator(None)
    spectrum = operator(pictures()) + operator.offset
    torch.testing.assert_close(on_grid(spectrum).float(), GOLDEN["z_grid"], rtol=0, atol=COEFFICIENTS)


@pytest.mark.parametrize("budget", [4, 1])
def test_an_even_budget_gives_even_noise(budget):
    scale = made(112, budget=budget).scale
    expected = GOLDEN[f"scales_uniform_budget{budget}"]  # extremes and mean
    torch.testing.assert_close(
        torch.stack([scale.min(), scale.max(), scale.mean()]), expected.sort().values[[0, 2, 1]], rtol=1e-5, atol=0
    )


def test_what_is_sent_is_what_the_released_code_sends(monkeypatch):
    defense = with_learnt_noise(budget=1, noise="official")
    # The released code's softmax of 2.4 million entries in float32 is off by 2.4e-5.
    torch.testing.assert_close(on_grid(defense.scale), GOLDEN["scales_grid"], rtol=5e-5, atol=0)
    exact = torch.exp(torch.logsumexp(defense.rho.double().flatten(), 0) - defense.rho.double()) / defense.rho.numel()
    torch.testing.assert_close(defense.scale.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(on_grid(defense.loc), GOLDEN["locs_grid"], rtol=0, atol=1e-6)
    drawn = torch.zeros(1, *defense.representation_shape)
    drawn[..., GOLDEN["rows"].long()[:, None], GOLDEN["cols"].long()] = GOLDEN["eps_grid"]
    monkeypatch.setattr(defenses.dctdp, "laplace", lambda shape, generator, device: drawn)
    sent = defense.protect(pictures(), generator()).representation
    torch.testing.assert_close(on_grid(sent), GOLDEN["noisy_grid"], rtol=0, atol=COEFFICIENTS)


def test_noise_of_the_released_code_drops_out_of_a_difference():
    faces = pictures()
    for shared, apart in (("official", False), ("paper", True)):
        defense = with_learnt_noise(budget=1, noise=shared)
        assert defense.shares_noise is not apart
        sent = defense.protect(faces, generator()).representation
        clean = defense.linear_operator(None)(faces)
        left = (sent[0] - sent[1]) - (clean[0] - clean[1])
        # Measured on the released code: rounding of float32 about values of some hundred.
        limit = 8 * float(GOLDEN["batch_difference_max"])
        assert (float(left.abs().max()) > limit) is apart
        if apart:  # each face has noise of its own: the variances add up, 2 b^2 each
            assert float((left / defense.scale).var()) == pytest.approx(4, rel=0.02)


def test_noise_has_its_law_and_scale():
    defense = made(24, budget=0.7)
    defense.rho.copy_(torch.randn(defense.rho.shape, generator=generator(1)))
    defense.loc.copy_(torch.randn(defense.loc.shape, generator=generator(2)))
    faces = noise(3, 24)
    operator = defense.linear_operator(None)
    drawn = defense.protect(faces, generator(3)).representation - operator(faces) - operator.offset
    # The textbook's softmax, in double precision.
    epsilon = torch.softmax(defense.rho.double().flatten(), 0).view(defense.rho.shape) * 0.7 * defense.rho.numel()
    unit = drawn * epsilon
    assert scipy.stats.kstest(unit.flatten().numpy(), scipy.stats.laplace.cdf).pvalue > 1e-3
    flat = unit.flatten(1)
    assert float((torch.corrcoef(flat) - torch.eye(3)).abs().max()) < 0.02
    # Of every level of noise: quarters of the coefficients by their scale.
    for quarter in epsilon.flatten().argsort().chunk(4):
        assert float(flat[:, quarter].abs().mean()) == pytest.approx(1, rel=0.02)


def test_the_budget_is_what_was_asked_for(make_training):
    defense = DCTDP(DCTDPOptions(budget=0.5, sensitivity="range", epochs=1, batch_size=8), image_size=16)
    defense.fit(make_training(size=16))
    spent = (defense.sensitivity / defense.scale).detach().double()  # epsilon of each coefficient, Dwork et al. 2006
    assert float(spent.std()) > 0.01  # it was learnt to be spent unevenly
    assert float(spent.mean()) == pytest.approx(defense.epsilon["element"], rel=1e-4) == 0.5
    assert float(spent.sum()) == pytest.approx(defense.epsilon["image"], rel=1e-4)
    assert defense.describe()["epsilon"] == {"element": 0.5, "image": 0.5 * 189 * 16 * 16}


def test_the_range_is_that_of_the_provider_s_faces(make_training):
    training = make_training(size=16)
    defense = DCTDP(DCTDPOptions(sensitivity="range", epochs=1), image_size=16)
    with pytest.raises(ValueError, match="has to be fitted first"):
        defense.protect(noise(1, 16), generator())
    defense.fit(training)
    ((faces, _),) = training.batches(32, generator())
    spectrum = made(16).linear_operator(None)(faces)
    torch.testing.assert_close(defense.sensitivity, spectrum.amax(0) - spectrum.amin(0), rtol=1e-4, atol=1e-3)


def test_the_budget_goes_where_it_is_needed(make_training):
    """A recogniser that looks at nothing but how much lighter a face gets downwards, in which people differ."""
    training, looked_at = make_training(size=16), 8 * 1 + 0 - 1
    ramp = torch.linspace(-0.25, 0.25, 16)[:, None].expand(3, 16, 16)

    def batches(batch_size, generator):
        for faces, labels in training.batches(batch_size, generator):
            yield 0.5 + (labels - 1.5)[:, None, None, None] / 1.5 * ramp + 0.01 * (faces - 0.5), labels

    class Slope(nn.Module):
        def forward(self, representation):
            slope = representation[:, looked_at].mean(dim=(1, 2))
            return torch.stack([slope, torch.full_like(slope, 10)], dim=1)

    def make_recogniser(shape):
        return Slope(), CosFace(2, 4, scale=16.0, margin=0.0)

    torch.manual_seed(0)
    options = DCTDPOptions(budget=0.02, sensitivity="ones", epochs=15, batch_size=16, learning_rate=0.01)
    defense = DCTDP(options, image_size=16)
    defense.fit(replace(training, batches=batches, make_recogniser=make_recogniser))
    by_channel = defense.scale.detach().log().mean(dim=(1, 2))
    assert int(by_channel.argmin()) == looked_at
    assert float(by_channel[looked_at]) < float(by_channel.median()) - 0.2


def test_a_fit_that_was_killed_ends_as_if_it_had_not_been(make_training, tmp_path):
    class Killed(Exception):
        pass

    def fitted(folder, stop_after=None):
        training = make_training(size=16, folder=folder)
        seen = []

        def report(done, total, **fields):
            seen.append(done)
            if len(seen) == stop_after:
                raise Killed

        torch.manual_seed(0)
        defense = DCTDP(DCTDPOptions(epochs=3, batch_size=16, sensitivity="range"), image_size=16)
        try:
            defense.fit(replace(training, report=report))
        except Killed:
            return None
        return defense

    whole = fitted(None)
    fitted(tmp_path, stop_after=3)  # within the second pass
    resumed = fitted(tmp_path)
    for name, learnt in whole.state_dict().items():
        assert torch.equal(learnt, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "greater than 0"),
        ({"budget": -1}, "greater than 0"),
        ({"budget": "inf"}, "finite|less"),
        ({"sensitivity": "twos"}, "ones"),
        ({"noise": "none"}, "official"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DCTDPOptions(**options)
