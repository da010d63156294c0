"""InstaHide: the mixture by hand, the laws of what is drawn, and the plain test path."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from pictures import generator, noise, smooth
from pydantic import ValidationError

from bench.errors import DefenseError
from defenses.instahide import InstaHide, InstaHideOptions

SIZE = 16


@pytest.fixture
def fitted(make_training):
    def fit(**options):
        defense = InstaHide(InstaHideOptions(pool=20, **options), image_size=SIZE)
        defense.fit(make_training(size=SIZE))
        return defense

    return fit


def scaled(defense, pictures):
    """By the channel, in [0, 1] before."""
    return (pictures - defense.mean) / defense.deviation


@pytest.mark.parametrize("mixed", [2, 4, 6])
def test_magnitudes_are_those_of_a_mixture_with_the_pictures_of_the_state(fitted, mixed):
    defense = fitted(mixed=mixed)
    faces = noise(4, SIZE)
    sent = defense.protect(faces, generator())
    public = scaled(defense, defense.pool.double() / 255)
    for face, state, z in zip(scaled(defense, faces), sent.state, sent.representation, strict=True):
        pictures = torch.stack((face, *public[state])).flatten(1)
        # The signs are known to within a solution: of 2^768 of them only the right ones are consistent.
        weights = sent_weights(pictures, z.flatten())
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        assert 0 <= float(weights.min()) <= float(weights.max()) <= 0.65 + 1e-6
        torch.testing.assert_close((weights @ pictures).abs(), z.flatten().abs(), rtol=0, atol=1e-5)


def sent_weights(pictures, z):
    """The coefficients of a mixture of which the magnitudes are known: alternately signs and least squares."""
    inverse = torch.linalg.pinv(pictures.T)
    for seed in range(100):
        weights = torch.rand(len(pictures), generator=generator(seed), dtype=torch.float64)
        for _ in range(40):
            weights = inverse @ (z.abs() * (weights @ pictures).sign())
        if float(((weights @ pictures).abs() - z.abs()).abs().max()) < 1e-6:
            break
    return weights * weights.sum().sign()


def test_signs_are_fair_independent_and_fresh(fitted):
    defense = fitted()
    faces, state = noise(1, SIZE).expand(400, -1, -1, -1), torch.zeros(400, 3, dtype=torch.int64)
    signs = defense.protect(faces, generator(), state=state).representation.sign().flatten(1)
    heads = (signs > 0).sum(dim=0)  # over 400 draws of each element
    assert scipy.stats.kstest(((heads - 200) / 10).double().numpy(), "norm").statistic < 0.08
    agree = (signs[:-1] == signs[1:]).double().mean(dim=1)  # from face to face
    assert float((agree - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(3 * SIZE**2)


@pytest.mark.parametrize("mixed", [2, 4])
def test_coefficients_have_the_law_of_the_paper(fitted, mixed):
    defense = fitted(mixed=mixed)
    weights = defense._coefficients(4000, generator(1)).double()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    assert float(weights.max()) <= 0.65
    # By rejection of whole sets of numbers drawn elsewhere; no place is preferred.
    normal = scipy.stats.halfnorm.rvs(size=(40_000, mixed), random_state=0)
    expected = normal / normal.sum(axis=1, keepdims=True)
    expected = expected[expected.max(axis=1) <= 0.65]
    for column in weights.T:
        assert scipy.stats.ks_2samp(column.numpy(), expected[:, 0]).pvalue > 1e-3


def test_pictures_are_drawn_uniformly_from_the_pool(fitted):
    drawn = fitted().draw(4000, generator())
    counts = torch.bincount(drawn.flatten(), minlength=20)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert fitted().entropy_bits == pytest.approx(3 * math.log2(20))


def test_the_pool_is_the_providers_and_channels_are_normalised(fitted, make_training):
    defense = fitted()
    faces = torch.cat([faces for faces, _ in make_training(size=SIZE).batches(32, generator())])
    own = (255 * faces).round()
    assert all(any(torch.equal(picture.float(), face) for face in own) for picture in defense.pool)
    assert len(defense.pool.flatten(1).unique(dim=0)) == 20
    channels = scaled(defense, faces).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(3), rtol=0, atol=1e-3)


def test_the_released_test_path_sends_the_plain_face_and_training_does_not(fitted):
    defense = fitted(inference="plain")
    faces = noise(4, SIZE)
    query = defense.protect(faces, generator())
    torch.testing.assert_close(query.representation, scaled(defense, faces))
    assert query.state.unique().tolist() == [-1]
    in_training = defense.protect(faces, generator(), labels=torch.arange(4))
    encoded = fitted().protect(faces, generator(), labels=torch.arange(4))
    assert torch.equal(in_training.representation, encoded.representation)
    assert defense.entropy_bits == 0
    operator = defense.linear_operator(query.state[0])
    torch.testing.assert_close(operator(faces) + operator.offset, query.representation)


def test_without_public_pictures_it_says_so():
    with pytest.raises(DefenseError, match="public pictures and has none"):
        InstaHide(image_size=SIZE).protect(noise(1, SIZE), generator())


def test_fewer_faces_than_the_pool(make_training):
    defense = InstaHide(InstaHideOptions(pool=1000), image_size=SIZE)
    training = make_training(size=SIZE)
    reports = []
    defense.fit(replace(training, report=lambda done, total: reports.append((done, total))))
    assert len(defense.pool) == training.images == 32
    assert reports[-1] == (32, 32)


@pytest.mark.parametrize("state", [None, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[0, 1, 20]] * 2)])
def test_states_that_are_none_are_refused(fitted, state):
    defense = fitted()
    with pytest.raises(ValueError, match="pictures"):
        defense.transform(smooth(2, SIZE).float() / 255, state, generator())


@pytest.mark.parametrize("options", [{"mixed": 1}, {"mixed": 7}, {"largest": 0.5}, {"pool": 0}, {"inference": "x"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=r"greater than|less than|encoded"):
        InstaHideOptions(**options)
