"""The fixed subset."""

from __future__ import annotations

import pytest
import torch
from pictures import generator, noise
from pydantic import ValidationError

from defenses.arcface_fd import ArcFaceFD
from defenses.fixed_subset import FixedSubset, FixedSubsetOptions
from defenses.partialface import PartialFace

FACES = noise(3, 16, dtype=torch.float32)


@pytest.mark.parametrize("subset", range(6))
def test_it_is_partialface_with_its_rank_pinned(subset):
    fixed = FixedSubset(FixedSubsetOptions(subset=subset), image_size=16)
    state = torch.tensor([[subset, 0]]).expand(3, -1)  # P0 is the identity
    expected = PartialFace(image_size=16).protect(FACES, generator(), state=state).representation
    protected = fixed.protect(FACES, generator())
    assert torch.equal(protected.representation, expected)
    assert protected.state is None


@pytest.mark.parametrize("factor", [4, 3, 2, 1])
def test_both_take_the_factor(factor):
    options = {"upsampling": factor}
    side = 2 * factor
    fixed = FixedSubset(FixedSubsetOptions(subset=4, **options), image_size=16)
    everything = ArcFaceFD(ArcFaceFD.Options(**options), image_size=16)
    whole = everything.protect(FACES, generator()).representation
    assert whole.shape == (3, *everything.representation_shape) == (3, 192, side, side)
    sent = fixed.protect(FACES, generator()).representation
    assert torch.equal(sent.unflatten(1, (3, 9)), whole.unflatten(1, (3, 64))[:, :, fixed.subset_channels])
    operator = everything.linear_operator(None)
    torch.testing.assert_close(operator(FACES) + operator.offset.float(), whole, rtol=0, atol=1e-3)


def test_all_channels_hold_every_subset():
    spectrum = ArcFaceFD(image_size=16).protect(FACES, generator()).representation.view(3, 3, 64, 16, 16)
    fixed = FixedSubset(FixedSubsetOptions(subset=4), image_size=16)
    sent = fixed.protect(FACES, generator()).representation.view(3, 3, 9, 16, 16)
    torch.testing.assert_close(sent, spectrum[:, :, fixed.subset_channels], rtol=0, atol=1e-4)


def test_random_table():
    options = FixedSubsetOptions(tables="random", table_seed="3", subset="6", sigma="4", subset_size="8")
    defense = FixedSubset(options, image_size=16)
    assert defense.representation_shape == (24, 16, 16)
    assert not {0, 1, 8, 16} & set(defense.subset_channels.tolist())


def test_subset_must_exist():
    with pytest.raises(ValidationError, match=r"0\.\.5"):
        FixedSubsetOptions(subset=6)
