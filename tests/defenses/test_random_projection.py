"""Templates under a key: what they keep of an angle, and what nobody without the key reads in them."""

from __future__ import annotations

import math

import pytest
import torch
from pictures import generator
from torch.nn import functional

from defenses.random_projection import RandomProjection, RandomProjectionOptions


@pytest.fixture
def defense(ready):
    return ready(RandomProjection(RandomProjectionOptions(bits=512), image_size=24))


def _pairs(cosine, count=400, size=24):
    """Unit vectors (count, size) and others at a given cosine to them."""
    first, other = functional.normalize(torch.randn(2, count, size, generator=generator()), dim=2)
    other = functional.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
    return first, cosine * first + math.sqrt(1 - cosine**2) * other


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.7, 1.0])
def test_equal_bits_tell_the_angle_under_one_key(defense, cosine):
    first, second = _pairs(cosine)
    keys = defense.draw_keys(len(first), generator(1))
    templates = [defense.enrol(side, keys, generator()) for side in (first, second)]
    # Charikar, STOC 2002: a random hyperplane parts two vectors with probability angle / pi.
    expected = 1 - math.acos(cosine) / math.pi
    assert float(defense.compare(*templates).mean()) == pytest.approx(expected, abs=0.01)
    torch.testing.assert_close(templates[0].norm(dim=1), torch.ones(400))


def test_another_key_leaves_nothing_in_common(defense):
    first, _ = _pairs(1.0)
    templates = [defense.enrol(first, defense.draw_keys(len(first), generator(seed)), generator()) for seed in (1, 2)]
    assert float(defense.compare(*templates).mean()) == pytest.approx(0.5, abs=0.01)


def test_a_stolen_key_gives_the_direction_of_the_embedding(defense):
    first, _ = _pairs(1.0)
    keys = defense.draw_keys(len(first), generator(1))
    templates = defense.enrol(first, keys, generator())

    def closeness(stolen):
        return float(functional.cosine_similarity(defense.estimate(templates, stolen), first).mean())

    assert closeness(keys) > 0.9
    assert abs(closeness(defense.draw_keys(len(first), generator(2)))) < 0.05


def test_templates_without_their_keys_are_refused(defense):
    with pytest.raises(ValueError, match="needs keys"):
        defense.enrol(torch.ones(2, 24), None, generator())


def test_a_recogniser_is_needed():
    with pytest.raises(ValueError, match="attach"):
        RandomProjection(image_size=24).protect(torch.zeros(1, 3, 24, 24), generator())
