from __future__ import annotations

import pickle

import pytest
from PIL import Image
from small_sets import PAIRS

from bench.data.tools.pack import pack
from bench.data.tools.verify import Verification, verify
from bench.errors import DataError, MissingError

PEOPLE = {"Ann": 3, "Bob": 2, "Cy": 2, "Dee": 3, "Eve": 2}


def by_place(checked: Verification) -> dict[str, tuple[str, str]]:
    return {finding.where: (finding.severity, finding.reason) for finding in checked.findings}


@pytest.fixture
def packed(make_tree, tmp_path):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    pack(root, tmp_path / "out")
    return tmp_path / "out"


def test_sound_data(make_tree, packed):
    seen: list[tuple[int, int]] = []
    checked = verify(packed, report=lambda *args: seen.append(args))
    assert checked.findings == ()
    assert checked.ok
    assert checked.images == 5 + 8
    assert seen[-1] == (13, 13)
    assert verify(make_tree(PEOPLE, "sound")).findings == ()


def test_images_in_a_folder(make_tree, make_image, make_encoded):
    root = make_tree(PEOPLE)
    (root / "Ann/Ann_0001.jpg").write_bytes((root / "Ann/Ann_0001.jpg").read_bytes()[:-300])
    (root / "Ann/Ann_0002.jpg").write_bytes(make_encoded(make_image(0, (112, 90))))
    (root / "Ann/Ann_0003.jpg").write_bytes(make_encoded(make_image(0, 20)))
    (root / "Bob/Bob_0001.jpg").write_bytes(make_encoded(Image.new("RGB", (112, 112), (9, 9, 9))))
    (root / "Dee/Dee_0002.jpg").write_bytes((root / "Dee/Dee_0001.jpg").read_bytes())
    (root / "Eve/Eve_0001.jpg").write_bytes((root / "Cy/Cy_0001.jpg").read_bytes())
    (root / "Eve/list.txt").write_text("x")
    checked = verify(root)
    places = by_place(checked)
    assert set(places) == {
        *(f"Ann/Ann_000{i}.jpg" for i in (1, 2, 3)),
        *("Bob/Bob_0001.jpg", "Dee/Dee_0002.jpg", "Eve/Eve_0001.jpg", "Eve/list.txt"),
    }
    assert places["Ann/Ann_0001.jpg"][0] == "damaged"
    assert "not square" in places["Ann/Ann_0002.jpg"][1]
    assert "hardly a face" in places["Ann/Ann_0003.jpg"][1]
    assert "blank" in places["Bob/Bob_0001.jpg"][1]
    assert places["Dee/Dee_0002.jpg"][1] == "identical to Dee/Dee_0001.jpg, of the same person"
    assert places["Eve/Eve_0001.jpg"][1] == "identical to Cy/Cy_0001.jpg, although these are Cy and Eve"
    assert sum(severity == "damaged" for severity, _ in places.values()) == 1
    assert not checked.ok


def test_genuine_pair_of_one_image(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    (root / "Ann/Ann_0002.jpg").write_bytes((root / "Ann/Ann_0001.jpg").read_bytes())
    reasons = [finding.reason for finding in verify(root).findings]
    assert "genuine pair 0 is one image twice" in reasons


def test_impostor_pair_of_one_image(make_tree):
    root = make_tree(PEOPLE)
    (root / "pairs.txt").write_text(PAIRS)
    (root / "Bob/Bob_0002.jpg").write_bytes((root / "Ann/Ann_0001.jpg").read_bytes())
    assert "impostor pair 1 is one image twice" in [finding.reason for finding in verify(root).findings]


def test_nobody_with_two_images(make_tree):
    assert by_place(verify(make_tree({"Ann": 1, "Bob": 1})))["."] == ("suspicious", "nobody has two images")


def test_every_damaged_record_is_listed(packed):
    data = bytearray((packed / "train.rec").read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 3] == b"\xff\xd8\xff"]
    for start in (starts[1], starts[3]):
        data[start : start + 4] = bytes(4)
    (packed / "train.rec").write_bytes(data)
    checked = verify(packed)
    damaged = [finding.where for finding in checked.findings if finding.severity == "damaged"]
    assert [where.split(" at ")[0] for where in damaged] == ["train.rec record 2", "train.rec record 4"]
    assert checked.images == 13


def test_one_damaged_file_does_not_hide_another(packed, make_jpeg):
    data = (packed / "train.rec").read_bytes()
    (packed / "train.rec").write_bytes(data[:-2])
    (packed / "lfw.bin").write_bytes(pickle.dumps(([make_jpeg(0), b"x"], [False]), 4))
    places = by_place(verify(packed))
    assert places["train.rec"][0] == "damaged"
    assert "was cut off at" in places["train.rec"][1]
    assert places["lfw.bin image 1"][0] == "damaged"


def test_hostile_pack_is_a_finding(packed):
    (packed / "lfw.bin").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")
    severity, reason = by_place(verify(packed))["lfw.bin"]
    assert severity == "damaged"
    assert "posix.system" in reason


def test_what_the_files_say_of_each_other(packed):
    (packed / "property").write_text("7,112,112")
    (packed / "train.idx").unlink()
    places = by_place(verify(packed))
    assert places["property"] == ("suspicious", "claims 7 identities, train.rec has 2")
    assert "no .idx" in places["train.rec"][1]
    (packed / "property").unlink()
    assert "missing" in by_place(verify(packed))["property"][1]
    (packed / "property").write_text("x")
    assert by_place(verify(packed))["train.rec"][0] == "damaged"


def test_index_that_lacks_records(packed):
    lines = (packed / "train.idx").read_text().splitlines(keepends=True)
    (packed / "train.idx").write_text("".join(lines[:-1]))
    assert by_place(verify(packed)) == {"train.idx": ("suspicious", "disagrees with train.rec on 1 records")}


def test_nothing_there(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        verify(tmp_path / "none")
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match="neither a folder"):
        verify(tmp_path / "x.zip")
    (tmp_path / "empty").mkdir()
    assert not verify(tmp_path / "empty").ok
