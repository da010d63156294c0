"""IoM hashing: codes against loops, how often they match by chance, and what a stolen key makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pictures import generator
from torch.nn import functional

from defenses.iom import IoM, IoMOptions


@pytest.fixture
def make(ready):
    return lambda **options: ready(IoM(IoMOptions(**options), image_size=24))


def test_grp_codes_are_indices_of_the_largest_projection(make, units):
    defense, embeddings = make(codes=20, choices=5), units(4)
    keys = defense.draw_keys(4, generator())
    templates = defense.enrol(embeddings, keys, generator())
    for template, embedding, key in zip(templates, embeddings.numpy(), keys, strict=True):
        directions = torch.randn(24, 100, generator=torch.Generator().manual_seed(int(key))).numpy()
        expected = [
            np.argmax([embedding @ directions[:, 5 * code + choice] for choice in range(5)]) for code in range(20)
        ]
        assert template.tolist() == expected


@pytest.mark.parametrize("products", [1, 2, 3])
def test_urp_codes_are_indices_of_the_largest_product(make, units, products):
    defense, embeddings = make(hashing="urp", codes=20, choices=7, products=products), units(4)
    keys = defense.draw_keys(4, generator())
    templates = defense.enrol(embeddings, keys, generator())
    for template, embedding, key in zip(templates, embeddings.numpy(), keys, strict=True):
        places = defense.expand(key).long().numpy()
        assert places.shape == (20, products, 7)
        assert all(len(set(order)) == 7 for code in places for order in code)  # the start of a permutation
        expected = [
            np.argmax([math.prod(embedding[order[place]] for order in code) for place in range(7)]) for code in places
        ]
        assert template.tolist() == expected
    assert (defense.enrol(-embeddings, keys, generator()) == templates).all() == (products == 2)


def test_defaults_are_the_published_ones(make):
    grp, urp = make(), make(hashing="urp")
    assert (grp.template_size, grp.choices, grp.bytes_per_face()) == (300, 16, 150)
    assert (urp.template_size, urp.choices) == (600, 12)  # half of this small embedding
    assert IoM(IoMOptions(hashing="urp")).choices == 128
    assert make(codes=100, choices=5).bytes_per_face() == math.ceil(100 * math.log2(5) / 8)
    with pytest.raises(ValueError, match="choices=25 products of an embedding of 24 values") as caught:
        make(hashing="urp", choices=25).bytes_per_face()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"hashing": "urp", "choices": 8, "products": 3}])
def test_another_key_matches_by_chance(make, units, options):
    defense, embeddings = make(**options), units(200)
    templates = [defense.enrol(embeddings, defense.draw_keys(200, generator(seed)), generator()) for seed in (1, 2)]
    assert float(defense.compare(*templates).mean()) == pytest.approx(1 / defense.choices, abs=0.01)


def test_grp_codes_match_as_often_as_largest_normals_do(make, units):
    """Of two embeddings at a cosine, each code compares 16 pairs of normals that are so correlated."""
    defense, first, other = make(), units(200), units(200, seed=1)
    other = functional.normalize(other - (other * first).sum(1, keepdim=True) * first, dim=1)
    keys = defense.draw_keys(200, generator(1))
    draws = np.random.default_rng(0)
    for cosine in (0.0, 0.5, 0.9, 1.0):
        second = cosine * first + math.sqrt(1 - cosine**2) * other
        share = float(defense.compare(*(defense.enrol(side, keys, generator()) for side in (first, second))).mean())
        one, two = draws.standard_normal((2, 50_000, 16))
        two = cosine * one + math.sqrt(1 - cosine**2) * two
        assert share == pytest.approx(float((one.argmax(1) == two.argmax(1)).mean()), abs=0.01)


def test_misfit_is_zero_where_the_template_is_made_and_leads_there(make, units, descended):
    defense, embeddings = make(), units(12)
    keys = defense.draw_keys(12, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit = defense.misfit(templates, keys)
    assert float(misfit(embeddings[:, None]).max()) < 1e-3
    assert float(misfit(units(12, seed=1)[:, None]).min()) > 0.5
    found = descended(misfit, units(12, seed=2), 100)
    assert float(functional.cosine_similarity(found, embeddings).mean()) > 0.95
    assert float(functional.cosine_similarity(defense.estimate(templates, keys), embeddings).mean()) > 0.95
    wrong = defense.estimate(templates, defense.draw_keys(12, generator(2)))
    assert abs(float(functional.cosine_similarity(wrong, embeddings).mean())) < 0.2


def test_two_factors_are_inverted_up_to_the_sign(make, units, descended):
    defense, embeddings = make(hashing="urp", codes=400), units(12)
    keys = defense.draw_keys(12, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit, start = defense.misfit(templates, keys), defense.estimate(templates, keys)
    assert float(misfit(embeddings[:, None]).max()) < 2e-3
    assert float(misfit(units(12, seed=1)[:, None]).min()) > 0.5
    near = functional.cosine_similarity(start, embeddings).abs().mean()
    assert near > 0.6
    assert functional.cosine_similarity(descended(misfit, start), embeddings).abs().mean() > near + 0.05


def test_other_numbers_of_factors_have_no_closed_form(make, units, descended):
    defense, embeddings = make(hashing="urp", codes=400, products=1), units(12)
    keys = defense.draw_keys(12, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    assert defense.estimate(templates, keys) is None
    start = units(12, seed=2)
    found = descended(defense.misfit(templates, keys), start)
    assert (
        functional.cosine_similarity(found, embeddings).mean()
        > functional.cosine_similarity(start, embeddings).mean() + 0.3
    )


@pytest.mark.parametrize("keys", [None, torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 1)])
def test_keys_of_another_kind_are_refused(make, units, keys):
    with pytest.raises(ValueError, match="iom needs keys int64"):
        make().enrol(units(2), keys, generator())


def test_what_is_no_embedding_or_template_of_this_system_is_refused(make, units):
    defense = make()
    keys = defense.draw_keys(2, generator())
    templates = defense.enrol(units(2), keys, generator())
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates, templates[:, 1:])
    with pytest.raises(ValueError, match="2 of 2 embeddings are not finite"):
        defense.enrol(units(2) * torch.nan, keys, generator())
