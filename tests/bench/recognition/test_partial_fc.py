"""Partial FC in one process: sampling, sparsity, precision, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.recognition import partial_fc as module
from bench.recognition.partial_fc import PartialFC
from bench.recognition.processes import Processes

CLASSES, DIMENSIONS = 60, 16
SGD = {"learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def make(**options: Any) -> PartialFC:
    return PartialFC(DIMENSIONS, CLASSES, **{"scale": 32.0, "margin": 0.3, "sample_rate": 0.2, **options})


def batch(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, DIMENSIONS, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def step(head: PartialFC, embeddings: Tensor, labels: Tensor) -> Tensor:
    loss, _ = head(embeddings.clone().requires_grad_(), labels)
    loss.backward()
    head.update(**SGD)
    return loss.detach()


def test_only_sampled_centres_and_their_momentum_move() -> None:
    head = make()
    head.momentum.fill_(0.25)  # those not sampled neither decay nor drift on
    for _ in range(3):
        weight, momentum = head.weight.clone(), head.momentum.clone()
        step(head, *batch())
        still = torch.ones(CLASSES, dtype=torch.bool)
        still[head.sampled] = False
        assert torch.equal(head.weight[still], weight[still])
        assert torch.equal(head.momentum[still], momentum[still])
        assert (head.weight[head.sampled] != weight[head.sampled]).all()


def test_every_negative_is_as_likely_as_any_other() -> None:
    head, (embeddings, labels) = make(), batch()
    positives = labels.unique()
    count, rounds = torch.zeros(CLASSES), 2000
    for _ in range(rounds):
        with torch.no_grad():
            head(embeddings, labels)
        assert len(head.sampled) == head.quota == 12
        assert (head.sampled.diff() > 0).all()
        count[head.sampled] += 1
    assert (count[positives] == rounds).all()
    negatives = torch.ones(CLASSES, dtype=torch.bool)
    negatives[positives] = False
    share = (12 - len(positives)) / (CLASSES - len(positives))
    spread = math.sqrt(rounds * share * (1 - share))
    assert ((count[negatives] - rounds * share).abs() < 4.5 * spread).all()


def test_equal_scores_never_cost_a_positive_or_exceed_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.rand

    def coarse(*size: int, **options: Any) -> Tensor:
        return (3 * original(*size, **options)).floor()

    monkeypatch.setattr(module.torch, "rand", coarse)
    head, (embeddings, labels) = make(), batch()
    for _ in range(20):
        head(embeddings, labels)
        assert len(head.sampled) == head.quota
        assert torch.isin(labels, head.sampled).all()
        assert (head.sampled.diff() > 0).all()


def test_the_seed_decides_the_sample() -> None:
    first, second, other = make(seed=1), make(seed=1), make(seed=1, processes=Processes(0, 1))
    for head in (first, second):
        head(*batch())
    assert torch.equal(first.sampled, second.sampled)
    other.reseed(2)
    other(*batch())
    assert not torch.equal(first.sampled, other.sampled)
    second.reseed(1)
    second(*batch())
    assert torch.equal(first.sampled, second.sampled)


def test_too_many_positives_leave_no_negative_and_are_counted() -> None:
    head, (embeddings, labels) = make(sample_rate=0.05), batch(30)
    for done in (1, 2):
        step(head, embeddings, labels)
        assert torch.equal(head.sampled, labels.unique())
        assert head.overfull == head.overfull_everywhere() == done
    step(head, embeddings[:3], labels[:1].expand(3))
    assert len(head.sampled) == head.quota == 3
    assert head.overfull == 2


@pytest.mark.parametrize("size", [2, 3, 7])
def test_first_centres_do_not_depend_on_how_they_are_shared_out(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "INITIAL_BLOCK", 9)
    whole = make(seed=4)
    parts = [make(seed=4, processes=Processes(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    assert float(whole.weight.std()) == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(whole.weight, make(seed=5).weight)
    sizes = [len(part.owned) for part in parts]
    assert sum(sizes) == CLASSES
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_rows_are_updated_block_by_block_alike(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    whole = make(sample_rate=rate)
    for _ in range(3):
        step(whole, *batch())
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * DIMENSIONS * 4)
    blocks = make(sample_rate=rate)
    for _ in range(3):
        step(blocks, *batch())
    assert torch.equal(whole.weight, blocks.weight)
    assert torch.equal(whole.momentum, blocks.momentum)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_half_precision_products_keep_a_float32_softmax_and_exact_own_cosines(rate: float) -> None:
    embeddings, labels = batch(40)
    exact, half = make(sample_rate=rate), make(sample_rate=rate)
    x, y = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    loss, _ = exact(x, labels)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = half(y, labels)
    rough.backward()
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(loss.detach()), rel=2e-3)
    assert float(rough.detach()) != float(loss.detach())  # the products really are narrow
    for rounded, expected in ((y.grad, x.grad), (half.gradient, exact.gradient)):
        assert float((rounded - expected).norm() / expected.norm()) < 0.02
    # With one class's cosines alone in the softmax, only those of the samples to their class matter: they are float32.
    exact, half = make(sample_rate=1 / CLASSES), make(sample_rate=1 / CLASSES)
    same = labels[:1].expand(40)
    with torch.autocast("cpu", torch.bfloat16):
        rough, hits = half(embeddings, same)
    assert float(rough) == float(exact(embeddings, same)[0]) == 0.0
    assert hits.all()


def test_it_learns_to_tell_identities_apart() -> None:
    head, generator = make(sample_rate=0.3, margin=0.1), torch.Generator().manual_seed(3)
    prototypes = torch.randn(CLASSES, DIMENSIONS, generator=generator)
    losses = []
    for _ in range(500):
        labels = torch.randint(0, CLASSES, (16,), generator=generator)
        loss, _ = head(prototypes[labels].requires_grad_(), labels)
        loss.backward()
        head.update(learning_rate=0.01, momentum=0.9, weight_decay=0.0)
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.05 * sum(losses[:10])
    cosine = torch.nn.functional.normalize(prototypes) @ torch.nn.functional.normalize(head.weight).T
    assert torch.equal(cosine.argmax(1), torch.arange(CLASSES))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_stay_finite_where_cosines_are_one_or_embeddings_zero(sign: float) -> None:
    head = make()
    embeddings = sign * head.weight[:5]
    embeddings[0] = 0
    embeddings.requires_grad_()
    loss, _ = head(embeddings, torch.arange(5))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    assert head.gradient is not None
    assert torch.isfinite(head.gradient).all()


def test_a_filter_that_drops_every_negative_leaves_a_certain_sample() -> None:
    head = make(interclass_filter=-1.0)
    loss, _ = head(*batch())
    assert float(loss) == 0.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, CLASSES], rf"must lie in \[0, {CLASSES}\), got 0 to {CLASSES}"),
        ([-1, 0], rf"must lie in \[0, {CLASSES}\), got -1 to 0"),
        ([0.0, 1.0], "must be int64"),
        ([0, 1, 2], "must be int64"),
    ],
)
def test_wrong_labels_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(2, DIMENSIONS), torch.tensor(labels))
