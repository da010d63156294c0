"""Smaller budgets of faces are parts of larger ones, by whole people."""

import pytest
import torch

from bench.data.faceset import FaceSet
from bench.data.nested import whole_identities
from bench.errors import DataError

IMAGES_OF = (3, 1, 4, 2, 5, 1)


@pytest.fixture(scope="module")
def faces():
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(IMAGES_OF))
    pixels = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 3, 8, 8).clone()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    return FaceSet(pixels, labels[order], tuple("abcdef"))


def take(faces, budget, seed=0):
    return whole_identities(faces, budget, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_every_budget_is_a_part_of_the_next(faces, seed):
    smaller = None
    for budget in range(2, 17):
        taken = take(faces, budget, seed)
        images = set(taken.images[:, 0, 0, 0].tolist())
        assert len(taken) <= budget or len(taken.names) == 2
        assert smaller is None or smaller <= images
        # Everybody with all their images, under their own name.
        for label, name in enumerate(taken.names):
            assert int((taken.labels == label).sum()) == IMAGES_OF["abcdef".index(name)]
        smaller = images
    assert smaller == set(range(16))


def test_shares_are_of_the_faces(faces):
    assert take(faces, 1) is faces
    assert take(faces, 1000) is faces
    assert take(faces, 0.5).names == take(faces, 8).names
    # A tenth of a set of 30 is 3, whatever the product is rounded to.
    thirty = FaceSet(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), torch.arange(30), tuple(map(str, range(30))))
    assert len(take(thirty, 0.1)) == 3


def test_two_people_are_the_least(faces):
    assert len(take(faces, 0.001).names) == 2


def test_no_budget_is_refused(faces):
    with pytest.raises(DataError, match="above 0"):
        take(faces, 0)
