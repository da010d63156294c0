from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.data.decode import decode_image
from bench.data.folder import FolderOptions, load_folder, scan_tree
from bench.errors import DataError, MissingError

PAIRS = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\nCy\t1\t2\nCy\t2\tBob\t1\n"
PEOPLE = {"Ann": 3, "Bob": 2, "Cy": 2, "Dee": 2, "Eve": 1}


def test_without_pairs(make_tree):
    root = make_tree(PEOPLE)
    source = load_folder(root, 32)
    assert source.victims is None
    assert source.pairs is None
    assert source.faces.names == tuple(PEOPLE)
    assert source.faces.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    expected = decode_image((root / "Bob/Bob_0002.jpg").read_bytes(), 32)
    assert torch.equal(source.faces.images[4], expected)
    assert source.faces.skipped == ()


def test_people_in_pairs_are_the_victims(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    source = load_folder(root, 32)
    assert source.victims is not None
    assert source.pairs is not None
    assert source.faces.names == ("Dee", "Eve")
    assert source.victims.names == ("Ann", "Bob", "Cy")
    assert len(source.victims) == 7  # all their images, not only those in pairs
    assert source.pairs.same.tolist() == [True, False, True, False]
    assert source.pairs.fold.tolist() == [0, 0, 1, 1]
    for slot, file in [(source.pairs.first[1], "Ann/Ann_0001.jpg"), (source.pairs.second[3], "Bob/Bob_0001.jpg")]:
        assert torch.equal(source.victims.images[slot], decode_image((root / file).read_bytes(), 32))
    people = source.victims.labels
    assert torch.equal(people[source.pairs.first] == people[source.pairs.second], source.pairs.same)


def test_pairs_survive_images_skipped_before_them(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    (root / "Ann/Ann_0000.jpg").write_bytes(b"not an image")
    source = load_folder(root, 32)
    assert source.pairs is not None
    assert source.victims is not None
    assert [s.where for s in source.faces.skipped] == ["Ann/Ann_0000.jpg"]
    expected = decode_image((root / "Bob/Bob_0002.jpg").read_bytes(), 32)
    assert torch.equal(source.victims.images[source.pairs.second[1]], expected)


def test_pairs_can_be_passed_over(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    assert load_folder(root, 32, FolderOptions(use_pairs=False)).victims is None


def test_view_1_lists_are_cut_into_folds(make_tree):
    root = make_tree({"Ann": 30, "Bob": 2, "Dee": 2, "Eve": 2})
    genuine = "".join(f"Ann\t{i}\t{i + 1}\n" for i in range(1, 21))
    impostor = "".join(f"Ann\t{i}\tBob\t1\n" for i in range(1, 21))
    (root / "pairs.txt").write_text(f"20\n{genuine}{impostor}")
    pairs = load_folder(root, 16).pairs
    assert pairs is not None
    assert torch.bincount(pairs.fold[pairs.same]).tolist() == [2] * 10
    assert torch.bincount(pairs.fold[~pairs.same]).tolist() == [2] * 10


def test_crop(make_tree):
    root = make_tree(PEOPLE)
    source = load_folder(root, 32, FolderOptions(crop=0.5))
    expected = decode_image((root / "Ann/Ann_0001.jpg").read_bytes(), 32, crop=0.5)
    assert torch.equal(source.faces.images[0], expected)


def test_numbers_by_the_end_of_the_name(make_tree):
    root = make_tree(PEOPLE)
    (root / "Bob/Bob_0002.jpg").rename(root / "Bob/photo-2.jpeg")
    (root / "pairs.txt").write_text(PAIRS)
    assert load_folder(root, 32).pairs is not None
    (root / "Bob/other2.png").write_bytes((root / "Bob/photo-2.jpeg").read_bytes())
    with pytest.raises(DataError, match="line 3 names image 2 of 'Bob', and 2 files answer to that"):
        load_folder(root, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS.replace("Cy\t1\t2", "Zed\t1\t2"), "line 4 names 'Zed', who has no folder"),
        (PAIRS.replace("Bob\t2", "Bob\t9"), "line 3 names image 9 of 'Bob', which is not there"),
        ("1\nAnn\t1\t2\n", "line 1"),
    ],
)
def test_pairs_that_do_not_fit(make_tree, text, message):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_folder(root, 32)


def test_a_damaged_image_that_a_pair_needs(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    (root / "Bob/Bob_0002.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"pairs\.txt line 3 needs Bob/Bob_0002\.jpg, which cannot be used: not a JPEG"):
        load_folder(root, 32)


def test_nobody_left_to_learn_from(make_tree):
    root = make_tree({"Ann": 3, "Bob": 2, "Cy": 2, "Dee": 2})
    (root / "pairs.txt").write_text(PAIRS)
    with pytest.raises(DataError, match=r"all but 1 of the people.*at least 2 others"):
        load_folder(root, 32)


def test_what_is_skipped_is_listed(make_tree, make_jpeg):
    root = make_tree(PEOPLE)
    (root / "Ann/notes.txt").write_text("x")
    (root / "Ann/inner").mkdir()
    (root / "Ann/.hidden.jpg").write_text("x")
    (root / "stray.jpg").write_bytes(make_jpeg(0))
    (root / "README").write_text("x")
    (root / "Bob/Bob_0001.jpg").write_bytes(make_jpeg(0)[:500])
    (root / "Cy/Cy_0001.jpg").unlink()
    (root / "Cy/Cy_0001.jpg").mkdir()
    faces = load_folder(root, 32).faces
    reasons = {s.where: s.reason for s in faces.skipped}
    assert set(reasons) == {"Ann/notes.txt", "Ann/inner", "stray.jpg", "Bob/Bob_0001.jpg", "Cy/Cy_0001.jpg"}
    assert "not named like an image" in reasons["Ann/notes.txt"]
    assert "regular file" in reasons["Cy/Cy_0001.jpg"]
    assert len(faces) == 8


def test_identity_that_loses_all_images_is_gone(make_tree):
    root = make_tree(PEOPLE)
    (root / "Eve/Eve_0001.jpg").write_bytes(b"x")
    faces = load_folder(root, 32).faces
    assert faces.names == ("Ann", "Bob", "Cy", "Dee")
    assert faces.used_names == set(faces.names)


def test_awkward_names(make_tree):
    awkward = ["line\nbreak", "Zoë Ünal", "日本", "a b", "-rf"]
    root = make_tree(dict.fromkeys(awkward, 2))
    raw = Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe"))
    try:
        raw.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (raw / "x.jpg").write_bytes(b"not an image")
    faces = load_folder(root, 32).faces
    assert set(faces.names) == {"line\\nbreak", "Zoë Ünal", "日本", "a b", "-rf"}
    assert [s.where for s in faces.skipped] == ["\\udcff\\udcfe/x.jpg"]
    for name in (*faces.names, faces.skipped[0].where):
        assert name.encode()  # can be written to a result


def test_empty_missing_and_hopeless(make_tree, tmp_path):
    with pytest.raises(MissingError, match="is not a folder"):
        load_folder(tmp_path / "none", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_folder(tmp_path / "empty", 32)
    (tmp_path / "empty" / "Ann").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_folder(tmp_path / "empty", 32)
    with pytest.raises(DataError, match=r"nobody in .* has two usable images"):
        load_folder(make_tree({"Ann": 1, "Bob": 1}, "singles"), 32)
    (tmp_path / "empty" / "Ann" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images .* the first is Ann/a\.jpg: not a JPEG"):
        load_folder(tmp_path / "empty", 32)


def test_order_is_by_name(make_tree):
    tree = scan_tree(make_tree({"b": 2, "a": 1, "C": 1}))
    assert tree.names == ("C", "a", "b")
    assert [p.name for p in tree.paths] == ["C_0001.jpg", "a_0001.jpg", "b_0001.jpg", "b_0002.jpg"]


def test_progress(make_tree):
    seen: list[tuple[int, int]] = []
    load_folder(make_tree(PEOPLE), 32, report=lambda *args: seen.append(args))
    assert seen[-1] == (10, 10)
