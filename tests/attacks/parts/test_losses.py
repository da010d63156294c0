from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from attacks.parts import losses


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_is_the_angle_and_heeds_no_norm():
    embeddings = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    targets = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(losses.cosine(embeddings, targets), torch.tensor([0.0, 1 - math.sqrt(0.5), 2.0]))


def test_class_logits_are_cosines_with_the_own_class_first():
    embeddings, targets, others = random(4, 6), random(4, 6, seed=1), functional.normalize(random(3, 6, seed=2))
    logits = losses.class_logits(embeddings, targets, others)
    assert logits.shape == (4, 4)
    torch.testing.assert_close(logits[:, 0], functional.cosine_similarity(embeddings, targets))
    expected = functional.cosine_similarity(embeddings[:, None], others[None], dim=2)
    torch.testing.assert_close(logits[:, 1:], expected)


def test_negative_logit_and_max_margin():
    logits = torch.tensor([[0.2, 0.9, -0.1], [0.8, -0.5, 0.1]])
    torch.testing.assert_close(losses.negative_logit(logits), torch.tensor([-0.2, -0.8]))
    torch.testing.assert_close(losses.max_margin(logits), torch.tensor([0.7, -0.7]))


def test_max_margin_pushes_the_target_up_and_only_the_strongest_other_down():
    logits = torch.tensor([[0.2, 0.9, -0.1]], requires_grad=True)
    losses.max_margin(logits).sum().backward()
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_poincare_is_the_hyperbolic_distance():
    """Against arccosh(1 + 2 |u - v|^2 / ((1 - |u|^2)(1 - |v|^2))), worked by hand."""
    logits = torch.tensor([[2.0, -1.0, 1.0]])
    u, v = [0.5, -0.25, 0.25], 1 - 1e-4
    apart = (u[0] - v) ** 2 + u[1] ** 2 + u[2] ** 2
    room = (1 - sum(x * x for x in u)) * (1 - v * v)
    assert float(losses.poincare(logits)) == pytest.approx(math.acosh(1 + 2 * apart / room), rel=1e-3)
    torch.testing.assert_close(losses.poincare(7 * logits), losses.poincare(logits))


def test_poincare_falls_towards_the_target_and_stays_finite_on_it():
    share = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])
    logits = torch.stack((share, 1 - share, torch.zeros(5)), dim=1).requires_grad_()
    distances = losses.poincare(logits)
    assert (distances.diff() < 0).all()
    distances.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_feature_distance_is_one_for_the_public_distribution():
    mean, std = random(200), random(200, seed=1).abs() + 0.5
    public = mean + std * random(500, 200, seed=2)
    distance = losses.feature_distance(public, mean, std)
    assert float(distance.mean()) == pytest.approx(1, abs=0.02)
    assert float(losses.feature_distance(mean[None], mean, std)) == 0
    torch.testing.assert_close(losses.feature_distance((mean + 3 * std)[None], mean, std), torch.tensor([9.0]))


def test_total_variation_of_known_pictures():
    flat = torch.full((1, 3, 5, 5), 0.7)
    ramp = torch.arange(5.0).expand(1, 3, 5, 5)
    assert losses.total_variation(torch.cat((flat, ramp, 2 * ramp.mT))).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("loss", [losses.negative_logit, losses.max_margin, losses.poincare])
def test_descending_a_loss_brings_the_target_to_the_front(loss):
    targets, others = random(5, 8, seed=1), functional.normalize(random(10, 8, seed=2))
    embeddings = random(5, 8, seed=3).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(losses.class_logits(embeddings, targets, others)).sum().backward()
        optimizer.step()
    logits = losses.class_logits(embeddings, targets, others)
    assert (logits.argmax(dim=1) == 0).all()
