from __future__ import annotations

import pytest
import torch

from defenses.layout import probe


def test_probing_finds_where_canonical_puts_each_channel(pick):
    defense = pick()
    layout = probe(defense, defense.states())
    assert layout is not None
    assert layout.width == 6
    assert layout.varies
    assert torch.equal(layout.places, defense.table)


def test_reading_by_place_equals_canonical(pick):
    defense = pick()
    layout = probe(defense, defense.states())
    assert layout is not None
    sent = defense.protect(torch.rand(8, 3, 16, 16), torch.Generator().manual_seed(0))
    places = layout.places[layout.row_of(sent.state)]
    read = defense.canonical(sent.representation, sent.state).gather(
        1, places[:, :, None, None].expand_as(sent.representation)
    )
    assert torch.equal(read, sent.representation)


def test_a_canonical_that_does_nothing_varies_with_nothing(plain):
    layout = probe(plain(image_size=16), torch.arange(4)[:, None])
    assert layout is not None
    assert not layout.varies
    assert layout.width == 3


@pytest.mark.parametrize("change", [lambda z: 2 * z, lambda z: z.cumsum(dim=2), lambda z: z[:, :1], lambda z: z * 0])
def test_a_canonical_that_is_no_placement_has_no_layout(pick, change):
    class Other(pick):
        def canonical(self, representation, state):
            return change(super().canonical(representation, state))

    assert probe(Other(), Other().states()) is None


def test_an_unlisted_state_is_refused(pick):
    layout = probe(pick(), pick().states())
    assert layout is not None
    assert layout.row_of(torch.tensor([[2], [0]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="states"):
        layout.row_of(torch.tensor([[0], [3]]))
