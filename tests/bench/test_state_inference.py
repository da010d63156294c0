"""Inferred places against what was drawn."""

import pytest
import torch

from attacks.layout import probe
from bench import plugins
from bench.state_inference import named_states, places_right


@pytest.fixture(scope="module")
def defense():
    return plugins.make_defense("partialface", {}, "quick", 32)


@pytest.fixture(scope="module")
def drawn(defense):
    """States (N, k, D) and their true places (N, k, C)."""
    states = defense.draw(10, torch.Generator().manual_seed(0)).unflatten(0, (5, 2))
    layout = probe(defense, defense.states())
    return states, layout.places[layout.row_of(states.flatten(0, 1))].unflatten(0, (5, 2))


def test_each_channel_is_right_or_wrong(defense, drawn):
    states, places = drawn
    assert places_right(places, states, defense).all()
    inferred = places.clone()
    inferred[3, 1, 7] += 1
    right = places_right(inferred, states, defense)
    assert right.shape == places.shape
    assert (~right).nonzero().tolist() == [[3, 1, 7]]


def test_places_are_those_of_the_states_drawn_for_the_same_face(defense, drawn):
    states, places = drawn
    assert not places_right(places.flip(0), states, defense).all(dim=2).all()


@pytest.mark.parametrize(
    "inferred", [torch.zeros(5, 2, 26, dtype=torch.int64), torch.zeros(5, 27, dtype=torch.int64), torch.zeros(5, 2, 27)]
)
def test_other_shapes_are_refused(defense, drawn, inferred):
    with pytest.raises(ValueError, match=r"int64 \(5, 2, 27\)"):
        places_right(inferred, drawn[0], defense)


def test_states_are_named_by_their_rows(defense, drawn):
    states, places = drawn
    listed = defense.states()
    inferred = places.clone()
    inferred[3, 1, [0, 1]] = inferred[3, 1, [1, 0]]  # the layout of no state
    inferred[0, 0] = places[4, 1]
    named = named_states(inferred, states, defense)
    assert torch.equal(listed[named[..., 0]], states)
    assert named[3, 1, 1] == -1
    assert torch.equal(listed[named[0, 0, 1]], states[4, 1])
    same = (named[..., 0] == named[..., 1]).flatten().tolist()
    expected = [True] * 10
    expected[7] = False
    expected[0] = bool((states[0, 0] == states[4, 1]).all())
    assert same == expected
