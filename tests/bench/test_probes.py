"""Who is attacked: every person before anyone twice, and never the gallery's image."""

import pytest
import torch

from bench.data.faceset import FaceSet
from bench.errors import DataError
from bench.probes import select_probes


def faces(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(
        0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return FaceSet(images, labels, tuple(str(i) for i in range(len(counts))))


def draw(victims, count, seed=0):
    return select_probes(victims, count, torch.Generator().manual_seed(seed))


def test_people_first():
    victims = faces([5, 4, 3, 2])
    chosen = draw(victims, 4)
    assert sorted(victims.labels[chosen.attacked].tolist()) == [0, 1, 2, 3]
    chosen = draw(victims, 7)
    assert torch.bincount(victims.labels[chosen.attacked]).tolist() == [2, 2, 2, 1]


def test_probe_and_gallery_are_different_images_of_the_same_people():
    victims = faces([5, 4, 3, 2])
    chosen = draw(victims, 100)
    assert len(chosen.attacked) == 4 + 3 + 2 + 1
    assert not set(chosen.attacked.tolist()) & set(chosen.gallery.tolist())
    assert sorted(victims.labels[chosen.gallery].tolist()) == [0, 1, 2, 3]


def test_people_with_one_image_are_left_out():
    victims = faces([1, 3, 1])
    chosen = draw(victims, 10)
    assert victims.labels[chosen.attacked].tolist() == [1, 1]
    assert victims.labels[chosen.gallery].tolist() == [1]


def test_a_copy_of_the_gallery_image_is_no_probe():
    victims = faces([2, 2])
    victims.images[1] = victims.images[0]
    chosen = draw(victims, 10)
    assert 0 not in victims.labels[chosen.attacked]


def test_nobody_with_two_images():
    with pytest.raises(DataError, match="no victim has two different images"):
        draw(faces([1, 1, 1]), 3)


def test_the_seed_decides():
    victims = faces([4] * 6)
    assert torch.equal(draw(victims, 9).attacked, draw(victims, 9).attacked)
    assert not torch.equal(draw(victims, 9).attacked, draw(victims, 9, seed=1).attacked)
