from __future__ import annotations

import torch

from bench.data.faceset import FaceSet, Skipped
from bench.data.overlap import drop_twins, drop_victims


def make(values: list[int], labels: list[int], names: tuple[str, ...]) -> FaceSet:
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return FaceSet(images, torch.tensor(labels), names, (Skipped("a", "b"),))


def test_disjoint_sets_are_left_alone():
    faces = make([1, 2, 3], [0, 0, 1], ("a", "b"))
    kept, dropped = drop_victims(faces, make([4, 5], [0, 1], ("c", "d")))
    assert kept is faces
    assert dropped == ()


def test_whole_identities_go_and_labels_stay():
    faces = make([1, 2, 3, 4, 5], [0, 0, 1, 1, 2], ("a", "b", "c"))
    kept, dropped = drop_victims(faces, make([9, 2, 8], [0, 1, 1], ("c", "x")))
    assert kept.images[:, 0, 0, 0].tolist() == [3, 4]
    assert kept.labels.tolist() == [1, 1]
    assert kept.names == faces.names
    assert kept.skipped == faces.skipped
    assert [(s.where, s.reason.split()[-1]) for s in dropped] == [("a", "victim"), ("c", "name")]


def test_names_without_images_are_nobody():
    faces = make([1, 2], [0, 1], ("a", "b"))
    kept, dropped = drop_victims(faces, make([9], [0], ("z", "a")))  # nobody is called a there
    assert len(kept) == 2
    assert dropped == ()


def noise(seeds: list[int], labels: list[int]) -> FaceSet:
    images = torch.stack(
        [torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(s), dtype=torch.uint8) for s in seeds]
    )
    return FaceSet(images, torch.tensor(labels), tuple("abcdef"))


def test_twins_are_reduced_to_the_one_with_most_images():
    #            a  a  b  b  b  c  c  d  e  e  f
    faces = noise([1, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8], [0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 5])
    kept, dropped = drop_twins(faces)
    # a - b by image 2, b - c by image 4; e repeats an image of its own, which links it to nobody.
    assert kept.used_names == {"b", "d", "e", "f"}
    assert len(kept) == 7
    assert [s.where for s in dropped] == ["a", "c"]
    assert all("shares an identical image with b" in s.reason for s in dropped)


def test_blank_and_nearly_equal_images_make_no_twins():
    faces = noise([1, 2, 3, 4], [0, 1, 2, 3])
    faces.images[0] = faces.images[1] = 7
    faces.images[3] = faces.images[2]
    faces.images[3, 1, 4, 4] ^= 1
    kept, dropped = drop_twins(faces)
    assert kept is faces
    assert dropped == ()
