from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pytest
import torch
from open_source import load_set, open_source

from bench.data.decode import decode_image
from bench.data.sources.webdataset import find_shards
from bench.data.tools.info import info
from bench.data.tools.verify import verify
from bench.errors import DataError, MissingError


def write_shard(path, members):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path, make_jpeg):
    """Two shards of three samples each; identities 10, 2, 10 and 2, 10, 7."""
    for shard, people in enumerate(((10, 2, 10), (2, 10, 7))):
        members = []
        for i, person in enumerate(people):
            key = f"part.one/{shard}{i:04d}"
            members += [(f"{key}.jpg", make_jpeg(10 * shard + i)), (f"{key}.cls", b"%d\n" % person)]
        write_shard(tmp_path / f"faces-{shard:04d}.tar", members)
    return tmp_path


@pytest.mark.parametrize("how", ["faces-{0000..0001}.tar", "."])
def test_images_and_identities(shards, make_jpeg, how):
    source = open_source("webdataset", shards / how, image_size=48)
    assert (len(source), source.identities) == (6, 3)
    # In the order of the numbers, as the shards' own labels are.
    assert [source.name(k) for k in range(3)] == ["2", "7", "10"]
    assert source.labels.tolist() == [2, 0, 2, 0, 2, 1]
    batch = source.read(np.array([5, 0, 3, 3]))
    assert batch.labels.tolist() == [1, 2, 0, 0]
    for image, seed in zip(batch.images, (12, 0, 10, 10), strict=True):
        assert (image.int() - decode_image(make_jpeg(seed), 48).int()).abs().max() <= 2
    whole = load_set("webdataset", shards / how, 48).faces
    assert whole.names == ("2", "7", "10")
    assert whole.labels.tolist() == source.labels.tolist()
    for image, seed in zip(whole.images, (0, 1, 2, 10, 11, 12), strict=True):
        assert torch.equal(image, decode_image(make_jpeg(seed), 48))


@pytest.mark.parametrize("key", ["label", "cls", "identity", "class"])
def test_identities_in_json(tmp_path, make_jpeg, key):
    long = "x" * 200  # beyond the name field of a tar header
    write_shard(
        tmp_path / "a.tar",
        [
            (f"{long}/1.json", json.dumps({"width": 112, key: "Ann"}).encode("utf-8-sig")),
            (f"{long}/1.JPG", make_jpeg(0)),
            (f"{long}/2.seg.png", make_jpeg(1)),
            (f"{long}/2.json", json.dumps({key: 5}).encode()),
        ],
    )
    source = open_source("webdataset", tmp_path / "a.tar")
    assert [source.name(label) for label in source.labels] == ["Ann", "5"]
    assert len(source.read(np.arange(2)).images) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.cls", b"0")], r"a\.tar: sample '1' at offset 0 has 0 images, not one"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"0")], "has 2 images"),
        ([("1.jpg", b"x"), ("2.cls", b"0")], "neither .cls nor .json"),
        ([("1.jpg", b"x"), ("1.cls", b" \n")], r"its \.cls says no identity"),
        ([("1.jpg", b"x"), ("1.cls", b"\xff")], r"its \.cls cannot be read"),
        ([("1.jpg", b"x"), ("1.json", b"{")], r"its \.json cannot be read"),
        ([("1.jpg", b"x"), ("1.json", b'{"name": 1, "label": true}')], r"its \.json says no identity"),
        ([("1.jpg", b"x"), ("1.jpg", b"x")], "at offset 1024 is there twice"),
        ([], "holds no samples"),
    ],
)
def test_samples_that_are_none(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        open_source("webdataset", write_shard(tmp_path / "a.tar", members))


def test_a_shard_that_was_cut_off_or_is_compressed(shards):
    path = shards / "faces-0001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    damaged = r"faces-0001\.tar is damaged or truncated"
    for content, message in (
        (whole[: last.offset_data - 700], rf"{damaged} behind offset \d+"),  # within an image
        (whole[: last.offset], r"faces-0001\.tar is truncated: it ends at offset \d+ without the end mark"),
        (gzip.compress(whole), r"is no plain tar, .* but compressed \(gzip\): unpack it first \(gzip -dc"),
        (lzma.compress(whole), r"faces-0001\.tar is no plain tar, .* but compressed \(xz\)"),
        (bz2.compress(whole), r"faces-0001\.tar is no plain tar, .* but compressed \(bzip2\)"),
        (b"", damaged),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_source("webdataset", shards)


@pytest.mark.parametrize("name", ["faces.tar.gz", "faces.tgz"])
def test_a_folder_of_compressed_shards(shards, name):
    whole = (shards / "faces-0001.tar").read_bytes()
    for shard in shards.glob("*.tar"):
        shard.unlink()
    (shards / name).write_bytes(gzip.compress(whole))
    for path in (shards, shards / name):
        with pytest.raises(DataError, match=r"is no plain tar, .* but compressed \(gzip\)"):
            open_source("webdataset", path)
        with pytest.raises(DataError, match=r"is no plain tar, .* but compressed \(gzip\)"):
            info(path)


def test_names_with_dots_of_their_own(tmp_path, make_jpeg):
    people = ["St.Clair", "St.Clair", "Ann", "O.J.Doe", "Ann", "O.J.Doe"]
    members = []
    for number, person in enumerate(people):
        key = f"v1.0/{person}_{number:04d}"
        members += [(f"{key}.jpg", make_jpeg(number)), (f"{key}.cls", person.encode())]
    write_shard(tmp_path / "a.tar", members)
    source = open_source("webdataset", tmp_path / "a.tar")
    assert [source.name(label) for label in source.labels] == people
    assert len(source.read(np.arange(6)).images) == 6
    assert "last dot" in source.notes[0]
    assert load_set("webdataset", tmp_path / "a.tar").notes == source.notes
    assert info(tmp_path / "a.tar").parts[0].notes == source.notes
    write_shard(tmp_path / "a.tar", [*members, ("x.1.jpg", b"x")])  # neither way
    with pytest.raises(DataError, match=r"a\.tar: sample 'v1\.0/St' at offset 0 has 2 images, not one"):
        open_source("webdataset", tmp_path / "a.tar")


def test_a_shard_that_is_cut_off_later(shards):
    source = open_source("webdataset", shards)
    (shards / "faces-0001.tar").write_bytes((shards / "faces-0001.tar").read_bytes()[:2000])
    source.read(np.arange(3))
    with pytest.raises(DataError, match=r"faces-0001\.tar is truncated: it has 2000 bytes"):
        source.read(np.array([0, 5]))


def test_which_shards_are_meant(shards):
    assert len(open_source("webdataset", shards / "faces-0001.tar")) == 3
    assert find_shards(shards / "faces-{0000..0001}.tar") == sorted(shards.glob("*.tar"))
    (shards / "none").mkdir()
    for wrong, message in (
        ("faces-{0000..0003}.tar", r"faces-0002\.tar does not exist \(2 of 4 shards are missing\)"),
        ("faces-{0003..0001}.tar", "names no shard"),
        ("none", "has no tar shards"),
    ):
        with pytest.raises(MissingError, match=message):
            find_shards(shards / wrong)


def test_a_whole_set_without_the_images_that_are_damaged(tmp_path, make_jpeg):
    people = [("1", b"no", b"Ann"), ("2", make_jpeg(0), b"Bob"), ("3", make_jpeg(1), b"Bob")]
    members = [(f"{key}.{kind}", data) for key, image, name in people for kind, data in (("jpg", image), ("cls", name))]
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"a\.tar image at offset 512: not a JPEG"):
        open_source("webdataset", tmp_path).read(np.arange(2))
    assert open_source("webdataset", tmp_path, on_error="skip").read(np.arange(2)).rows.tolist() == [1]
    faces = load_set("webdataset", tmp_path).faces
    assert faces.names == ("Bob",)
    assert [entry.where for entry in faces.skipped] == ["a.tar image at offset 512"]
    write_shard(tmp_path / "a.tar", members[:4])
    with pytest.raises(DataError, match=r"nobody in .* has two usable images \(1 images skipped\)"):
        load_set("webdataset", tmp_path)


def test_info_and_verify_read_shards(shards, make_jpeg):
    (part,) = info(shards).parts
    assert (info(shards).kind, part.images, part.identities) == ("tar shards", 6, 3)
    assert part.sizes == {"112x112 RGB": 6}
    assert verify(shards / "faces-{0000..0001}.tar").ok
    write_shard(
        shards / "faces-0002.tar", [("1.jpg", b"no"), ("1.cls", b"2"), ("2.jpg", make_jpeg(0)), ("2.cls", b"7")]
    )
    findings = verify(shards).findings
    assert [(entry.severity, entry.where) for entry in findings] == [
        ("damaged", "faces-0002.tar image at offset 512"),
        ("suspicious", "faces-0002.tar image at offset 2560"),
    ]
    (shards / "faces-0002.tar").write_bytes(b"nonsense" * 200)
    assert [entry.severity for entry in verify(shards).findings] == ["damaged"]
