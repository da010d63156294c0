"""The Laplacian pyramid, against scipy's filters and by putting a face together again."""

from __future__ import annotations

import pytest
import torch
from pictures import generator
from scipy.ndimage import convolve1d

from defenses.pyramid import KERNEL, Pyramid, PyramidOptions, expand_matrix, reduce_matrix


@pytest.mark.parametrize("size", [8, 15, 28])
def test_reducing_and_expanding_are_filters(size):
    signal = torch.rand(size, generator=generator(0), dtype=torch.float64)
    filtered = torch.from_numpy(convolve1d(signal.numpy(), KERNEL, mode="nearest"))
    torch.testing.assert_close(reduce_matrix(size) @ signal, filtered[::2])
    spread = torch.zeros(size, dtype=torch.float64)
    spread[::2] = signal[: (size + 1) // 2]
    interpolated = torch.from_numpy(convolve1d(2 * spread.numpy(), KERNEL, mode="constant"))
    expanded = expand_matrix(size) @ signal[: (size + 1) // 2]
    torch.testing.assert_close(expanded[2:-3], interpolated[2:-3])
    torch.testing.assert_close(expand_matrix(size).sum(dim=1), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [56, 30])
def test_the_levels_and_the_coarsest_one_give_the_face(size):
    face = torch.rand(1, 3, size, size, generator=generator(0), dtype=torch.float64)
    defense = Pyramid(PyramidOptions(levels=3), image_size=size)
    levels = list(defense.unpack(defense.protect(face, torch.Generator()).representation).values())
    image = face  # the level that stays at home, made the long way
    for level in levels:
        image = reduce_matrix(level.shape[2]) @ image @ reduce_matrix(level.shape[2]).T
    for level in reversed(levels):
        expand = expand_matrix(level.shape[2])
        image = level + expand @ image @ expand.T
    torch.testing.assert_close(image, face)


def test_brightness_stays_at_home():
    sent = Pyramid(image_size=32).protect(torch.full((1, 3, 32, 32), 0.7), torch.Generator()).representation
    assert float(sent.abs().max()) < 1e-6


def test_the_smaller_levels_are_paid_for_once():
    defense = Pyramid(PyramidOptions(levels=3), image_size=112)
    assert defense.bytes_per_face() == 4 * 3 * (112**2 + 56**2 + 28**2)


def test_more_levels_than_pixels_are_refused():
    with pytest.raises(ValueError, match="levels"):
        Pyramid(PyramidOptions(levels=8), image_size=32)
