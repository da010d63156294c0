"""BioHash: bits worked out by hand, what they keep of an angle, and what a stolen key makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pictures import generator
from pydantic import ValidationError
from torch.nn import functional

from defenses.biohash import BioHash, BioHashOptions


@pytest.fixture
def make(ready):
    return lambda **options: ready(BioHash(BioHashOptions(**options), image_size=24))


@pytest.mark.parametrize("threshold", ["mean", "zero"])
@pytest.mark.parametrize("bits", [8, 24, 60])
def test_bits_are_those_of_projections_on_orthonormal_directions(make, units, bits, threshold):
    defense, embeddings = make(bits=bits, threshold=threshold), units(5)
    keys = defense.draw_keys(5, generator())
    templates = defense.enrol(embeddings, keys, generator())
    for template, embedding, key in zip(templates, embeddings.numpy(), keys, strict=True):
        draws = torch.Generator().manual_seed(int(key))
        blocks = []
        for start in range(0, bits, 24):
            uniform = torch.rand(24, min(24, bits - start), generator=draws).numpy()
            assert uniform.min() >= 0
            block, _ = np.linalg.qr(uniform)
            np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
            blocks.append(block)
        projections = embedding @ np.concatenate(blocks, axis=1)
        limit = projections.mean() if threshold == "mean" else 0.0
        expected = [1 if value > limit else -1 for value in projections]
        np.testing.assert_allclose(template.numpy(), np.array(expected) / math.sqrt(bits), rtol=1e-6)


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.7, 1.0])
def test_equal_bits_tell_the_angle_under_one_key(make, units, cosine):
    defense, first, other = make(bits=512, threshold="zero"), units(400), units(400, seed=1)
    other = functional.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
    second = cosine * first + math.sqrt(1 - cosine**2) * other
    keys = defense.draw_keys(400, generator(1))
    templates = [defense.enrol(side, keys, generator()) for side in (first, second)]
    # Charikar, STOC 2002: a random hyperplane parts two vectors with probability angle / pi.
    expected = 1 - math.acos(cosine) / math.pi
    assert float(defense.compare(*templates).mean()) == pytest.approx(expected, abs=0.01)
    torch.testing.assert_close(templates[0].norm(dim=1), torch.ones(400))


def test_another_key_leaves_the_first_bit_in_common_and_nothing_else(make, units):
    defense, embeddings = make(), units(600)
    templates = [defense.enrol(embeddings, defense.draw_keys(600, generator(seed)), generator()) for seed in (1, 2)]
    equal = (templates[0] == templates[1]).float().mean(dim=0)
    # Uniform numbers are positive: the first column of Q is nearly a constant.
    assert float(equal[0]) > 0.65
    assert float(equal[1:].mean()) == pytest.approx(0.5, abs=0.02)


def test_it_is_as_long_as_the_embedding_and_a_bit_is_a_bit(make):
    assert (make().template_size, make().bytes_per_face()) == (24, 3)
    assert make(bits=60).representation_shape == (60, 1, 1)
    assert make(bits=60).bytes_per_face() == 8


@pytest.mark.parametrize("threshold", ["mean", "zero"])
def test_misfit_is_zero_where_the_template_is_made_and_leads_there(make, units, descended, threshold):
    defense, embeddings = make(bits=192, threshold=threshold), units(12)
    keys = defense.draw_keys(12, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit = defense.misfit(templates, keys)
    assert float(misfit(embeddings[:, None]).max()) < 1e-3
    assert float(misfit(units(12, seed=1)[:, None]).min()) > 0.1
    found = descended(misfit, units(12, seed=2))
    assert float(functional.cosine_similarity(found, embeddings).mean()) > 0.9
    assert float(defense.compare(templates, defense.enrol(found, keys, generator())).mean()) > 0.99


def test_a_stolen_key_gives_the_direction_of_the_embedding(make, units):
    defense, embeddings = make(bits=512), units(100)
    keys = defense.draw_keys(100, generator(1))
    templates = defense.enrol(embeddings, keys, generator())

    def closeness(stolen):
        return float(functional.cosine_similarity(defense.estimate(templates, stolen), embeddings).mean())

    assert closeness(keys) > 0.9
    assert abs(closeness(defense.draw_keys(100, generator(2)))) < 0.2


def test_clients_keep_their_keys_in_any_order(make, units):
    defense, embeddings = make(), units(6)
    keys = defense.draw_keys(2, generator())[torch.tensor([0, 1, 0, 1, 1, 0])]
    together = defense.enrol(embeddings, keys, generator())
    alone = [defense.enrol(embeddings[i : i + 1], keys[i : i + 1], generator()) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "keys",
    [
        None,
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.int64),
    ],
)
def test_keys_of_another_kind_are_refused(make, units, keys):
    with pytest.raises(ValueError, match="biohash needs keys int64"):
        make().enrol(units(2), keys, generator())


def test_what_is_no_embedding_or_template_of_this_system_is_refused(make, units):
    defense = make()
    keys = defense.draw_keys(2, generator())
    embeddings = units(2)
    with pytest.raises(ValueError, match=r"embeddings \(N, 24\)"):
        defense.enrol(units(2, 25), keys, generator())
    templates = defense.enrol(embeddings, keys, generator())
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates, templates[:, 1:])
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates[:, 1:], templates[:, 1:])
    embeddings[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 2 embeddings are not finite"):
        defense.enrol(embeddings, keys, generator())
    with pytest.raises(ValidationError, match="bits"):
        BioHashOptions(bits=7)


def test_a_recogniser_is_needed():
    with pytest.raises(ValueError, match="attach"):
        BioHash(image_size=24).protect(torch.zeros(1, 3, 24, 24), generator())
