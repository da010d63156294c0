"""Channel layouts, found by probing, against PartialFace's own tables."""

from __future__ import annotations

import pytest
import torch
from pictures import generator

from defenses.layout import probe
from defenses.none import Unprotected
from defenses.partialface import PartialFace

SIZE = 16


@pytest.fixture
def partialface():
    return PartialFace(image_size=SIZE)


def test_probing_finds_where_canonical_puts_each_channel(partialface):
    layout = probe(partialface, partialface.states())
    assert layout is not None
    assert layout.varies
    assert layout.width == 3 * 54
    sent = torch.stack([partialface.subset_table[s][partialface.permutation_table[p]] for s, p in layout.states])
    assert torch.equal(layout.canonical, torch.cat([54 * colour + sent for colour in range(3)], dim=1))


def test_reading_by_layout_equals_canonical(partialface):
    layout = probe(partialface, partialface.states())
    assert layout is not None
    sent = partialface.protect(torch.rand(8, 3, SIZE, SIZE), generator(0))
    channels = layout.canonical[layout.row_of(sent.state)][:, :, None, None].expand_as(sent.representation)
    canonical = partialface.canonical(sent.representation, sent.state)
    assert torch.equal(canonical.gather(1, channels), sent.representation)


def test_a_canonical_that_does_nothing_varies_with_nothing():
    layout = probe(Unprotected(image_size=SIZE), torch.arange(4)[:, None])
    assert layout is not None
    assert not layout.varies
    assert layout.width == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda z: 2 * z,
        lambda z: z - z.roll(1, dims=1) / 2,
        lambda z: z.cumsum(dim=2),
        lambda z: z[:, :1],
        lambda z: z * 0,
    ],
)
def test_a_canonical_that_is_no_placement_has_no_layout(change):
    class Other(PartialFace):
        def canonical(self, representation, state):
            return change(super().canonical(representation, state))

    assert probe(Other(image_size=SIZE), Other().states()) is None


def test_an_unlisted_state_is_refused(partialface):
    layout = probe(partialface, partialface.states())
    assert layout is not None
    assert layout.row_of(torch.tensor([[0, 2], [0, 0]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="states"):
        layout.row_of(torch.tensor([[0, 0], [6, 0]]))
