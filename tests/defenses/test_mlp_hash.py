"""MLP-Hash: bits against the network written out, and what a stolen key makes of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pictures import generator
from torch.nn import functional

from defenses.mlp_hash import MLPHash, MLPHashOptions


@pytest.fixture
def make(ready):
    return lambda **options: ready(MLPHash(MLPHashOptions(**options), image_size=24))


@pytest.mark.parametrize(
    ("options", "widths"),
    [({}, [24, 48, 48, 48, 24]), ({"hidden": 1, "bits": 60}, [24, 48, 60]), ({"hidden": 0, "bits": 8}, [24, 8])],
)
def test_bits_are_those_of_a_network_of_orthonormal_weights(make, units, options, widths):
    defense, embeddings = make(**options), units(4)
    keys = defense.draw_keys(4, generator())
    templates = defense.enrol(embeddings, keys, generator())
    for template, values, key in zip(templates, embeddings.numpy(), keys, strict=True):
        weights = defense.expand(key).numpy()
        assert len(weights) == sum(a * b for a, b in itertools.pairwise(widths))
        start = 0
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layer = weights[start : start + inputs * outputs].reshape(inputs, outputs)
            start += inputs * outputs
            gram = layer @ layer.T if inputs <= outputs else layer.T @ layer
            np.testing.assert_allclose(gram, np.eye(min(inputs, outputs)), atol=1e-5)
            if number:
                values = np.maximum(values, 0)
            values = np.array([sum(values[i] * layer[i, o] for i in range(inputs)) for o in range(outputs)])
        expected = np.where(values > values.mean(), 1, -1) / math.sqrt(widths[-1])
        np.testing.assert_allclose(template.numpy(), expected, rtol=1e-6)
    assert (defense.template_size, defense.bytes_per_face()) == (widths[-1], math.ceil(widths[-1] / 8))


def test_another_key_leaves_nothing_in_common(make, units):
    defense, embeddings = make(), units(300)
    templates = [defense.enrol(embeddings, defense.draw_keys(300, generator(seed)), generator()) for seed in (1, 2)]
    assert float(defense.compare(*templates).mean()) == pytest.approx(0.5, abs=0.02)


def test_near_embeddings_share_more_bits_under_one_key(make, units):
    defense, embeddings = make(), units(300)
    keys = defense.draw_keys(1, generator()).expand(300, -1)
    templates = defense.enrol(embeddings, keys, generator())
    shares = []
    for distance in (0.0, 0.2, 0.5, 1.0, 2.0):
        near = defense.enrol(embeddings + distance * units(300, seed=1), keys, generator())
        shares.append(float(defense.compare(templates, near).mean()))
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("options", "near", "share"),
    [({}, 0.05, 0.99), ({"hidden": 1, "bits": 384}, 0.75, 0.95), ({"hidden": 0, "bits": 384}, 0.95, 0.99)],
)
def test_misfit_is_zero_where_the_template_is_made_and_leads_there(make, units, descended, options, near, share):
    """Of few bits behind three layers other embeddings make the same template, too."""
    defense, embeddings = make(**options), units(12)
    keys = defense.draw_keys(12, generator(1))
    templates = defense.enrol(embeddings, keys, generator())
    misfit, start = defense.misfit(templates, keys), units(12, seed=2)
    assert float(misfit(embeddings[:, None]).max()) < 1e-3
    assert float(misfit(start[:, None]).min()) > 0.02
    found = descended(misfit, start, 300)
    before, after = (float(functional.cosine_similarity(side, embeddings).mean()) for side in (start, found))
    assert after > before + near
    assert float(defense.compare(templates, defense.enrol(found, keys, generator())).mean()) > share
    assert defense.estimate(templates, keys) is None


def test_clients_keep_their_keys_in_any_order(make, units):
    defense, embeddings = make(), units(4)
    keys = defense.draw_keys(2, generator())[torch.tensor([0, 1, 1, 0])]
    together = defense.enrol(embeddings, keys, generator())
    assert torch.equal(together, torch.cat([defense.enrol(embeddings[i][None], keys[i][None], None) for i in range(4)]))


@pytest.mark.parametrize("keys", [None, torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 1)])
def test_keys_of_another_kind_are_refused(make, units, keys):
    with pytest.raises(ValueError, match="mlp-hash needs keys int64"):
        make().enrol(units(2), keys, generator())


def test_what_is_no_embedding_or_template_of_this_system_is_refused(make, units):
    defense = make()
    keys = defense.draw_keys(2, generator())
    templates = defense.enrol(units(2), keys, generator())
    with pytest.raises(ValueError, match="another system"):
        defense.compare(templates, templates[:, 1:])
    with pytest.raises(ValueError, match="2 of 2 embeddings are not finite"):
        defense.enrol(units(2) * torch.inf, keys, generator())
