"""Channels left out: how many, which, and what that costs to send."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pictures import generator, noise
from scipy import stats

from defenses.dropout import Dropout, DropoutOptions

SIZE = 8


def dropout(channels, **options):
    return Dropout(DropoutOptions(**options), image_size=SIZE, takes=(channels, SIZE, SIZE))


@pytest.mark.parametrize(
    ("options", "dropped"),
    [({"share": 0.5}, 5), ({"share": 0.0}, 0), ({"share": 0.99}, 9), ({"number": 3}, 3), ({"number": 0}, 0)],
)
def test_as_many_channels_are_zero_and_the_others_untouched(options, dropped):
    defense, values = dropout(10, **options), 0.1 + torch.rand(50, 10, SIZE, SIZE, generator=generator())
    sent = defense.transform(values, None, generator(1))
    left_out = (sent == 0).flatten(2).all(dim=2)
    assert (left_out.sum(dim=1) == dropped).all()
    assert torch.equal(sent[~left_out], values[~left_out])
    described = defense.describe()
    assert described["dropped"] == dropped
    assert described["pattern_bits"] == pytest.approx(math.log2(math.comb(10, dropped)))


def test_every_choice_is_as_likely():
    defense = dropout(5, number=2)
    sent = defense.transform(torch.ones(20_000, 5, 1, 1), None, generator(2))
    rows = [tuple(row.nonzero().flatten().tolist()) for row in (sent[:, :, 0, 0] == 0)]
    counts = [rows.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(counts) == len(rows)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_what_is_left_is_sent_and_a_bit_for_each_channel():
    assert dropout(27, share=0.5).bytes_per_face() == (27 - 14) * SIZE**2 * 4 + 4


def test_a_fresh_choice_for_every_call_and_face():
    defense = Dropout(DropoutOptions(number=1), image_size=SIZE)
    face = noise(1, SIZE).expand(64, -1, -1, -1)
    sent = defense.protect(face, generator()).representation
    assert {int((row == 0).flatten(1).all(dim=1).nonzero()) for row in sent} == {0, 1, 2}
    assert not torch.equal(sent, defense.protect(face, generator(1)).representation)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="leaves none of 3 channels"):
        Dropout(DropoutOptions(number=3))
    with pytest.raises(ValueError, match="share"):
        DropoutOptions(share=1)
