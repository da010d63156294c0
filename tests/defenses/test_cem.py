"""CEM: the cut, the regulariser against its formula written out, and what it does to features."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from pictures import generator, noise

from bench.errors import DefenseError
from defenses.cem import CEM, CEMOptions, Clusters, k_means
from defenses.client import train_jointly


@pytest.mark.parametrize(
    ("cut", "size", "shape"), [(4, 48, (8, 12, 12)), (4, 112, (8, 28, 28)), (2, 24, (8, 12, 12)), (7, 25, (8, 3, 3))]
)
def test_the_cut_says_what_is_sent(cut, size, shape):
    defense = CEM(CEMOptions(cut=cut), image_size=size).eval().requires_grad_(False)
    assert defense.representation_shape == shape
    assert tuple(defense.protect(noise(1, size), generator()).representation.shape[1:]) == shape
    widths = [layer.out_channels for layer in defense.client if isinstance(layer, torch.nn.Conv2d)]
    assert widths == {4: [64, 128, 8], 2: [64, 8], 7: [64, 128, 256, 256, 8]}[cut]


def test_a_cut_that_leaves_no_pixel_is_refused():
    with pytest.raises(ValueError, match="too small for a cut behind 10 layers"):
        CEM(CEMOptions(cut=10), image_size=8)


@pytest.mark.parametrize("deviation", [0.025, 0.15])
def test_the_noise_is_gaussian_of_the_size_asked_for(deviation):
    noisy, plain = (CEM(CEMOptions(noise=level, width=4), image_size=24) for level in (deviation, 0))
    noisy.load_state_dict(plain.state_dict())
    first, second = (
        defense.eval().requires_grad_(False).protect(noise(32, 24), generator(1)).representation
        for defense in (noisy, plain)
    )
    assert 0 <= float(second.min()) <= float(second.max()) <= 1
    assert scipy.stats.kstest((first - second).flatten(), "norm", (0, deviation)).pvalue > 1e-3


def plain_penalty(clusters, features, labels, deviation):
    """The regulariser, one identity and one group at a time."""
    terms = []
    for label in sorted(set(labels.tolist())):
        own, size = features[labels == label], clusters.sizes[label]
        held = [index for index in range(len(size)) if size[index] > 0]
        distances = torch.stack([((own - clusters.centroids[label, index]) ** 2).mean(dim=1) for index in held])
        best, term = distances.argmin(dim=0), 0.0
        for row, index in enumerate(held):
            if not (best == row).any():
                continue
            blend = min(10 * int((best == row).sum()) / float(size[index]), 0.99)
            v = blend * distances[row][best == row].mean() + (1 - blend) * clusters.spreads[label, index]
            excess = math.log(float(v) + 0.01) - math.log(0.125 * deviation**2 + 0.01)
            term += float(size[index] / size.sum()) * max(0.0, excess)
        terms.append(term)
    return sum(terms) / len(terms)


def world(seed=0, count=240, identities=3):
    drawn = generator(seed)
    labels = torch.randint(identities, (count,), generator=drawn)
    return torch.rand(count, 6, generator=drawn, dtype=torch.float64), labels


@pytest.mark.parametrize("deviation", [0.025, 0.9])
def test_the_regulariser_is_its_formula(deviation):
    features, labels = world()
    labels[labels == 2] = 3  # of identity 2 there is nothing, and of a fifth too little for five groups
    clusters = Clusters.of(
        torch.cat((features, features[:3])), torch.cat((labels, torch.full((3,), 4))), 5, 5, generator(1)
    )
    assert (clusters.sizes > 0).sum(dim=1).tolist() == [5, 5, 0, 5, 3]
    assert float(clusters.sizes.sum()) == 243
    batch, theirs = features[:16].clone().requires_grad_(), labels[:16]
    penalty = clusters.penalty(batch, theirs, deviation)
    assert float(penalty.detach()) == pytest.approx(
        plain_penalty(clusters, batch.detach(), theirs, deviation), abs=1e-9
    )
    assert (float(penalty.detach()) > 0) == (deviation < 0.5)  # noise that hides the spread asks for no more
    penalty.backward()
    assert torch.isfinite(batch.grad).all()
    # Nothing is known of the one, and of the other there are three groups: gradients are finite all the same.
    for label in (2, 4):
        alone = clusters.penalty(batch, torch.full((16,), label), deviation)
        assert (float(alone.detach()) > 0) == (label == 4)
        (slope,) = torch.autograd.grad(alone, batch)
        assert torch.isfinite(slope).all()


def test_groups_that_stand_apart_are_found():
    middles = 10 * torch.randn(4, 5, generator=generator(0), dtype=torch.float64)
    points = middles[:, None] + 0.1 * torch.randn(4, 20, 5, generator=generator(1), dtype=torch.float64)
    found = k_means(points.flatten(0, 1), 4, generator(2))
    assert float(torch.cdist(points.mean(dim=1), found).amin(dim=1).max()) < 1e-9
    assert tuple(k_means(torch.ones(3, 2), 3, generator()).shape) == (3, 2)  # equal points


def test_the_regulariser_draws_an_identity_together(make_training):
    """Under it, features vary less within an identity, relative to all, than under the recogniser's loss alone."""

    def share_within(weight, seed):
        training = make_training(size=16)
        torch.manual_seed(seed)
        defense = CEM(CEMOptions(weight=weight, width=4, epochs=6, batch_size=8), image_size=16)
        defense.fit(training)
        defense.eval().requires_grad_(False)
        faces, labels = next(training.batches(32, generator()))
        features = defense.features(faces).flatten(1)
        within = torch.stack([features[labels == label].var(dim=0).mean() for label in labels.unique()]).mean()
        return float(within / features.var(dim=0).mean())

    # So short a training depends on its start, and on how its sums are rounded.
    shares = sorted(share_within(16.0, seed) / share_within(0.0, seed) for seed in range(3))
    assert shares[1] < 0.5


def test_a_training_that_diverges_is_named(make_training):
    network = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(DefenseError, match="try a lower learning_rate"):
        train_jointly(
            make_training(size=16),
            {"network": network},
            lambda weights: [torch.optim.SGD(weights, lr=1)],
            lambda faces, labels, draws: -1e20 * network.weight.square().sum(),
            epochs=2,
            batch_size=8,
        )
