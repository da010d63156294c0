"""PolyProtect: templates against a loop, keys that are refused, and what the stored key makes of templates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import generator
from pydantic import ValidationError
from torch.nn import functional

from defenses.polyprotect import PolyProtect, PolyProtectOptions


@pytest.fixture
def make(ready):
    return lambda **options: ready(PolyProtect(PolyProtectOptions(**options), image_size=24))


def written_out(embedding, key, m, overlap):
    """Window by window, until the last value is in one."""
    coefficients, exponents = key[:m], key[m:]
    template, start = [], 0
    while True:
        window = [embedding[start + i] if start + i < len(embedding) else 0.0 for i in range(m)]
        template.append(sum(c * v**e for c, v, e in zip(coefficients, window, exponents, strict=True)))
        if start + m >= len(embedding):
            return np.array(template)
        start += m - overlap


@pytest.mark.parametrize(("m", "overlap"), [(5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (7, 2), (2, 0)])
def test_it_is_the_polynomial_of_every_window(make, units, m, overlap):
    defense, embeddings = make(m=m, overlap=overlap), functional.normalize(units(6).double(), dim=1)
    keys = defense.draw_keys(6, generator())
    templates = defense.enrol(embeddings, keys, generator())
    for template, embedding, key in zip(templates, embeddings.tolist(), keys.tolist(), strict=True):
        np.testing.assert_allclose(template.numpy(), written_out(embedding, key, m, overlap), rtol=1e-9)


def test_a_case_by_hand(make):
    defense = make(m=2, overlap=0)
    defense.attach(torch.nn.Identity(), 3)
    # 3 x 0.6^2 - 2 x 0.8^1 and, beyond the end, 3 x 0^2 - 2 x 0^1.
    template = defense.enrol(torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[3, -2, 2, 1]]), generator())
    torch.testing.assert_close(template, torch.tensor([[3 * 0.36 - 1.6, 0.0]]))


def test_lengths_are_the_published_ones():
    sizes = [PolyProtect(PolyProtectOptions(overlap=overlap)).template_size for overlap in range(5)]
    assert sizes == [103, 128, 170, 255, 508]
    assert PolyProtect(PolyProtectOptions(overlap=0)).bytes_per_face() == 4 * 103 + 10


def test_keys_are_different_coefficients_and_a_permutation(make):
    keys = make().draw_keys(3000, generator())
    assert keys.shape == (3000, 10)
    assert keys.dtype == torch.int64
    coefficients, exponents = keys.chunk(2, dim=1)
    assert set(coefficients.unique().tolist()) == {*range(-50, 0), *range(1, 51)}
    assert all(len(set(row)) == 5 for row in coefficients.tolist())
    assert (exponents.sort(dim=1).values == torch.arange(1, 6)).all()
    assert len(exponents.unique(dim=0)) == 120


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ([1, 2, 3, 4, 4, 1, 2, 3, 4, 5], "different coefficients"),
        ([1, 2, 3, 4, 0, 1, 2, 3, 4, 5], "but 0"),
        ([1, 2, 3, 4, 51, 1, 2, 3, 4, 5], r"-50\.\.50"),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 4], r"exponents 1\.\.5"),
        ([1, 2, 3, 4, 5, 0, 1, 2, 3, 4], r"exponents 1\.\.5"),
        ([1, 2, 3, 4, 1, 2, 3, 4], r"needs keys int64 \(1, 10\)"),
    ],
)
def test_bad_keys_are_refused_in_a_line(make, units, key, message):
    with pytest.raises(ValueError, match=message) as caught:
        make().enrol(units(1), torch.tensor([key]), generator())
    assert "\n" not in str(caught.value)


def test_keys_of_another_kind_are_refused(make, units):
    defense = make()
    for keys in (None, defense.draw_keys(3, generator()), defense.draw_keys(2, generator()).float()):
        with pytest.raises(ValueError, match="polyprotect needs keys int64"):
            defense.enrol(units(2), keys, generator())
    with pytest.raises(ValidationError, match="overlap=5 must be below m=5"):
        PolyProtectOptions(overlap=5)


def test_another_key_leaves_no_likeness_but_of_sign(make, units):
    """Scores of one face under two keys are as often negative; near 1 or -1 where both put exponent 1 in one place."""
    defense, embeddings = make(), units(2000)
    keys = [defense.draw_keys(2000, generator(seed)) for seed in (1, 2)]
    scores = defense.compare(*(defense.enrol(embeddings, key, generator()) for key in keys))
    assert float(scores.mean()) == pytest.approx(0, abs=0.03)
    places = [key[:, 5:].argmin(dim=1) for key in keys]
    same = places[0] == places[1]
    assert float(same.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(scores[same].abs().mean()) > float(scores[~same].abs().mean()) + 0.2


@pytest.mark.parametrize(("overlap", "near"), [(0, 0.1), (3, 0.3), (4, 0.6)])
def test_misfit_is_zero_where_the_template_is_made_and_leads_there(make, units, descended, overlap, near):
    defense, embeddings = make(overlap=overlap), units(24)
    keys = defense.draw_keys(24, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit = defense.misfit(templates, keys)
    assert float(misfit(embeddings[:, None]).max()) < 1e-8
    start = units(24, seed=2)
    assert float(misfit(start[:, None]).min()) > 0.1
    found = descended(misfit, start, 300)
    assert float(functional.cosine_similarity(found, embeddings).mean()) > near
    assert float(defense.compare(templates, defense.enrol(found, keys, generator())).mean()) > 0.97


def test_terms_of_exponent_one_are_most_of_the_estimate(make, units):
    closeness = []
    for overlap in (0, 2, 4):
        defense, embeddings = make(overlap=overlap), units(200)
        keys = defense.draw_keys(200, generator(1))
        found = defense.estimate(defense.enrol(embeddings, keys, generator()), keys)
        assert found.shape == embeddings.shape
        closeness.append(float(functional.cosine_similarity(found, embeddings).mean()))
    assert closeness == sorted(closeness)
    assert closeness[-1] > 0.7
    # Where there is nothing but that term, it is exact.
    defense.attach(torch.nn.Identity(), 1)
    key = torch.tensor([[7, 2, 3, 4, 5, 1, 2, 3, 4, 5]])
    one = torch.ones(1, 1)
    torch.testing.assert_close(defense.estimate(defense.enrol(one, key, generator()), key), one)


def test_what_is_no_embedding_or_template_of_this_system_is_refused(make, units):
    defense = make()
    keys = defense.draw_keys(2, generator())
    templates = defense.enrol(units(2), keys, generator())
    torch.testing.assert_close(defense.compare(templates, 3 * templates), torch.ones(2))
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates, templates[:, 1:])
    with pytest.raises(ValueError, match="2 of 2 embeddings are not finite"):
        defense.enrol(units(2) * torch.nan, keys, generator())
    assert defense.key_stored
