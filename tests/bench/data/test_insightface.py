from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data.decode import decode_image
from bench.data.insightface import InsightfaceOptions, fold_numbers, load_insightface
from bench.data.recordio import RecordWriter
from bench.data.verification_pack import VerificationPack, write_pack
from bench.errors import DataError, MissingError

LIST = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\nBob\t1\t2\nBob\t2\tCy\t1\n"
#: Which photo (seed) each slot of the pack shows, in the order of LIST.
PHOTOS = [100, 101, 100, 201, 200, 201, 201, 300]
SAME = [True, False, True, False]


@pytest.fixture
def make_pack(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Callable[..., Path]:
    def make(
        counts: tuple[int, ...] = (3, 2, 4), photos: list[int] = PHOTOS, same: list[bool] = SAME, name: str = "lfw.bin"
    ) -> Path:
        root = tmp_path / "pack"
        root.mkdir(exist_ok=True)
        with RecordWriter(root / "train.rec") as writer:
            total, key = sum(counts), 1
            writer.write(0, (total + 1.0, total + 1.0 + len(counts)))
            for person, count in enumerate(counts):
                for _ in range(count):
                    writer.write(key, (float(person),), make_jpeg(key))
                    key += 1
            start = 1
            for person, count in enumerate(counts):
                writer.write(key + person, (float(start), float(start + count)))
                start += count
        write_pack(root / name, VerificationPack(tuple(make_jpeg(s) for s in photos), np.array(same)))
        return root

    return make


def test_faces(make_pack, make_jpeg):
    source = load_insightface(make_pack(), 48)
    assert source.name == "insightface"
    assert source.faces.names == ("train:000000", "train:000001", "train:000002")
    assert source.faces.labels.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    assert source.faces.size == 48
    for i in range(9):
        assert torch.equal(source.faces.images[i], decode_image(make_jpeg(i + 1), 48))


@pytest.mark.parametrize("named", [True, False])
def test_victims_are_stored_once_and_pairs_point_at_them(make_pack, make_jpeg, named):
    root = make_pack()
    if named:
        (root / "pairs.txt").write_text(LIST)
    source = load_insightface(root, 112)
    assert source.victims is not None
    assert source.pairs is not None
    assert len(source.victims) == len(set(PHOTOS)) == 5
    assert source.pairs.same.tolist() == SAME
    slots = torch.stack([source.pairs.first, source.pairs.second], dim=1).flatten()
    for slot, seed in zip(slots.tolist(), PHOTOS, strict=True):
        assert torch.equal(source.victims.images[slot], decode_image(make_jpeg(seed), 112))
    people = [source.victims.names[int(source.victims.labels[slot])] for slot in slots]
    if named:
        assert people == [f"lfw:{name}" for name in ("Ann", "Ann", "Ann", "Bob", "Bob", "Bob", "Bob", "Cy")]
        assert source.details["pack_identities_from"] == "pairs.txt"
    else:
        assert people == [f"pack:00000{i}" for i in (0, 0, 0, 1, 1, 1, 1, 2)]
        assert source.details["pack_identities_from"] == "genuine pairs"


@pytest.mark.parametrize(
    "text",
    [
        LIST.replace("2\t1\n", "1\t2\n", 1).replace("Ann\t1\tBob\t2\nBob\t1\t2\n", "Bob\t1\t2\nAnn\t1\tBob\t2\n"),
        "1\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\n",
        # Same counts and flags, but here slots 0 and 2 show different photos, which in the pack are the same bytes ...
        LIST.replace("Bob\t1\t2", "Bob\t2\t3"),
    ],
    ids=["other flags", "other count", "other photos"],
)
def test_a_list_that_is_not_the_packs_own_is_not_used(make_pack, text):
    root = make_pack()
    (root / "pairs.txt").write_text(text)
    source = load_insightface(root, 32)
    assert source.details["pack_identities_from"] == "genuine pairs"
    assert source.victims is not None
    assert source.victims.names[0].startswith("pack:")


def test_a_broken_list_is_an_error(make_pack):
    root = make_pack()
    (root / "pairs.txt").write_text(LIST.replace("Bob\t1\t2", "Bob\tx\t2"))
    with pytest.raises(DataError, match=r"pairs\.txt line 4"):
        load_insightface(root, 32)


def test_identical_bytes_under_two_names_stay_two_images(make_pack):
    photos = list(PHOTOS)
    photos[7] = 100  # Cy's only photo is Ann's first
    root = make_pack(photos=photos)
    (root / "pairs.txt").write_text(LIST)
    source = load_insightface(root, 32)
    assert source.victims is not None
    assert source.pairs is not None
    people = source.victims.labels
    assert torch.equal(people[source.pairs.first] == people[source.pairs.second], source.pairs.same)
    assert source.victims.names[int(people[source.pairs.second[3]])] == "lfw:Cy"


def test_ten_folds_in_order():
    assert np.bincount(fold_numbers(6000)).tolist() == [600] * 10
    assert (np.diff(fold_numbers(6000)) >= 0).all()
    assert np.bincount(fold_numbers(25)).tolist() in ([3, 2] * 5, [2, 3] * 5)
    assert fold_numbers(3).tolist() == [0, 1, 2]


def test_choice_of_pack(make_pack):
    root = make_pack(name="cfp_fp.bin")
    source = load_insightface(root, 32)
    assert source.details["pack"] == "cfp_fp.bin"
    make_pack(name="agedb_30.bin")
    with pytest.raises(MissingError, match=r"several packs.*pack=agedb_30\.bin\|cfp_fp\.bin"):
        load_insightface(root, 32)
    chosen = load_insightface(root, 32, InsightfaceOptions(pack="agedb_30.bin"))
    assert chosen.details["pack"] == "agedb_30.bin"
    make_pack(name="lfw.bin")
    assert load_insightface(root, 32).details["pack"] == "lfw.bin"
    for wrong in ("none.bin", "../pack/lfw.bin"):
        with pytest.raises(MissingError, match=r"has no pack .*it has agedb_30\.bin, cfp_fp\.bin, lfw\.bin"):
            load_insightface(root, 32, InsightfaceOptions(pack=wrong))


def test_limits_on_identities_and_images(make_pack, make_jpeg):
    options = InsightfaceOptions(max_identities=2, max_images_per_identity=2)
    faces = load_insightface(make_pack(), 32, options).faces
    assert faces.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(faces.images[1], decode_image(make_jpeg(2), 32))
    assert torch.equal(faces.images[2], decode_image(make_jpeg(4), 32))


def test_damaged_training_images_are_counted_and_listed(make_pack, make_jpeg):
    root = make_pack()
    data = (root / "train.rec").read_bytes()
    at = data.index(make_jpeg(5))
    (root / "train.rec").write_bytes(data[:at] + b"\0\0\0\0" + data[at + 4 :])
    faces = load_insightface(root, 32).faces
    assert [s.where for s in faces.skipped] == ["train.rec record 5"]
    assert faces.labels.tolist() == [0] * 3 + [1] + [2] * 4


def test_identity_without_usable_images_is_gone(make_pack, make_jpeg):
    root = make_pack((3, 1, 4))
    data = (root / "train.rec").read_bytes()
    at = data.index(make_jpeg(4))
    (root / "train.rec").write_bytes(data[:at] + b"\0\0\0\0" + data[at + 4 :])
    faces = load_insightface(root, 32).faces
    assert faces.names == ("train:000000", "train:000002")
    assert faces.labels.tolist() == [0] * 3 + [1] * 4


def test_damaged_images_of_the_pack_are_fatal(make_pack, make_jpeg):
    root = make_pack()
    images = [make_jpeg(s) for s in PHOTOS]
    images[4] = images[4][:300]
    write_pack(root / "lfw.bin", VerificationPack(tuple(images), np.array(SAME)))
    with pytest.raises(DataError, match=r"lfw\.bin: 1 of its images cannot be used.*the first is image 4: damaged"):
        load_insightface(root, 32)


def test_missing_parts(make_pack, tmp_path):
    with pytest.raises(MissingError, match="--data-root"):
        load_insightface(tmp_path / "none", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no train\.rec"):
        load_insightface(tmp_path / "empty", 32)
    root = make_pack()
    (root / "lfw.bin").unlink()
    with pytest.raises(MissingError, match="no verification pack"):
        load_insightface(root, 32)


def test_one_identity_is_too_few(make_pack):
    with pytest.raises(DataError, match="3 usable images of 1 identities"):
        load_insightface(make_pack((3,)), 32)


def test_without_index_and_property(make_pack):
    root = make_pack()
    with_index = load_insightface(root, 32)
    (root / "train.idx").unlink()
    assert torch.equal(load_insightface(root, 32).faces.images, with_index.faces.images)


def test_progress_covers_both_files(make_pack):
    seen: list[tuple[int, int]] = []
    load_insightface(make_pack(), 32, report=lambda *args: seen.append(args))
    assert seen[-1] == (14, 14)
    assert seen == sorted(seen)


@pytest.mark.realfaces
@pytest.mark.slow
def test_real_faces(real_faces_root):
    source = load_insightface(real_faces_root, 64, InsightfaceOptions(max_identities=20))
    assert source.victims is not None
    assert source.pairs is not None
    assert source.faces.skipped == ()
    assert len(source.faces.names) == 20
    # LFW View 2 shows 7,701 photos of 4,281 people in its 6,000 pairs (Huang et al., 2007).
    assert source.details["pack_identities_from"] == "pairs.txt"
    assert len(source.pairs) == 6000
    assert len(source.victims) == 7701
    assert len(source.victims.names) == 4281
    assert torch.bincount(source.pairs.fold[source.pairs.same]).tolist() == [300] * 10
    people = source.victims.labels
    assert torch.equal(people[source.pairs.first] == people[source.pairs.second], source.pairs.same)
    # Faces, upright and centred: the middle is brighter than the corners on average, and no image is blank.
    pixels = source.victims.images.float()
    assert pixels.flatten(1).std(dim=1).min() > 5
