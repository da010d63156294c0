from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from open_source import load_set
from PIL import Image
from records import read_record

from bench.data.decode import decode_image
from bench.data.pairs import read_pairs
from bench.data.recordio import RecordFile, read_property
from bench.data.tools.pack import pack
from bench.data.verification_pack import read_pack
from bench.errors import DataError, UsageError


def test_folder_with_pairs_survives_the_round_trip(paired, tmp_path):
    root = paired
    packed = pack(root, tmp_path / "out")
    assert packed.files == ("train.rec", "train.idx", "property", "lfw.bin", "pairs.txt")
    assert (packed.identities, packed.images, packed.pairs) == (2, 3, 4)
    assert packed.copied == 3 + 6  # all of Dee and Eve, and the six photos in pairs
    before, after = load_set("folder", root, 112), load_set("insightface", tmp_path / "out", 112)
    assert torch.equal(after.faces.images, before.faces.images)
    assert torch.equal(after.faces.labels, before.faces.labels)
    assert after.victims.names == ("lfw:Ann", "lfw:Bob", "lfw:Cy")
    assert torch.equal(after.pairs.same, before.pairs.same)
    for side in ("first", "second"):
        mine, theirs = getattr(after.pairs, side), getattr(before.pairs, side)
        assert torch.equal(after.victims.images[mine], before.victims.images[theirs])
    assert read_pairs(tmp_path / "out/pairs.txt").pairs == read_pairs(root / "pairs.txt").pairs


def test_layout_is_insightfaces(make_tree, tmp_path):
    root = make_tree({"Ann": 2, "Bob": 1, "Cy": 2})
    packed = pack(root, tmp_path / "out")
    assert packed.files == ("train.rec", "train.idx", "property")
    assert read_property(tmp_path / "out/property") == (3, 112, 112)
    file = tmp_path / "out/train.rec"
    assert RecordFile(file).keys.tolist() == list(range(9))
    assert [read_record(file, key)[0] for key in range(9)] == [
        *([6, 9], [0], [0], [1], [2], [2]),
        *([1, 3], [3, 4], [4, 6]),
    ]
    assert read_record(file, 3)[1] == (root / "Bob/Bob_0001.jpg").read_bytes()


def test_what_is_not_a_jpeg_of_the_right_size_is_encoded_anew(make_tree, make_image, make_encoded, tmp_path):
    root = make_tree({"Ann": 1, "Bob": 1})
    (root / "Ann/a.png").write_bytes(make_encoded(make_image(50, 112), "PNG"))
    (root / "Ann/b.jpg").write_bytes(make_encoded(make_image(51, (150, 130)), quality=95))
    (root / "Ann/c.jpg").write_bytes(make_encoded(make_image(52, 112, "L"), quality=95))
    exif = Image.Exif()
    exif[0x0112] = 3
    (root / "Ann/d.jpg").write_bytes(make_encoded(make_image(53, 112), quality=95, exif=exif))
    packed = pack(root, tmp_path / "out")
    assert packed.copied == 2
    for key, file in enumerate(["Ann_0001.jpg", "a.png", "b.jpg", "c.jpg", "d.jpg"], 1):
        _, stored = read_record(tmp_path / "out/train.rec", key)
        assert stored.startswith(b"\xff\xd8")
        expected = decode_image((root / "Ann" / file).read_bytes(), 112).float()
        assert (decode_image(stored).float() - expected).abs().mean() < 2


def test_damaged_images_are_left_out_and_listed(make_tree, tmp_path):
    root = make_tree({"Ann": 2, "Bob": 1, "Cy": 2})
    photo = root / "Bob/Bob_0001.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])  # a JPEG of the right size: it would be copied
    (root / "Cy/notes.txt").write_text("x")
    packed = pack(root, tmp_path / "out")
    assert (packed.identities, packed.images) == (2, 4)
    assert [where for where, _ in packed.skipped] == ["Cy/notes.txt", "Bob/Bob_0001.jpg"]
    assert [read_record(tmp_path / "out/train.rec", key)[0] for key in range(1, 5)] == [[0], [0], [1], [1]]


def test_nothing_is_overwritten_unasked(make_tree, tmp_path):
    root = make_tree({"Ann": 2, "Bob": 2})
    out = tmp_path / "out"
    out.mkdir()
    (out / "property").write_text("mine")
    (out / "keep.me").write_text("mine")
    with pytest.raises(UsageError, match="property exists already"):
        pack(root, out)
    assert sorted(p.name for p in out.iterdir()) == ["keep.me", "property"]
    pack(root, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["keep.me", "property", "train.idx", "train.rec"]
    assert (out / "property").read_text() == "2,112,112"
    assert _leftovers(tmp_path) == []


def test_failures_leave_nothing_behind(make_tree, paired, tmp_path, monkeypatch):
    (paired / "Bob/Bob_0002.jpg").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"pairs\.txt line 3 needs Bob/Bob_0002\.jpg"):
        pack(paired, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert _leftovers(tmp_path) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bench.data.recordio.RecordWriter.write", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        pack(make_tree({"Ann": 2, "Bob": 2}, "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert _leftovers(tmp_path) == []


def test_out_that_cannot_be_made_and_too_few_identities(make_tree, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        pack(make_tree({"Ann": 2, "Bob": 2}), tmp_path / "file" / "out")
    with pytest.raises(DataError, match="leaves 1 identities"):
        pack(make_tree({"Ann": 2}, "alone"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b"])
def test_names_stay_in_the_folder(make_tree, tmp_path, name):
    with pytest.raises(UsageError, match="no name for a verification pack"):
        pack(make_tree({"Ann": 2, "Bob": 2}), tmp_path / "out", name=name)


def test_another_name_and_size(paired, tmp_path):
    assert pack(paired, tmp_path / "out", name="mine", image_size=64).copied == 0
    assert len(read_pack(tmp_path / "out/mine.bin").images) == 8
    assert decode_image(read_record(tmp_path / "out/train.rec", 1)[1]).shape == (3, 64, 64)


def _leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".")]
