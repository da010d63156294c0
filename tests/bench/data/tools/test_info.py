from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_sets import PAIRS, PEOPLE, people, write_folder, write_records, write_shards

from bench.data.tools.info import info
from bench.data.tools.pack import pack
from bench.errors import DataError, MissingError


def test_folder(make_tree, make_image, make_encoded):
    root = make_tree(PEOPLE | {"Dee": 5})
    (root / "pairs.txt").write_text(PAIRS)
    (root / "Ann/notes.txt").write_text("x")
    (root / "Eve/Eve_0001.jpg").write_bytes(make_encoded(make_image(0, (60, 40), "L")))
    (root / "Dee/Dee_0005.jpg").write_bytes(b"rubbish")
    seen: list[tuple[int, int]] = []
    described = info(root, report=lambda *args: seen.append(args))
    assert described.kind == "folder"
    (part,) = described.parts
    assert (part.identities, part.images, part.single_image_identities, part.ignored) == (5, 13, 1, 1)
    assert part.left_out == {"not named like an image (.txt)": 1}
    assert part.images_per_identity == {"min": 1, "q25": 2, "median": 2, "q75": 3, "max": 5}
    assert part.sizes == {"112x112 RGB": 11, "60x40 L": 1, "unreadable": 1}
    assert (part.pairs.pairs, part.pairs.genuine, part.pairs.folds) == (4, 2, 2)
    assert seen[-1] == (13, 13)


def test_insightface_and_its_files(paired, tmp_path):
    pack(paired, out := tmp_path / "out")
    described = info(out)
    assert described.kind == "insightface"
    records, pairs = described.parts
    assert (records.name, records.identities, records.images, records.pairs) == ("train.rec", 2, 3, None)
    assert (pairs.name, pairs.identities, pairs.images) == ("lfw.bin", 3, 8)
    assert (pairs.pairs.pairs, pairs.pairs.genuine) == (4, 2)
    assert info(out / "train.rec").parts == (records,)
    assert info(out / "lfw.bin").parts == (pairs,)
    assert described.model_validate_json(described.model_dump_json()) == described


def test_a_damaged_record_among_others_is_unreadable_alone(make_tree, tmp_path):
    pack(make_tree({"Ann": 3, "Bob": 2}), out := tmp_path / "out")
    (before,) = info(out).parts
    offsets = dict(map(int, line.split()) for line in (out / "train.idx").read_text().splitlines())
    with (out / "train.rec").open("r+b") as file:
        file.seek(offsets[2])
        file.write(bytes(4))  # where the magic number of Ann's second image stands
    (part,) = info(out).parts
    assert (part.images, part.headers_read) == (before.images, before.headers_read) == (5, 5)
    assert part.sizes == {"112x112 RGB": 4, "unreadable": 1}


def test_nothing_there(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        info(tmp_path / "none")
    with pytest.raises(DataError, match="holds no images"):
        info(tmp_path)
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match=r"neither a folder nor a \.rec or \.bin"):
        info(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("write", "held"),
    [
        (lambda root: write_folder(root, people(3, 2), people(2, 2, first=9)), [(10, 4)]),
        (lambda root: write_records(root, people(3, 2), people(2, 2, first=9)), [(6, None), (8, 4)]),
        (lambda root: write_shards(root, people(3, 2)), [(6, None)]),
    ],
    ids=["folder", "insightface", "shards"],
)
def test_headers_are_read_without_torch(tmp_path, write, held):
    words = ["bench", "data", "info", str(write(tmp_path / "set")), "--json"]
    code = f"import sys, bench.cli; sys.argv = {words}\n"
    code += "try: bench.cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert [(part["images"], part["pairs"] and part["pairs"]["pairs"]) for part in parts] == held
