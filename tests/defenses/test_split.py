"""Split inference: what the joint training is for, and the noise."""

from __future__ import annotations

import pytest
import torch
from pictures import generator

from defenses.split import Split, SplitOptions


def _trained(make_training, epochs, size=24):
    """The share of faces that are recognised at the end, by a recogniser that looks at features alone."""
    from dataclasses import replace

    training, made = make_training(size=size), []

    def make_recogniser(shape):
        made.append(training.make_recogniser(shape))
        return made[-1]

    torch.manual_seed(0)
    defense = Split(SplitOptions(epochs=epochs, batch_size=8, width=4), image_size=size)
    before = [weight.clone() for weight in defense.parameters()]
    defense.fit(replace(training, make_recogniser=make_recogniser))
    assert all((old != new).any() for old, new in zip(before, defense.parameters(), strict=True))
    (recogniser, head), (faces, labels) = made[0], next(training.batches(32, generator(0)))
    defense.requires_grad_(False).eval()
    return float(head(recogniser(defense.protect(faces, torch.Generator()).representation), labels)[1].float().mean())


def test_client_and_recogniser_learn_together(make_training):
    assert _trained(make_training, epochs=20) > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_is_what_was_asked_for(ready, noise):
    faces = torch.rand(64, 3, 24, 24, generator=generator(0))
    noisy, plain = (ready(Split(SplitOptions(epochs=1, noise=scale), image_size=24)) for scale in (noise, 0.0))
    noisy.load_state_dict(plain.state_dict())
    sent = [defense.protect(faces, generator(1)).representation for defense in (noisy, plain)]
    assert float((sent[0] - sent[1]).std()) == pytest.approx(noise, rel=0.02)
