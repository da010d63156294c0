from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from open_source import load_set, open_source
from small_sets import PAIRS, PEOPLE

from bench.data.decode import decode_image
from bench.data.loaders import load
from bench.errors import DataError, MissingError


@pytest.fixture
def root(make_tree):
    return make_tree(PEOPLE)


def test_images_come_in_the_order_of_their_names(make_tree):
    root = make_tree({"b": 2, "a": 1, "C": 1})
    source = open_source("folder", root, image_size=48)
    files = ["C/C_0001.jpg", "a/a_0001.jpg", "b/b_0001.jpg", "b/b_0002.jpg"]
    assert [source.where(i) for i in range(len(source))] == files
    assert [source.name(k) for k in range(source.identities)] == ["C", "a", "b"]
    batch = source.read(np.array([3, 0]))
    assert batch.labels.tolist() == [2, 0]
    for image, row in zip(batch.images, (3, 0), strict=True):
        expected = decode_image((root / files[row]).read_bytes(), 48)
        assert (image.int() - expected.int()).abs().max() <= 2


def test_an_image_that_went_or_broke(root):
    source = open_source("folder", root, image_size=32)
    (root / "Ann/Ann_0002.jpg").unlink()
    (root / "Bob/Bob_0001.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"Ann/Ann_0002\.jpg: not a regular file.*on_error=skip"):
        source.read(np.arange(6))
    with pytest.raises(DataError, match=r"Bob/Bob_0001\.jpg: not a JPEG"):
        source.read(np.array([3]))
    batch = source.reading("skip").read(np.arange(5))
    assert batch.rows.tolist() == [0, 2, 4]
    assert batch.labels.tolist() == [0, 0, 1]
    assert [entry.where for entry in batch.skipped] == ["Ann/Ann_0002.jpg", "Bob/Bob_0001.jpg"]


def test_without_pairs(root):
    source = load_set("folder", root)
    assert (source.name, source.victims, source.pairs) == ("folder", None, None)
    assert source.faces.names == tuple(PEOPLE)
    assert source.faces.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert torch.equal(source.faces.images[4], decode_image((root / "Bob/Bob_0002.jpg").read_bytes(), 32))
    assert source.faces.skipped == ()
    expected = decode_image((root / "Ann/Ann_0001.jpg").read_bytes(), 32, crop=0.5)
    assert torch.equal(load_set("folder", root, crop=0.5).faces.images[0], expected)


@pytest.mark.parametrize("damaged", [False, True])
def test_people_in_pairs_are_the_victims(paired, damaged):
    if damaged:  # an image that no pair needs, before the others
        (paired / "Ann/Ann_0000.jpg").write_bytes(b"not an image")
    source = load_set("folder", paired)
    assert source.faces.names == ("Dee", "Eve")
    assert source.victims.names == ("Ann", "Bob", "Cy")
    assert len(source.victims) == 7  # all their images, not only those in pairs
    assert [entry.where for entry in source.victims.skipped] == ["Ann/Ann_0000.jpg"] * damaged
    assert source.pairs.same.tolist() == [True, False, True, False]
    assert source.pairs.fold.tolist() == [0, 0, 1, 1]
    for slot, file in [
        (source.pairs.first[1], "Ann/Ann_0001.jpg"),
        (source.pairs.second[1], "Bob/Bob_0002.jpg"),
        (source.pairs.second[3], "Bob/Bob_0001.jpg"),
    ]:
        assert torch.equal(source.victims.images[slot], decode_image((paired / file).read_bytes(), 32))
    people = source.victims.labels
    assert torch.equal(people[source.pairs.first] == people[source.pairs.second], source.pairs.same)
    assert load_set("folder", paired, use_pairs=False).victims is None


def test_view_1_lists_are_cut_into_folds(make_tree):
    root = make_tree({"Ann": 30, "Bob": 2, "Dee": 2, "Eve": 2})
    genuine = "".join(f"Ann\t{i}\t{i + 1}\n" for i in range(1, 21))
    impostor = "".join(f"Ann\t{i}\tBob\t1\n" for i in range(1, 21))
    (root / "pairs.txt").write_text(f"20\n{genuine}{impostor}")
    pairs = load_set("folder", root, 16).pairs
    assert torch.bincount(pairs.fold[pairs.same]).tolist() == [2] * 10
    assert torch.bincount(pairs.fold[~pairs.same]).tolist() == [2] * 10


def test_numbers_by_the_end_of_the_name(paired):
    (paired / "Bob/Bob_0002.jpg").rename(paired / "Bob/photo-2.jpeg")
    assert load_set("folder", paired).pairs is not None
    (paired / "Bob/other2.png").write_bytes((paired / "Bob/photo-2.jpeg").read_bytes())
    with pytest.raises(DataError, match="line 3 names image 2 of 'Bob', and 2 files answer to that"):
        load_set("folder", paired)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS.replace("Cy\t1\t2", "Zed\t1\t2"), r"line 4 names 'Zed', who has no folder .*\(there is Ann, Bob, Cy\)"),
        (PAIRS.replace("Cy\t1\t2", "Ane\t1\t2"), r"line 4 names 'Ane', who has no folder .*\(there is Ann\)"),
        (PAIRS.replace("Bob\t2", "Bob\t9"), r"names image 9 of 'Bob', which is not there: wanted Bob_0009\.\*"),
        ("1\nAnn\t1\t2\n", "line 1"),
        ("2\nAnn\t1\t2\nDee\t1\t2\nBob\t1\tCy\t1\nBob\t1\tDee\t1\n", r"all but 1 of the people.*at least 2 others"),
    ],
)
def test_pairs_that_do_not_fit(root, text, message, stream):
    (root / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_set("folder", root, stream=stream)


def test_a_list_whose_files_are_numbered_otherwise_says_which_are_there(paired):
    for file in paired.glob("Bob/*.jpg"):
        file.rename(file.with_stem(f"{file.stem}_0"))
    message = r"line 3 names image 2 of 'Bob', .*ends in 2 \(there is Bob/Bob_0002_0\.jpg, Bob/Bob_0001_0\.jpg\)"
    with pytest.raises(DataError, match=message):
        load_set("folder", paired)


def test_accents_in_either_form(make_tree):
    root = make_tree({"Zoe\u0308": 2, "Ann": 2, "Bob": 2, "Cy": 2})  # as macOS stores it
    (root / "pairs.txt").write_bytes("\ufeff1\r\nZo\u00eb\t1\t2\r\nAnn\t1\tZo\u00eb\t2\r\n".encode())
    assert load_set("folder", root).pairs.same.tolist() == [True, False]


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_image_that_a_pair_needs(paired, stream):
    (paired / "Bob/Bob_0002.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"pairs\.txt line 3 needs Bob/Bob_0002\.jpg, which cannot be used: not a JPEG"):
        load_set("folder", paired, stream=stream)


def test_what_is_skipped_is_listed(root, make_jpeg):
    (root / "Ann/notes.txt").write_text("x")
    (root / "Ann/inner").mkdir()
    (root / "Ann/.hidden.jpg").write_text("x")
    (root / ".hidden").mkdir()
    (root / ".hidden/x.jpg").write_bytes(b"no")
    (root / "empty").mkdir()
    (root / "stray.jpg").write_bytes(make_jpeg(0))
    (root / "README").write_text("x")
    (root / "Bob/Bob_0001.jpg").write_bytes(make_jpeg(0)[:500])
    (root / "Cy/Cy_0001.jpg").unlink()
    (root / "Cy/Cy_0001.jpg").mkdir()
    (root / "Eve/Eve_0001.jpg").write_bytes(b"x")
    faces = load_set("folder", root).faces
    reasons = {entry.where: entry.reason for entry in faces.skipped}
    damaged = {"Bob/Bob_0001.jpg", "Cy/Cy_0001.jpg", "Eve/Eve_0001.jpg"}
    assert set(reasons) == {"Ann/notes.txt", "Ann/inner", "stray.jpg", *damaged}
    assert "not named like an image" in reasons["Ann/notes.txt"]
    assert "regular file" in reasons["Cy/Cy_0001.jpg"]
    assert len(faces) == 7
    assert faces.names == ("Ann", "Bob", "Cy", "Dee")  # who loses all images is gone
    assert {entry.where for entry in load_set("folder", root, stream=True).faces.skipped} == set(reasons) - damaged


@pytest.mark.parametrize("suffix", [".pgm", ".ppm", ".tif", ".TIFF", ".gif", ".webp", ".jfif", ".JPG", "", ".img"])
def test_images_of_any_suffix_and_none(make_tree, make_image, suffix):
    root = make_tree(dict.fromkeys("abcd", 3))
    kinds = {".pgm": "PPM", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".webp": "WEBP"}
    for seed, file in enumerate(sorted(root.glob("*/*.jpg"))):
        file.unlink()
        image = make_image(seed, 40, "L" if suffix == ".pgm" else "RGB")
        image.save(file.with_suffix(suffix), kinds.get(suffix.lower(), "JPEG"))
    (root / "a/notes.txt").write_text("x")
    source = load_set("folder", root)
    assert source.faces.labels.tolist() == [label for label in range(4) for _ in range(3)]
    assert [entry.where for entry in source.faces.skipped] == ["a/notes.txt"]
    assert len(source.notes) == (suffix in ("", ".img"))
    expected = decode_image((root / f"a/a_0001{suffix}").read_bytes(), 32)
    assert torch.equal(source.faces.images[0], expected)


def nest(root, *, above=(), below=("s1", "s2")):
    """Move the images of a folder of people one folder deeper, or the people."""
    for file in sorted(root.glob("*/*.jpg")):
        number = int(file.stem[-1])
        part = [above[number % len(above)]] if above else []
        folder = root.joinpath(*part, file.parent.name, *([below[number % len(below)]] if below else []))
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    for folder in list(root.iterdir()):
        if above and folder.name not in above:
            folder.rmdir()
    return root


def test_sessions_of_a_person(make_tree, make_jpeg):
    root = nest(make_tree({"Ann": 4, "Bob": 4, "Cy": 4}))
    (root / "Ann/s1/notes.txt").write_text("x")
    (root / "pairs.txt").write_text("1\nAnn\t1\t2\nAnn\t1\tAnn\t2\n")
    source = load_set("folder", root, use_pairs=False)
    assert source.faces.names == ("Ann", "Bob", "Cy")
    assert source.faces.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(source.faces.images[0], decode_image((root / "Ann/s1/Ann_0002.jpg").read_bytes(), 32))
    assert [entry.where for entry in source.faces.skipped] == ["Ann/s1/notes.txt"]
    assert "two folders down" in source.notes[0]
    (root / "Bob/x.jpg").write_bytes(make_jpeg(77))  # from here on images are where they belong
    with pytest.raises(DataError, match=r"nobody in .* has two usable images"):
        load_set("folder", root, use_pairs=False)
    nested = load_set("folder", root, use_pairs=False, nested=True).faces
    assert torch.equal(nested.images, source.faces.images)
    assert {entry.where for entry in nested.skipped} == {"Ann/s1/notes.txt", "Bob/x.jpg"}


@pytest.mark.parametrize("above", [("train", "val"), ("Train", "TEST"), ("male", "female"), ("faces",)])
def test_parts_of_a_data_set_are_no_people(make_tree, above):
    root = nest(make_tree(dict.fromkeys("abcde", 2)), above=above, below=())
    with pytest.raises(DataError, match=r"images two folders down.*point --data-root at one of these.*nested=true"):
        load_set("folder", root)


def test_parts_without_people(make_tree):
    root = make_tree({"train": 3, "val": 3})
    with pytest.raises(DataError, match=r"has images in train, val, which are no people"):
        load_set("folder", root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jpg", "b.jpg"], r"found 2 \.jpg beside the identity folders; give each person a folder of their own"),
        (["a/1.heic", "a/2.heic"], r"found 2 \.heic one folder down; convert them"),
        (["x/y/a/1.jpg", "x/README"], r"found 1 .* folders down.*; point --data-root at the folder of people"),
        (["a/1", "b.txt"], r"found 1 \.txt beside the identity folders, 1 without suffix one folder down"),
        ([".git/a/b.jpg"], "it holds no files"),
        (["train.rec", "property"], r"found 1 \.rec beside the identity folders, .*; use --dataset insightface"),
        (["a-0000.tar"], "use --dataset webdataset"),
    ],
)
def test_what_was_found_where_images_are_not(tmp_path, files, message):
    for file in files:
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / file).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"set holds no images where they are looked for, set/<identity>.*{message}"):
        load_set("folder", tmp_path / "set")


def test_links_that_lead_nowhere_or_in_circles(root):
    (root / "gone").symlink_to(root / "nowhere")
    (root / "Ann/gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "Bob/again").symlink_to(root)
    loaded = load_set("folder", root).faces
    reasons = {entry.where: entry.reason for entry in loaded.skipped}
    assert reasons["gone"].startswith("neither a file nor a folder")
    assert reasons["Ann/gone.jpg"] == "not a regular file"
    assert reasons["Bob/again"] == "a folder within an identity"
    assert len(loaded) == 10


def test_awkward_names(make_tree):
    awkward = ["line\nbreak", "Zoë Ünal", "日本", "a b", "-rf"]
    root = make_tree(dict.fromkeys(awkward, 2))
    raw = Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe"))
    try:
        raw.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (raw / "x.jpg").write_bytes(b"not an image")
    odd = root / "a b" / os.fsdecode(b"\xff\xfe.jpg")
    odd.write_bytes((root / "a b/a b_0001.jpg").read_bytes())
    faces = load_set("folder", root).faces
    assert set(faces.names) == {"line\\nbreak", "Zoë Ünal", "日本", "a b", "-rf"}
    assert len(faces) == 11
    assert [entry.where for entry in faces.skipped] == ["\\udcff\\udcfe/x.jpg"]
    for name in (*faces.names, faces.skipped[0].where):
        assert name.encode()  # can be written to a result


def test_empty_missing_and_hopeless(make_tree, tmp_path):
    with pytest.raises(MissingError, match="is not a folder"):
        load_set("folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    for fill in (lambda: None, (tmp_path / "empty/Ann").mkdir):
        fill()
        with pytest.raises(DataError, match="holds no images"):
            load_set("folder", tmp_path / "empty")
    (tmp_path / "empty/Ann/a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images .* the first is Ann/a\.jpg: not a JPEG"):
        load_set("folder", tmp_path / "empty")
    with pytest.raises(DataError, match=r"nobody in .* has two usable images"):
        load_set("folder", make_tree({"Ann": 1, "Bob": 1}, "singles"))


def test_progress_covers_victims_and_faces(paired):
    seen: list[tuple[int, int]] = []
    load("folder", data_root=paired, image_size=32, seed=0, report=lambda *args: seen.append(args))
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)
