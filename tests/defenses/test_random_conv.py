"""Random convolutions against scipy, their statistics, and what the key decides."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from pictures import generator, noise, smooth
from pydantic import ValidationError

from defenses.random_conv import RandomConv, RandomConvOptions

SIZE = 16


def plain(layers, maps):
    """The layers' convolutions by scipy; ``layers`` are (kernel, mean, deviation), ``maps`` (N, 3, H, W)."""
    for number, (kernel, mean, deviation) in enumerate(layers):
        maps = np.maximum(maps, 0) if number else maps
        made = [
            sum(scipy.ndimage.correlate(plane, taps, mode="constant") for plane, taps in zip(face, of_map, strict=True))
            for face in maps
            for of_map in kernel
        ]
        maps = np.reshape(made, (len(maps), len(kernel), SIZE, SIZE))
        maps = (maps - mean[:, None, None]) / deviation[:, None, None]
    return maps


@pytest.mark.parametrize(("layers", "kernel", "channels"), [(1, 3, 3), (1, 5, 2), (3, 3, 4), (2, 1, 3)])
def test_it_is_the_convolutions_of_the_key(ready, layers, kernel, channels):
    options = RandomConvOptions(layers=layers, kernel=kernel, channels=channels)
    defense = ready(RandomConv(options, image_size=SIZE))
    faces = noise(3, SIZE)
    stack = [
        tuple(part.double().numpy() for part in (defense.secret[f"kernel{number}"], mean, deviation))
        for number, (mean, deviation) in enumerate(zip(defense.means, defense.deviations, strict=True))
    ]
    made = defense.protect(faces, generator()).representation
    np.testing.assert_allclose(made, plain(stack, faces.numpy()), atol=1e-9)


def test_kernels_are_normal_of_unit_gain_and_the_keys_own():
    first, again, other = (
        RandomConv(RandomConvOptions(channels=64, kernel=5, key_seed=seed), image_size=SIZE).secret["kernel0"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert scipy.stats.kstest((first * 75**0.5).flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1])) < 0.05


@pytest.mark.parametrize("layers", [1, 3])
def test_every_map_of_the_providers_faces_has_mean_0_and_deviation_1(make_training, layers):
    training = make_training(size=SIZE)
    defense = RandomConv(RandomConvOptions(layers=layers), image_size=SIZE)
    defense.fit(training)
    faces = torch.cat([faces for faces, _ in training.batches(8, generator())])
    sent = defense.protect(faces, generator()).representation.transpose(0, 1).flatten(1)
    torch.testing.assert_close(sent.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(sent.std(dim=1), torch.ones(3), rtol=0, atol=1e-3)


def test_a_guess_learns_its_statistics_from_the_first_faces_it_is_tried_on(ready):
    defense = ready(RandomConv(RandomConvOptions(layers=2), image_size=SIZE))
    guess = defense.guess(generator(1))
    faces = smooth(40, SIZE).float() / 255
    sent = guess.protect(faces, generator()).representation.transpose(0, 1).flatten(1)
    torch.testing.assert_close(sent.std(dim=1), torch.ones(3), rtol=0, atol=1e-2)
    held = guess.means.clone()
    guess.protect(1 - faces, generator())
    assert torch.equal(guess.means, held)
    assert not torch.equal(guess.secret["kernel1"], defense.secret["kernel1"])


@pytest.mark.parametrize("options", [{"kernel": 4}, {"kernel": 0}, {"layers": 0}, {"channels": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=r"odd|greater than"):
        RandomConvOptions(**options)
