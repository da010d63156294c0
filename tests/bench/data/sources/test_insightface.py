from __future__ import annotations

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from big_records import small_jpeg, write_big_records
from open_source import load_set

from bench.data.decode import decode_image
from bench.data.encoded import IdentityView
from bench.data.recordio import MAGIC, RecordWriter
from bench.data.sources.insightface import RecordIOSource
from bench.data.stream.loader import StreamLoader
from bench.data.stream.sampler import EpochOrder
from bench.data.verification_pack import VerificationPack, write_pack
from bench.errors import DataError, MissingError

SIZE = 32
LIST = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\nBob\t1\t2\nBob\t2\tCy\t1\n"
#: Which photo (seed) each slot of the pack shows, in the order of LIST.
PHOTOS = [100, 101, 100, 201, 200, 201, 201, 300]
SAME = [True, False, True, False]


@pytest.fixture
def pack(tmp_path, make_jpeg):
    """Three people (0, 1, 2) with 3, 2 and 4 images, and a verification pack beside them."""

    def write(
        labels=(0, 0, 0, 1, 1, 2, 2, 2, 2),
        ranges=((1, 4), (4, 6), (6, 10)),
        header=None,
        payload=make_jpeg,
        photos=PHOTOS,
        name="lfw.bin",
    ):
        with RecordWriter(tmp_path / "train.rec") as writer:
            images = len(labels)
            writer.write(0, header or (images + 1.0, images + 1.0 + len(ranges)))
            for key, label in enumerate(labels, 1):
                writer.write(key, (float(label),), payload(key, SIZE))
            for key, pair in enumerate(ranges, images + 1):
                writer.write(key, tuple(map(float, pair)))
        write_pack(tmp_path / name, VerificationPack(tuple(make_jpeg(s, SIZE) for s in photos), np.array(SAME)))
        return tmp_path

    return write


def source_of(root):
    return RecordIOSource(root / "train.rec", SIZE)


class TestTrainingImages:
    @pytest.mark.parametrize("index", [True, False])
    def test_images_and_labels_are_those_of_the_file(self, pack, make_jpeg, index):
        root = pack()
        if not index:
            (root / "train.idx").unlink()
        source = source_of(root)
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
        assert (len(source), source.identities, source.name(2)) == (9, 3, "train:000002")
        rows = np.array([7, 0, 3, 3, 8])
        batch = source.read(rows)
        expected = torch.stack([decode_image(make_jpeg(row + 1, SIZE)) for row in rows.tolist()])
        assert (batch.images.int() - expected.int()).abs().max() <= 2
        assert batch.labels.tolist() == source.labels[rows].tolist()
        assert batch.rows.tolist() == rows.tolist()
        assert batch.skipped == ()

    @pytest.mark.parametrize("size", [SIZE, 48])
    def test_memory_is_the_stream_decoded_whole(self, pack, make_jpeg, size):
        source = load_set("insightface", pack(), size)
        assert (source.name, source.faces.names) == ("insightface", tuple(f"train:00000{i}" for i in range(3)))
        assert source.faces.labels.tolist() == [0] * 3 + [1] * 2 + [2] * 4
        expected = [decode_image(make_jpeg(key, SIZE), size) for key in range(1, 10)]
        assert torch.equal(source.faces.images, torch.stack(expected))

    def test_labels_need_not_be_consecutive(self, pack):
        source = source_of(pack(labels=(7, 7, 7, 4, 4, 9, 9, 9, 9)))
        assert source.labels.tolist() == [1, 1, 1, 0, 0, 2, 2, 2, 2]
        assert [source.name(k) for k in range(3)] == ["train:000004", "train:000007", "train:000009"]
        assert source.read(np.array([0, 3])).labels.tolist() == [1, 0]

    @pytest.mark.parametrize("ranges", [(), ((1, 4), (4, 6)), ((1, 4), (5, 10), (2, 3))], ids=["none", "short", "gaps"])
    def test_ranges_that_do_not_share_out_the_images_are_not_believed(self, pack, ranges):
        assert source_of(pack(ranges=ranges)).labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]

    def test_an_image_that_is_not_its_ranges_is_refused_when_read(self, pack):
        root = pack(labels=(0, 0, 0, 1, 1, 2, 0, 2, 2))
        source = source_of(root)
        source.read(np.array([0, 3, 5]))
        with pytest.raises(DataError, match=r"train\.rec record 7 at offset \d+ is of identity 0, but .* says 2"):
            source.read(np.array([6]))
        with pytest.raises(DataError, match="is of identity 0, but"):
            load_set("insightface", root)

    def test_a_header_beyond_what_float32_counts(self, pack):
        """Over 2**24 images its numbers are rounded: images are told by their size, and labels by their headers."""
        source = source_of(pack(header=(2.0**24 + 2, 2.0**24 + 6), ranges=((1, 5), (5, 6), (6, 9))))
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ((float("nan"), 3.0), "claims the image range nan to"),
            ((0.0, 3.0), "claims the image range 0.0 to 3.0"),
            ((12.0, 9.0), "claims the image range"),
            ((17.0, 17.0), "promises images 1 to 16, 4 of them are missing, the first is 13"),
        ],
    )
    def test_a_header_that_cannot_be(self, pack, header, message):
        with pytest.raises(DataError, match=message):
            source_of(pack(header=header))

    @pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 2.5])
    def test_identities_are_whole_numbers(self, pack, label):
        with pytest.raises(DataError, match=r"record 5 at offset \d+ has the identity .*, which is no whole number"):
            source_of(pack(labels=(0, 0, 0, 1, label), ranges=()))

    def test_records_without_a_header_and_with_sparse_keys(self, tmp_path, make_jpeg):
        with RecordWriter(tmp_path / "train.rec") as writer:
            for key, label in ((30, 5.0), (7, 6.0), (400, 5.0)):
                writer.write(key, (label, 0.5), make_jpeg(key, SIZE))  # labels behind the header
        source = source_of(tmp_path)
        assert source.labels.tolist() == [1, 0, 0]  # by key: 7, 30, 400
        assert "record 30 at offset 0" in source.where(1)
        image = source.read(np.array([2])).images[0]
        assert (image.int() - decode_image(make_jpeg(400, SIZE)).int()).abs().max() <= 2

    def test_a_record_in_several_parts(self, pack, make_jpeg):
        magic = struct.pack("<I", MAGIC)

        def behind_the_end(key, size):  # decoders stop at the end mark; the writer splits at an aligned magic number
            data = make_jpeg(key, size)
            return data + bytes(-len(data) % 4) + magic + b"tail" if key % 2 else data

        root = pack(payload=behind_the_end)
        assert (root / "train.rec").read_bytes().count(magic) == 13 + 5  # five parts more than records
        batch = source_of(root).read(np.arange(9))
        for image, key in zip(batch.images, range(1, 10), strict=True):
            assert (image.int() - decode_image(make_jpeg(key, SIZE)).int()).abs().max() <= 2

    def test_some_identities_only(self, pack):
        everyone = IdentityView.everything(source_of(pack()))
        view = everyone.of_identities(np.array([2, 0]))
        assert view.labels.tolist() == [1, 1, 1, 0, 0, 0, 0]
        assert (len(view), view.identities, view.name(0), view.name(1)) == (7, 2, "train:000002", "train:000000")
        batch = view.read(np.array([6, 1]))
        assert batch.labels.tolist() == [0, 1]
        assert batch.rows.tolist() == [6, 1]
        assert torch.equal(batch.images, everyone.read(np.array([8, 1])).images)
        for wrong, message in (([3], "0 to 2"), ([1, 1], "twice")):
            with pytest.raises(ValueError, match=message):
                everyone.of_identities(np.array(wrong))

    def test_a_source_can_be_sent_to_a_process(self, pack):
        source = pickle.loads(pickle.dumps(source_of(pack())))
        assert source.read(np.array([4])).labels.tolist() == [1]

    def test_limits_on_identities_and_images(self, pack, make_jpeg):
        faces = load_set("insightface", pack(), max_identities=2, max_images_per_identity=2).faces
        assert faces.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(faces.images[1], decode_image(make_jpeg(2, SIZE)))
        assert torch.equal(faces.images[2], decode_image(make_jpeg(4, SIZE)))

    def test_one_identity_is_too_few(self, pack):
        with pytest.raises(DataError, match="3 usable images of 1 identities"):
            load_set("insightface", pack(labels=(0, 0, 0), ranges=((1, 4),)))


def damage(root, key, change):
    offsets = dict(np.loadtxt(root / "train.idx", dtype=np.int64).tolist())
    data = bytearray((root / "train.rec").read_bytes())
    change(data, offsets[key])
    (root / "train.rec").write_bytes(data)
    return offsets[key]


def spoil(data, at):
    data[at + 32 + 200 : at + 32 + 204] = b"\xff\xd9\xff\xd9"  # the picture ends early
    data[at + 32 : at + 34] = b"no"


class TestDamage:
    def test_a_damaged_record_is_named_with_its_offset(self, pack):
        root = pack()
        offset = damage(root, 5, lambda data, at: data.__setitem__(slice(at, at + 4), b"\0\0\0\0"))
        source, message = source_of(root), rf"train\.rec record 5 at offset {offset} is damaged: no record starts here"
        source.read(np.array([0, 1, 5]))
        with pytest.raises(DataError, match=message):
            source.read(np.array([0, 4]))
        with pytest.raises(DataError, match=message):
            load_set("insightface", root)

    def test_a_file_that_is_cut_off_while_it_is_read(self, pack):
        root = pack()
        source = source_of(root)
        (root / "train.rec").write_bytes((root / "train.rec").read_bytes()[:3000])
        with pytest.raises(DataError, match=r"train\.rec is truncated: it has 3000 bytes"):
            source.read(np.array([8]))

    def test_an_image_that_cannot_be_decoded(self, pack):
        root = pack()
        offset = damage(root, 4, spoil)
        source, rows, where = source_of(root), np.array([2, 3, 4]), f"train.rec record 4 at offset {offset}"
        with pytest.raises(DataError, match=rf"{where}: not a JPEG.*on_error=skip"):
            source.read(rows)
        batch = source.reading("skip").read(rows)
        assert batch.rows.tolist() == [2, 4]
        assert batch.labels.tolist() == [0, 1]
        assert len(batch.images) == 2
        assert [entry.where for entry in batch.skipped] == [where]
        faces = load_set("insightface", root).faces
        assert [entry.where for entry in faces.skipped] == [where]
        assert faces.labels.tolist() == [0] * 3 + [1] + [2] * 4

    def test_identity_without_usable_images_is_gone(self, pack):
        root = pack(labels=(0, 0, 0, 1, 2, 2), ranges=((1, 4), (4, 5), (5, 7)))
        damage(root, 4, spoil)
        faces = load_set("insightface", root).faces
        assert faces.names == ("train:000000", "train:000002")
        assert faces.labels.tolist() == [0] * 3 + [1] * 2

    @pytest.mark.parametrize("stream", [False, True])
    def test_damaged_images_of_the_pack_are_fatal(self, pack, make_jpeg, stream):
        root = pack()
        images = [make_jpeg(s) for s in PHOTOS]
        images[4] = images[4][:300]
        write_pack(root / "lfw.bin", VerificationPack(tuple(images), np.array(SAME)))
        with pytest.raises(
            DataError, match=r"lfw\.bin pair 2 needs lfw\.bin image 4, which cannot be used: damaged header"
        ):
            load_set("insightface", root, stream=stream)

    def test_missing_parts(self, pack, tmp_path):
        with pytest.raises(MissingError, match="--data-root"):
            load_set("insightface", tmp_path / "none")
        with pytest.raises(MissingError, match=r"no train\.rec"):
            load_set("insightface", tmp_path)
        with RecordWriter(tmp_path / "train.rec") as writer:
            writer.write(0, (1.0, 1.0))
        with pytest.raises(DataError, match="holds no image"):
            source_of(tmp_path)
        (tmp_path / "train.rec").unlink()
        pack(name="lfw.bin")
        (tmp_path / "train.rec").unlink()
        with pytest.raises(MissingError, match=r"no train\.rec but a verification pack, and nobody else to learn from"):
            load_set("insightface", tmp_path)

    @pytest.mark.parametrize("stream", [False, True])
    def test_without_a_pack_everyone_is_shared_out(self, pack, stream):
        root = pack()
        alone = load_set("insightface", root / "train.rec", stream=stream)
        assert (alone.victims, alone.pairs, alone.faces.identities) == (None, None, 3)
        assert load_set("insightface", root / "train.rec", pack="lfw.bin").victims is not None
        (root / "lfw.bin").unlink()
        for name in ("train", "other"):
            for kind in (".rec", ".idx"):
                next(root.glob(f"*{kind}")).rename(root / f"{name}{kind}")
            source = load_set("insightface", root, stream=stream)
            assert (source.victims, source.pairs, len(source.faces)) == (None, None, 9)
        with pytest.raises(MissingError, match=r"has no pack 'lfw\.bin' \(it has none\)"):
            load_set("insightface", root, pack="lfw.bin")
        (root / "more.rec").touch()
        with pytest.raises(MissingError, match=r"several record files and no train\.rec: .*more\.rec, other\.rec"):
            load_set("insightface", root)

    def test_an_index_that_lacks_images(self, pack):
        root = pack()
        lines = (root / "train.idx").read_text().splitlines(keepends=True)
        (root / "train.idx").write_text("".join(lines[:4] + lines[6:]))
        with pytest.raises(DataError, match=r"train\.idx lacks 2 of the records of train\.rec \(delete the index"):
            source_of(root)


class TestVerificationPack:
    @pytest.mark.parametrize("named", [True, False])
    def test_victims_are_stored_once_and_pairs_point_at_them(self, pack, make_jpeg, named):
        root = pack()
        if named:
            (root / "pairs.txt").write_text(LIST)
        source = load_set("insightface", root)
        assert len(source.victims) == len(set(PHOTOS)) == 5
        assert source.pairs.same.tolist() == SAME
        slots = torch.stack([source.pairs.first, source.pairs.second], dim=1).flatten()
        for slot, seed in zip(slots.tolist(), PHOTOS, strict=True):
            assert torch.equal(source.victims.images[slot], decode_image(make_jpeg(seed, SIZE)))
        people = [source.victims.names[int(source.victims.labels[slot])] for slot in slots]
        if named:
            assert people == [f"lfw:{name}" for name in ("Ann", "Ann", "Ann", "Bob", "Bob", "Bob", "Bob", "Cy")]
        else:
            assert people == [f"pack:00000{i}" for i in (0, 0, 0, 1, 1, 1, 1, 2)]
        assert source.details["pack_identities_from"] == ("pairs.txt" if named else "genuine pairs")
        assert (source.guessed is None) is named
        assert source.notes == (() if named else (source.guessed,))

    @pytest.mark.parametrize(
        "text",
        [
            LIST.replace("2\t1\n", "1\t2\n", 1).replace("Ann\t1\tBob\t2\nBob\t1\t2\n", "Bob\t1\t2\nAnn\t1\tBob\t2\n"),
            "1\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\n",
            # Same counts and flags, but here slots 0 and 2 show different photos, which in the pack are the same bytes.
            LIST.replace("Bob\t1\t2", "Bob\t2\t3"),
        ],
        ids=["other flags", "other count", "other photos"],
    )
    def test_a_list_that_is_not_the_packs_own_is_not_used(self, pack, text):
        root = pack()
        (root / "pairs.txt").write_text(text)
        source = load_set("insightface", root)
        assert source.details["pack_identities_from"] == "genuine pairs"
        assert source.victims.names[0].startswith("pack:")

    def test_a_broken_list_is_an_error(self, pack):
        root = pack()
        (root / "pairs.txt").write_text(LIST.replace("Bob\t1\t2", "Bob\tx\t2"))
        with pytest.raises(DataError, match=r"pairs\.txt line 4"):
            load_set("insightface", root)

    def test_identical_bytes_under_two_names_stay_two_images(self, pack):
        root = pack(photos=[*PHOTOS[:7], 100])  # Cy's only photo is Ann's first
        (root / "pairs.txt").write_text(LIST)
        source = load_set("insightface", root)
        people = source.victims.labels
        assert torch.equal(people[source.pairs.first] == people[source.pairs.second], source.pairs.same)
        assert source.victims.names[int(people[source.pairs.second[3]])] == "lfw:Cy"

    def test_choice_of_pack(self, pack):
        root = pack(name="cfp_fp.bin")
        assert load_set("insightface", root).details["pack"] == "cfp_fp.bin"
        pack(name="agedb_30.bin")
        with pytest.raises(MissingError, match=r"several packs.*pack=agedb_30\.bin\|cfp_fp\.bin"):
            load_set("insightface", root)
        assert load_set("insightface", root, pack="agedb_30.bin").details["pack"] == "agedb_30.bin"
        pack(name="lfw.bin")
        assert load_set("insightface", root).details["pack"] == "lfw.bin"
        for wrong in ("none.bin", "../pack/lfw.bin"):
            with pytest.raises(MissingError, match=r"has no pack .*it has agedb_30\.bin, cfp_fp\.bin, lfw\.bin"):
                load_set("insightface", root, pack=wrong)

    @pytest.mark.realfaces
    @pytest.mark.slow
    def test_real_faces(self, real_faces_root):
        source = load_set("insightface", real_faces_root, 64, max_identities=20)
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
        assert source.victims.images.float().flatten(1).std(dim=1).min() > 5  # no image is blank


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "train.rec"
    write_big_records(path, TestManyImages.IMAGES, 50, small_jpeg(16))
    return path


class TestManyImages:
    """100,000 images of 16x16 pixels: what grows with the set, and what must not."""

    IMAGES = 100_000

    def test_the_index_is_twenty_bytes_an_image(self, big):
        source = RecordIOSource(big, 16)
        assert (len(source), source.identities) == (self.IMAGES, 2000)
        assert np.array_equal(source.labels, np.arange(self.IMAGES) // 50)
        tracemalloc.start()
        again = RecordIOSource(big, 16)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The index, and a name's worth for each person; no object per image.
        assert kept <= 20 * self.IMAGES + 100 * again.identities

    def test_reading_takes_no_more_memory_however_long_it_goes_on(self, big):
        source = RecordIOSource(big, 16)
        order = EpochOrder(images=len(source), batch_size=500, seed=0, block=16, blocks=64)
        peaks = []
        tracemalloc.start()
        for number, batch in enumerate(StreamLoader(source, order), 1):
            assert len(batch.images) == 500
            if number % 10 == 0:
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.reset_peak()
            if number == 60:
                break
        tracemalloc.stop()
        assert max(peaks[1:]) <= 1.1 * peaks[0] + 100_000
        assert max(peaks) < 4_000_000  # a batch's bytes and the window, not the 38 MB of the file
