"""PPFR-FD: what is mixed of what, and how channels are chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import generator, noise
from pydantic import ValidationError
from torch import nn

from bench.nets.heads import CosFace
from defenses.frequency import block_dct
from defenses.ppfr_fd import PPFRFD, PPFRFDOptions


def made(size=16, **options):
    """Not fitted."""
    return PPFRFD(PPFRFDOptions(**options), image_size=size).requires_grad_(False)


def chosen(make_training, looked_at, **options):
    """The channels that are kept of luma, where a recogniser looks at one channel, in which people differ."""
    training = make_training(size=16)
    ramp = torch.linspace(-0.25, 0.25, 16)[:, None].expand(3, 16, 16)

    def batches(batch_size, generator):
        for faces, labels in training.batches(batch_size, generator):
            yield 0.5 + (labels - 1.5)[:, None, None, None] / 1.5 * ramp + 0.01 * (faces - 0.5), labels

    class Looks(nn.Module):
        def forward(self, representation):
            seen = representation[:, looked_at - 1].mean(dim=(1, 2))
            return torch.stack([seen, torch.full_like(seen, 10)], dim=1)

    def make_recogniser(shape):
        assert shape == (189, 16, 16)
        return Looks(), CosFace(2, 4, scale=16.0, margin=0.0)

    torch.manual_seed(0)
    defense = PPFRFD(PPFRFDOptions(epochs=10, batch_size=8, learning_rate=0.01, **options), image_size=16)
    defense.fit(replace(training, batches=batches, make_recogniser=make_recogniser))
    return defense


@pytest.mark.parametrize("mixing", ["pairs", "none"])
def test_what_is_sent_by_hand(mixing):
    defense, faces = made(mixing=mixing, keep=4, shuffle_seed=5), noise(2, 16)
    defense.kept_channels.copy_(torch.tensor([[1, 8, 9, 63], [2, 3, 4, 5], [1, 2, 62, 63]]))
    spectrum = block_dct(faces, torch.arange(64)).view(2, 3, 64, 16, 16).numpy()
    maps = [spectrum[:, colour, channel] for colour in range(3) for channel in defense.kept_channels[colour].tolist()]
    order = torch.randperm(12, generator=generator(5)).tolist()
    shuffled = np.stack([maps[position] for position in order], axis=1)
    expected = (shuffled[:, ::2] + shuffled[:, 1::2]) / 2 if mixing == "pairs" else shuffled
    sent = defense.protect(faces, generator()).representation
    np.testing.assert_allclose(sent.numpy(), expected, atol=1e-9)


def test_the_shuffle_is_a_permutation_of_the_deployment():
    first, second = made(shuffle_seed=1), made(shuffle_seed=2)
    assert sorted(first.shuffle.tolist()) == list(range(108))
    assert not torch.equal(first.shuffle, second.shuffle)
    faces = noise(2, 16)
    sent = [made(shuffle_seed=1).protect(faces, generator(seed)).representation for seed in (0, 1)]
    assert torch.equal(*sent)  # nothing is drawn for a face
    assert first.secret == {}
    assert first.representation_shape == (54, 16, 16)


def test_a_channel_that_recognition_needs_is_kept(make_training):
    defense = chosen(make_training, looked_at=8, keep=4, penalty=0.0)
    assert 8 in defense.kept_channels[0].tolist()
    assert int(defense.importance[0].argmax()) + 1 == 8
    assert all(1 <= channel <= 63 for channel in defense.kept_channels.flatten().tolist())
    assert all(len(set(row)) == 4 for row in defense.kept_channels.tolist())


def test_a_channel_that_shows_the_face_is_given_up(make_training):
    """Of these pictures nearly all that is visible is the ramp, in channel 8 of luma, which recognition needs too."""
    assert 8 not in chosen(make_training, looked_at=8, keep=36, penalty=1e4).kept_channels[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "greater than or equal to 1"),
        ({"keep": 64}, "less than or equal to 63"),
        ({"keep": 35}, "even number"),
        ({"mixing": "triples"}, "pairs"),
        ({"penalty": -1}, "greater than or equal to 0"),
        ({"shuffle_seed": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        PPFRFDOptions(**options)


def test_an_odd_number_of_maps_is_sent_unmixed():
    assert made(keep=35, mixing="none").representation_shape == (105, 16, 16)
