"""Levels, their number and range; the error that dither makes independent of the value."""

from __future__ import annotations

import math

import pytest
import torch
from pictures import generator, noise
from scipy import stats

from bench.plugins import make_defense
from defenses.quantise import Quantise, QuantiseOptions

SIZE = 24


def quantise(takes=None, **options):
    return Quantise(QuantiseOptions(**options), image_size=SIZE, takes=takes)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_face_has_evenly_spaced_levels_from_black_to_white(bits):
    faces = noise(4, SIZE, dtype=torch.float32)
    sent = quantise(bits=bits).protect(faces, generator()).representation
    numbers = sent.double() * (2**bits - 1)
    torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-4)
    assert len(numbers.round().unique()) == 2**bits
    assert float((sent - faces).abs().max()) <= 0.5 / (2**bits - 1) + 1e-6


def test_eight_bits_are_the_pixels_of_a_file():
    pixels = torch.randint(256, (2, 3, SIZE, SIZE), generator=generator(), dtype=torch.uint8)
    sent = quantise(bits=8).protect(pixels / 255, generator()).representation
    assert torch.equal((sent * 255).round().to(torch.uint8), pixels)


@pytest.mark.parametrize(("bits", "expected"), [(8, 3 * SIZE**2), (1, 3 * SIZE**2 / 8), (3, 3 * SIZE**2 * 3 / 8)])
def test_bytes(bits, expected):
    assert quantise(bits=bits).bytes_per_face() == quantise(bits=bits).bytes_per_face(torch.float16) == expected


def error_at(value, dither, bits=3, count=24):
    """Errors of one value, of 3 x 24 x 24 x ``count`` draws, in steps."""
    faces = torch.full((count, 3, SIZE, SIZE), value, dtype=torch.float64)
    sent = quantise(bits=bits, dither=dither).protect(faces, generator(int(1e4 * value))).representation
    return ((sent - faces) * (2**bits - 1)).flatten().numpy()


@pytest.mark.parametrize("value", [0.31, 0.5, 0.62, 0.73])
def test_subtractive_dither_makes_the_error_uniform_whatever_the_value(value):
    """Schuchman, 1964: a dither that is uniform over one step."""
    error = error_at(value, "subtractive")
    assert stats.kstest(error, stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    assert abs(error).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("value", [0.31, 0.5, 0.62, 0.73])
def test_dither_that_stays_frees_the_mean_of_the_value_and_not_the_variance(value):
    """Lipshitz, Wannamaker and Vanderkooy, 1992: rounding up has the probability of the place between two levels."""
    error, place = error_at(value, "uniform"), (value * 7) % 1
    assert abs(error.mean()) < 4 * math.sqrt(place * (1 - place) / error.size) + 1e-9
    up = (error > 0).sum() if 0 < place < 1 else 0
    assert stats.binomtest(int(up), error.size, place).pvalue > 1e-3
    assert error.var() == pytest.approx(place * (1 - place), rel=0.03, abs=1e-6)


def test_without_dither_the_error_follows_the_value():
    assert len({round(float(value), 9) for value in error_at(0.31, "none")}) == 1
    assert error_at(0.31, "none")[0] == pytest.approx(2 - 7 * 0.31)


def test_subtractive_dither_is_uncorrelated_with_what_varies():
    faces = 0.2 + 0.6 * noise(16, SIZE)
    for dither, independent in (("subtractive", True), ("none", False)):
        sent = quantise(bits=1, dither=dither).protect(faces, generator()).representation
        correlation = stats.pearsonr((sent - faces).flatten().numpy(), faces.flatten().numpy())
        assert (correlation.pvalue > 1e-3) == independent


@pytest.mark.parametrize(
    ("law", "bits", "half"),
    # Max, Quantizing for Minimum Distortion, 1960, table II: steps .9957 and .5860 of a unit Gaussian, 1.596 for two
    # levels, so that the outermost levels lie at 1.5 and 3.5 of these, and at .798.
    [("gaussian", 1, 0.7979), ("gaussian", 2, 1.4936), ("gaussian", 3, 2.0510)],
)
def test_learnt_ranges_are_those_of_least_error(make_training, law, bits, half):
    fitted = quantise(takes=(3, SIZE, SIZE), bits=bits)
    assert fitted.trainable
    training = make_training(size=SIZE)
    draws = generator(4)

    def batches(batch_size, _):
        for _ in range(8):
            yield 5 + 2 * torch.randn(batch_size, 3, SIZE, SIZE, generator=draws), torch.zeros(batch_size)

    object.__setattr__(training, "batches", batches)
    object.__setattr__(training, "images", 512)
    fitted.fit(training)
    top = fitted.low + (2**bits - 1) * fitted.step
    torch.testing.assert_close((top + fitted.low) / 2, torch.full((3, 1, 1), 5.0), rtol=0, atol=0.1)
    # The grid of ranges that are tried has steps of an eighth.
    torch.testing.assert_close((top - fitted.low) / 4, torch.full((3, 1, 1), half), rtol=0.09, atol=0)


def test_values_beyond_the_range_are_its_ends_and_missing_maps_stay_missing():
    values = torch.stack([torch.full((SIZE, SIZE), v) for v in (-9.0, 0.0, 9.0)])[None]
    sent = quantise(takes=(3, SIZE, SIZE), low=-2, high=2, bits=2).transform(values, None, generator())
    assert [float(channel.unique()) for channel in sent[0]] == [-2, 0, 2]


def test_unfitted_or_half_a_range_is_refused():
    with pytest.raises(ValueError, match="not fitted"):
        quantise(takes=(1, 8, 8)).transform(torch.ones(1, 1, 8, 8), None, generator())
    with pytest.raises(ValueError, match="together"):
        QuantiseOptions(low=0)
    with pytest.raises(ValueError, match="must be below"):
        QuantiseOptions(low=1, high=1)
    for bits in (0, 17):
        with pytest.raises(ValueError, match="bits"):
            QuantiseOptions(bits=bits)


def test_gradients_pass_straight_through():
    defense = make_defense("blur+quantise", {"low": 0, "high": 1, "bits": 2}, "cpu", SIZE)
    plain = make_defense("blur", {}, "cpu", SIZE)
    grads = []
    for mechanism in (defense, plain):
        faces = noise(2, SIZE).requires_grad_()
        mechanism.protect(faces, generator()).representation.pow(1).sum().backward()
        grads.append(faces.grad)
    torch.testing.assert_close(*grads)
