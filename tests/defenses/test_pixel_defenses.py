"""Pixelation, blur, noise and no defence, against reference implementations."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from pictures import generator, noise
from pydantic import ValidationError
from torchvision.transforms.functional import gaussian_blur

from defenses.blur import Blur, BlurOptions
from defenses.linear import area_matrix
from defenses.noise import Noise, NoiseOptions
from defenses.none import Unprotected
from defenses.pixelate import Pixelate, PixelateOptions


def sent(defense, faces):
    return defense.protect(faces, generator()).representation


def test_none_sends_the_face():
    faces = noise(2, 112)
    assert torch.equal(sent(Unprotected(), faces), faces)


@pytest.mark.parametrize("block", [1, 7, 8, 16, 112])
def test_pixelation_is_average_pooling(block):
    faces = noise(2, 112)
    made = sent(Pixelate(PixelateOptions(block=block)), faces)
    torch.testing.assert_close(made, F.avg_pool2d(faces, block), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [64, 96, 112])
def test_pixelation_has_the_same_grid_at_every_size(size):
    defense = Pixelate(image_size=size)
    assert defense.representation_shape == (3, 14, 14)
    made = sent(defense, noise(2, size))
    torch.testing.assert_close(made.mean((2, 3)), noise(2, size).mean((2, 3)))  # the mean colour survives
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_area_matrix_by_hand():
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(area_matrix(2, 3), expected)


def test_pixelation_never_makes_more_cells_than_pixels():
    assert Pixelate(PixelateOptions(block=1), image_size=32).cells == 32


@pytest.mark.parametrize(("sigma", "kernel"), [(4.0, 25), (1.5, 11), (2.0, 5), (10.0, 61)])
def test_blur_equals_torchvision(sigma, kernel):
    faces = noise(2, 112)
    made = sent(Blur(BlurOptions(sigma=sigma, kernel=kernel)), faces)
    expected = gaussian_blur(faces, [kernel, kernel], [sigma, sigma])
    # torchvision makes its kernel in float32.
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def test_blur_scales_with_the_face():
    faces = noise(2, 56)
    made = sent(Blur(BlurOptions(sigma=4, kernel=25), image_size=56), faces)
    torch.testing.assert_close(made, gaussian_blur(faces, [13, 13], [2.0, 2.0]), rtol=0, atol=1e-6)


def test_default_blur_kernel_reaches_three_sigma():
    faces = noise(2, 112)
    explicit = sent(Blur(BlurOptions(sigma=4, kernel=25)), faces)
    assert torch.equal(sent(Blur(BlurOptions(sigma=4)), faces), explicit)


def test_blur_wider_than_the_face_stays_an_average():
    made = sent(Blur(BlurOptions(sigma=112), image_size=16), noise(2, 16))
    assert float(made.std((2, 3)).max()) < 1e-2
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_noise_has_its_distribution(distribution):
    defense = Noise(NoiseOptions(distribution=distribution, scale=0.3))
    faces = torch.full((4, 3, 112, 112), 0.5)
    drawn = (sent(defense, faces) - faces).flatten().double()
    law = scipy.stats.norm(scale=0.3) if distribution == "gaussian" else scipy.stats.laplace(scale=0.3 / math.sqrt(2))
    assert scipy.stats.kstest(drawn.numpy(), law.cdf).pvalue > 1e-3
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.02)
    assert float(drawn.max()) > 0.5  # not clipped to the range of faces


def test_noise_is_fresh_and_independent():
    defense = Noise()
    draws, faces = generator(), torch.zeros(2, 3, 112, 112)
    first, second = (defense.protect(faces, draws).representation for _ in range(2))
    correlation = torch.corrcoef(torch.stack([first[0].flatten(), first[1].flatten(), second[0].flatten()]))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.03


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_huge_noise_stays_finite_and_no_noise_is_the_face(distribution):
    faces = noise(2, 112)
    huge = sent(Noise(NoiseOptions(distribution=distribution, scale=1e6)), faces)
    assert torch.isfinite(huge).all()
    assert float(huge.std()) > 5e5
    none = sent(Noise(NoiseOptions(distribution=distribution, scale=0)), faces)
    assert torch.equal(none, faces)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (PixelateOptions, {"block": 0}, "greater than or equal to 1"),
        (PixelateOptions, {"block": "nan"}, "finite|greater"),
        (PixelateOptions, {"block": "x"}, "valid number"),
        (BlurOptions, {"sigma": 0}, "greater than 0"),
        (BlurOptions, {"kernel": 4}, "odd"),
        (BlurOptions, {"kernel": 1}, "greater than or equal to 3"),
        (NoiseOptions, {"scale": -1}, "greater than or equal to 0"),
        (NoiseOptions, {"scale": "inf"}, "finite|less"),
        (NoiseOptions, {"distribution": "cauchy"}, "gaussian"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValidationError, match=message):
        model(**options)


def test_options_parse_from_command_line_strings():
    assert PixelateOptions(block="16").block == 16
    assert BlurOptions(sigma="2.5", kernel="9").kernel == 9
    assert NoiseOptions(scale="0.25", distribution="laplace").scale == 0.25
