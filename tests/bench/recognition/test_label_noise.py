from __future__ import annotations

import pytest
import torch

from bench.recognition.label_noise import flip_labels


def flip(labels: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    return flip_labels(labels, 7, share, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.99])
def test_exactly_the_share_is_flipped_and_never_to_itself(share: float) -> None:
    labels = torch.arange(7).repeat(1000)
    before = labels.clone()
    flipped = flip(labels, share)
    assert int((flipped != labels).sum()) == round(share * 7000)
    assert torch.equal(labels, before)
    assert flipped.min() >= 0
    assert flipped.max() < 7


def test_wrong_labels_are_uniform() -> None:
    labels = torch.arange(7).repeat(6000)
    flipped = flip(labels, 0.5)
    wrong = flipped != labels
    shift = (flipped[wrong] - labels[wrong]) % 7
    assert (shift.bincount(minlength=7)[1:] / wrong.sum() - 1 / 6).abs().max() < 0.01
    assert (labels[wrong].bincount() / wrong.sum() - 1 / 7).abs().max() < 0.01


def test_the_generator_decides() -> None:
    labels = torch.arange(7).repeat(10)
    assert torch.equal(flip(labels, 0.3), flip(labels, 0.3))
    assert not torch.equal(flip(labels, 0.3), flip(labels, 0.3, seed=1))
