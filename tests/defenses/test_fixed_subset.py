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
