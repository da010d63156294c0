from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.nets.heads import ArcFace, CosFace, MarginHead

CLASSES, DIMENSIONS, COUNT = 7, 5, 11


def oracle(head: MarginHead, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The published formulas in float64, one logit at a time."""
    rows = []
    for embedding, label in zip(embeddings.double(), labels.tolist(), strict=True):
        row = []
        for j, centre in enumerate(weight.double()):
            cosine = (embedding @ centre) / (embedding.norm() * centre.norm())
            if j == label:
                angle = torch.arccos(cosine.clamp(-1 + 1e-12, 1 - 1e-12))
                if isinstance(head, CosFace):
                    cosine = cosine - head.margin
                else:
                    turn = (math.pi - head.margin) / head.angle_factor
                    if float(angle.detach()) <= turn:
                        cosine = torch.cos(head.angle_factor * angle + head.margin)
                    elif head.angle_factor == 1:
                        cosine = cosine - head.margin * math.sin(head.margin)
                    else:
                        cosine = cosine - math.cos(turn) - 1
                    cosine = cosine - head.cosine_margin
            row.append(head.scale * cosine)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def make(kind: type[MarginHead], **options: float) -> MarginHead:
    torch.manual_seed(0)
    head = kind(DIMENSIONS, CLASSES, **{"scale": 30.0, "margin": 0.4, **options})
    with torch.no_grad():
        head.weight.normal_()
    return head


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(COUNT, DIMENSIONS, generator=generator) * 9, torch.arange(COUNT) % CLASSES


HEAD_CASES = [
    (CosFace, {}),
    (ArcFace, {}),
    (ArcFace, {"margin": 0.0}),
    (ArcFace, {"margin": 1.2}),
    (ArcFace, {"margin": 0.3, "cosine_margin": 0.2}),
    (ArcFace, {"margin": 0.2, "cosine_margin": 0.1, "angle_factor": 1.35}),
]


@pytest.mark.parametrize(("kind", "options"), HEAD_CASES)
def test_logits_are_the_published_formula(kind: type[MarginHead], options: dict[str, float]) -> None:
    head = make(kind, **options)
    embeddings, labels = batch()
    embeddings[0] = -head.weight[0].detach()  # as wrong as can be: t = pi
    embeddings[1] = head.weight[1].detach()  # as right as can be: t = 0
    logits = head.logits(embeddings, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), oracle(head, embeddings, head.weight, labels), rtol=0, atol=2e-2)
    # Away from t = 0 and pi, where float32 cosines are only good to the root of their rounding, agreement is tight.
    torch.testing.assert_close(
        logits[2:].double(), oracle(head, embeddings, head.weight, labels)[2:], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("kind", "options"), HEAD_CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_formula(
    kind: type[MarginHead], options: dict[str, float], smoothing: float
) -> None:
    head = make(kind, label_smoothing=smoothing, **options)
    embeddings, labels = batch()
    embeddings.requires_grad_()
    loss, hits = head(embeddings, labels)
    loss.backward()

    reference = embeddings.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    log_p = F.log_softmax(oracle(head, reference, weight, labels), 1)
    true = log_p[torch.arange(COUNT), labels]
    expected = -((1 - smoothing) * true + smoothing * log_p.mean(1)).mean()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(embeddings.grad.double(), reference.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-3, atol=1e-5)
    cosine = F.normalize(reference) @ F.normalize(weight).T
    assert torch.equal(hits, cosine.argmax(1) == labels)


@pytest.mark.parametrize(("kind", "options"), [(CosFace, {}), (ArcFace, {}), (ArcFace, {"angle_factor": 2.0})])
def test_the_target_never_rises_with_the_angle(kind: type[MarginHead], options: dict[str, float]) -> None:
    head = make(kind, margin=0.5, **options)
    angles = torch.linspace(0.01, math.pi - 0.01, 500)
    target = head.target(torch.cos(angles))
    assert (target.diff() < 0).all()
    assert (target < torch.cos(angles)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", [CosFace, ArcFace])
def test_gradients_stay_finite_where_cosines_are_one_or_embeddings_zero(kind: type[MarginHead], sign: float) -> None:
    head = make(kind)
    embeddings = (sign * head.weight.detach()).clone()
    embeddings[0] = 0
    embeddings.requires_grad_()
    loss, _ = head(embeddings, torch.arange(CLASSES))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.weight.grad).all()


def test_logits_are_float32_under_autocast() -> None:
    head = make(ArcFace, scale=64.0)
    embeddings, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.logits(embeddings.bfloat16(), labels)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, head.logits(embeddings.bfloat16().float(), labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, CLASSES], rf"must lie in \[0, {CLASSES}\), got 0 to {CLASSES}"),
        ([-1, 0], rf"must lie in \[0, {CLASSES}\), got -1 to 0"),
        ([0.0, 1.0], "must be int64"),
        ([0, 1, 2], "must be int64"),
        ([[0], [1]], "must be int64"),
    ],
)
def test_wrong_labels_are_refused(labels: list[int], message: str) -> None:
    head = make(ArcFace)
    for call in (head, head.logits):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(2, DIMENSIONS), torch.tensor(labels))


def test_the_combined_margin_has_cosface_in_it() -> None:
    embeddings, labels = batch()
    combined, cosface = make(ArcFace, margin=0.0, cosine_margin=0.25), make(CosFace, margin=0.25)
    torch.testing.assert_close(combined.logits(embeddings, labels), cosface.logits(embeddings, labels))
