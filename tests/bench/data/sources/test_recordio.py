from __future__ import annotations

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from big_records import small_jpeg, write_big_records
from open_source import open_source

from bench.data.decode import decode_image
from bench.data.insightface import image_records
from bench.data.recordio import MAGIC, RecordFile, RecordWriter
from bench.data.sources.recordio import RecordIOSource
from bench.data.stream.loader import StreamLoader
from bench.data.stream.sampler import EpochOrder
from bench.data.stream.view import IdentityView
from bench.errors import DataError, MissingError

SIZE = 32


@pytest.fixture
def pack(tmp_path, make_jpeg):
    """Three people (0, 1, 2) with 3, 2 and 4 images, and a folder around them."""

    def write(labels=(0, 0, 0, 1, 1, 2, 2, 2, 2), ranges=((1, 4), (4, 6), (6, 10)), header=None, payload=make_jpeg):
        with RecordWriter(tmp_path / "train.rec") as writer:
            images = len(labels)
            writer.write(0, header or (images + 1.0, images + 1.0 + len(ranges)))
            for key, label in enumerate(labels, 1):
                writer.write(key, (float(label),), payload(key, SIZE))
            for key, pair in enumerate(ranges, images + 1):
                writer.write(key, tuple(map(float, pair)))
        return tmp_path

    return write


@pytest.mark.parametrize("index", [True, False])
def test_images_and_labels_are_those_of_the_file(pack, index):
    root = pack()
    if not index:
        (root / "train.idx").unlink()
    source = open_source("insightface", root, image_size=SIZE)
    with RecordFile(root / "train.rec") as records:
        keys, labels = image_records(records)
        expected = torch.stack([decode_image(records.record(int(key)).payload, SIZE) for key in keys])
    assert source.labels.tolist() == labels.tolist()
    assert (len(source), source.identities, source.name(2)) == (9, 3, "train:000002")
    rows = np.array([7, 0, 3, 3, 8])
    batch = source.read(rows)
    assert (batch.images.int() - expected[rows].int()).abs().max() <= 2
    assert batch.labels.tolist() == labels[rows].tolist()
    assert batch.rows.tolist() == rows.tolist()
    assert batch.skipped == ()


def test_labels_need_not_be_consecutive(pack):
    source = RecordIOSource(pack(labels=(7, 7, 7, 4, 4, 9, 9, 9, 9)), SIZE)
    assert source.labels.tolist() == [1, 1, 1, 0, 0, 2, 2, 2, 2]
    assert [source.name(k) for k in range(3)] == ["train:000004", "train:000007", "train:000009"]
    assert source.read(np.array([0, 3])).labels.tolist() == [1, 0]


@pytest.mark.parametrize("ranges", [(), ((1, 4), (4, 6)), ((1, 4), (5, 10), (2, 3))], ids=["none", "short", "gaps"])
def test_ranges_that_do_not_share_out_the_images_are_not_believed(pack, ranges):
    assert RecordIOSource(pack(ranges=ranges), SIZE).labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_an_image_that_is_not_its_ranges_is_refused_when_read(pack):
    source = RecordIOSource(pack(labels=(0, 0, 0, 1, 1, 2, 0, 2, 2)), SIZE)
    source.read(np.array([0, 3, 5]))
    with pytest.raises(DataError, match=r"train\.rec record 7 at offset \d+ is of identity 0, but .* says 2"):
        source.read(np.array([6]))


def test_a_header_beyond_what_float32_counts(pack):
    """Over 2**24 images its numbers are rounded: images are then told by their size, and labels by their headers."""
    source = RecordIOSource(pack(header=(2.0**24 + 2, 2.0**24 + 6), ranges=((1, 5), (5, 6), (6, 9))), SIZE)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_records_without_a_header_and_with_sparse_keys(tmp_path, make_jpeg):
    with RecordWriter(tmp_path / "faces.rec") as writer:
        for key, label in ((30, 5.0), (7, 6.0), (400, 5.0)):
            writer.write(key, (label, 0.5), make_jpeg(key, SIZE))  # labels behind the header
    source = RecordIOSource(tmp_path / "faces.rec", SIZE)
    assert source.labels.tolist() == [1, 0, 0]  # by key: 7, 30, 400
    assert "record 30 at offset 0" in source.where(1)
    image = source.read(np.array([2])).images[0]
    assert (image.int() - decode_image(make_jpeg(400, SIZE)).int()).abs().max() <= 2


def test_a_record_in_several_parts(pack, make_jpeg):
    magic = struct.pack("<I", MAGIC)

    def behind_the_end(key, size):  # decoders stop at the end mark; the writer splits at an aligned magic number
        data = make_jpeg(key, size)
        return data + bytes(-len(data) % 4) + magic + b"tail" if key % 2 else data

    root = pack(payload=behind_the_end)
    assert (root / "train.rec").read_bytes().count(magic) == 13 + 5  # five parts more than records
    source = RecordIOSource(root, SIZE)
    batch = source.read(np.arange(9))
    for image, key in zip(batch.images, range(1, 10), strict=True):
        assert (image.int() - decode_image(make_jpeg(key, SIZE)).int()).abs().max() <= 2


def damage(root, key, change):
    offsets = dict(np.loadtxt(root / "train.idx", dtype=np.int64).tolist())
    data = bytearray((root / "train.rec").read_bytes())
    change(data, offsets[key])
    (root / "train.rec").write_bytes(data)
    return offsets[key]


def test_a_damaged_record_is_named_with_its_offset(pack):
    root = pack()
    offset = damage(root, 5, lambda data, at: data.__setitem__(slice(at, at + 4), b"\0\0\0\0"))
    source = RecordIOSource(root, SIZE)
    source.read(np.array([0, 1, 5]))
    with pytest.raises(DataError, match=rf"train\.rec record 5 at offset {offset} is damaged: no part starts"):
        source.read(np.array([0, 4]))


def test_a_file_that_was_cut_off_is_refused_when_opened(pack):
    root = pack(ranges=())
    data = (root / "train.rec").read_bytes()
    (root / "train.rec").write_bytes(data[:-100])
    with pytest.raises(
        DataError, match=r"train\.rec record 9 at offset \d+ is damaged: it claims \d+ bytes, \d+ are left"
    ):
        RecordIOSource(root, SIZE)
    (root / "train.rec").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"train\.idx does not fit train\.rec: key \d points to offset"):
        RecordIOSource(root, SIZE)


def test_a_file_that_is_cut_off_while_it_is_read(pack):
    root = pack()
    source = RecordIOSource(root, SIZE)
    (root / "train.rec").write_bytes((root / "train.rec").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train\.rec is truncated: it has 3000 bytes"):
        source.read(np.array([8]))


@pytest.mark.parametrize("text", ["0\t0\nx\t36\n", "0\t0\n1\n", "0\t0\n0\t36\n", "0\t-4\n"])
def test_a_bad_index_is_explained(pack, text):
    root = pack()
    (root / "train.idx").write_text(text)
    with pytest.raises(DataError, match=r"train\.idx"):
        RecordIOSource(root, SIZE)


def test_missing_and_empty(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        RecordIOSource(tmp_path, SIZE)
    (tmp_path / "train.rec").touch()
    with pytest.raises(DataError, match="is empty"):
        RecordIOSource(tmp_path, SIZE)
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (1.0, 1.0))
    with pytest.raises(DataError, match="holds no image"):
        RecordIOSource(tmp_path, SIZE)


def test_an_image_that_cannot_be_decoded(pack):
    root = pack()

    def spoil(data, at):
        data[at + 32 + 200 : at + 32 + 204] = b"\xff\xd9\xff\xd9"  # the picture ends early
        data[at + 32 : at + 34] = b"no"

    offset = damage(root, 4, spoil)
    rows = np.array([2, 3, 4])
    with pytest.raises(DataError, match=rf"record 4 at offset {offset}: not a JPEG.*on_error=skip"):
        RecordIOSource(root, SIZE).read(rows)
    batch = RecordIOSource(root, SIZE, on_error="skip").read(rows)
    assert batch.rows.tolist() == [2, 4]
    assert batch.labels.tolist() == [0, 1]
    assert len(batch.images) == 2
    assert [entry.where for entry in batch.skipped] == [f"train.rec record 4 at offset {offset}"]


def test_some_identities_only(pack):
    source = RecordIOSource(pack(), SIZE)
    view = IdentityView.of(source, np.array([2, 0]))
    assert view.labels.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert (len(view), view.identities, view.name(0), view.name(1)) == (7, 2, "train:000002", "train:000000")
    batch = view.read(np.array([6, 1]))
    assert batch.labels.tolist() == [0, 1]
    assert batch.rows.tolist() == [6, 1]
    assert torch.equal(batch.images, source.read(np.array([8, 1])).images)
    with pytest.raises(ValueError, match="0 to 2"):
        IdentityView.of(source, np.array([3]))


def test_a_source_can_be_sent_to_a_process(pack):
    source = pickle.loads(pickle.dumps(RecordIOSource(pack(), SIZE)))
    assert source.read(np.array([4])).labels.tolist() == [1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "train.rec"
    write_big_records(path, TestManyImages.IMAGES, 50, small_jpeg(16))
    return path


class TestManyImages:
    """100,000 images of 16x16 pixels: what grows with the set, and what must not."""

    IMAGES = 100_000

    def test_the_index_is_twenty_bytes_an_image(self, path):
        source = RecordIOSource(path, 16)
        assert (len(source), source.identities) == (self.IMAGES, 2000)
        assert np.array_equal(source.labels, np.arange(self.IMAGES) // 50)
        table = source.table
        held = sum(array.nbytes for array in (table.keys, table.offsets, table.sizes, source.labels))
        assert held <= 20 * self.IMAGES
        tracemalloc.start()
        again = RecordIOSource(path, 16)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The index, and a name's worth for each person; no object per image.
        assert kept <= 20 * self.IMAGES + 100 * again.identities

    def test_reading_takes_no_more_memory_however_long_it_goes_on(self, path):
        source = RecordIOSource(path, 16)
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
