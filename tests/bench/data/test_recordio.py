from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.insightface import image_records
from bench.data.recordio import MAGIC, Property, RecordFile, RecordWriter, read_property
from bench.errors import DataError, MissingError

MAGIC_BYTES = struct.pack("<I", MAGIC)


def by_hand(label: float, payload: bytes, *, key: int = 0, flag: int = 0, extra: bytes = b"") -> bytes:
    """A whole record spelled out byte by byte, independently of the writer."""
    body = struct.pack("<IfQQ", flag, label, key, 0) + extra + payload
    return MAGIC_BYTES + struct.pack("<I", len(body)) + body + b"\0" * (-len(body) % 4)


def face_records(counts: list[int]) -> list[bytes]:
    """The records of a face pack, as InsightFace lays them out."""
    images = sum(counts)
    records = [by_hand(0, b"", flag=2, extra=struct.pack("<2f", images + 1, images + 1 + len(counts)))]
    key = 1
    for person, count in enumerate(counts):
        for _ in range(count):
            records.append(by_hand(person, b"image %d" % key, key=key))
            key += 1
    start = 1
    for count in counts:
        records.append(by_hand(0, b"", key=key, flag=2, extra=struct.pack("<2f", start, start + count)))
        start, key = start + count, key + 1
    return records


def write(tmp_path: Path, records: list[bytes], *, index: bool = True) -> Path:
    path = tmp_path / "train.rec"
    path.write_bytes(b"".join(records))
    if index:
        offsets = np.cumsum([0, *map(len, records)])[:-1]
        (tmp_path / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in enumerate(offsets)))
    return path


@pytest.mark.parametrize("index", [True, False])
def test_face_pack_layout(tmp_path, index):
    path = write(tmp_path, face_records([2, 1, 3]), index=index)
    with RecordFile(path) as records:
        assert len(records) == 10
        assert records.header() == (7, 10)
        keys, labels = image_records(records)
        assert keys.tolist() == [1, 2, 3, 4, 5, 6]
        assert labels.tolist() == [0, 0, 1, 2, 2, 2]
        assert records.record(4).payload == b"image 4"
        assert records.record(4).identifier == 4
        assert records.record(8).labels == (3.0, 4.0)


def test_without_a_header_every_record_is_an_image(tmp_path):
    with RecordFile(write(tmp_path, [by_hand(5, b"a"), by_hand(3, b"b")])) as records:
        assert records.header() is None
        keys, labels = image_records(records)
        assert keys.tolist() == [0, 1]
        assert labels.tolist() == [5, 3]


def test_labels_behind_the_header(tmp_path):
    extra = struct.pack("<2f", 9, 0.5)
    with RecordFile(write(tmp_path, [by_hand(7, b"a"), by_hand(0, b"pixels", flag=2, extra=extra)])) as records:
        assert records.labels(np.array([0, 1])).tolist() == [7, 9]
        assert records.record(1).labels == (9.0, 0.5)
        assert records.record(1).payload == b"pixels"


def test_multi_part_record_spelled_out(tmp_path):
    body = struct.pack("<IfQQ", 0, 4.0, 0, 0) + b"abcd" + MAGIC_BYTES + b"efgh" + MAGIC_BYTES + b"ij"
    first, middle, last = body[:28], b"efgh", b"ij"
    parts = [(1, first), (2, middle), (3, last)]
    data = b"".join(
        MAGIC_BYTES + struct.pack("<I", flag << 29 | len(piece)) + piece + b"\0" * (-len(piece) % 4)
        for flag, piece in parts
    )
    for index in (True, False):
        with RecordFile(write(tmp_path, [data, by_hand(2, b"next")], index=index)) as records:
            assert len(records) == 2
            assert records.raw(0) == body
            assert records.labels(np.array([0, 1])).tolist() == [4, 2]


@given(st.lists(st.sampled_from([MAGIC_BYTES, b"x", b"yz", b"1234", b"\0\0\0"]), max_size=12).map(b"".join))
def test_what_is_written_is_read(tmp_path_factory, payload):
    path = tmp_path_factory.mktemp("records") / "train.rec"
    with RecordWriter(path) as writer:
        writer.write(0, (1.0,), payload)
        writer.write(1, (2.0, 3.0), payload)
    with RecordFile(path) as indexed:
        assert [indexed.record(k).payload for k in (0, 1)] == [payload, payload]
        assert indexed.record(1).labels == (2.0, 3.0)
        offsets = indexed.offsets.tolist()
    path.with_suffix(".idx").unlink()
    with RecordFile(path) as scanned:
        assert scanned.offsets.tolist() == offsets


def test_writer_spells_records_as_mxnet_does(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (5.0,), b"abc")
        writer.write(7, (1.0, 2.0), b"")
    expected = by_hand(5, b"abc") + by_hand(0, b"", key=7, flag=2, extra=struct.pack("<2f", 1, 2))
    assert (tmp_path / "train.rec").read_bytes() == expected
    assert (tmp_path / "train.idx").read_text() == "0\t0\n7\t36\n"


def test_writer_splits_at_aligned_magic_only(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (5.0,), b"x" + MAGIC_BYTES + b"abc")
    assert (tmp_path / "train.rec").read_bytes() == by_hand(5, b"x" + MAGIC_BYTES + b"abc")


def test_first_record_can_be_rewritten(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (0.0, 0.0))
        writer.write(1, (1.0,), b"a")
        writer.rewrite_first((2.0, 3.0))
        writer.write(2, (1.0, 2.0))
    with RecordFile(tmp_path / "train.rec") as records:
        assert records.header() == (2, 3)
        assert records.record(1).payload == b"a"
        assert records.record(2).labels == (1.0, 2.0)


def test_writer_needs_a_label(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer, pytest.raises(ValueError, match="label"):
        writer.write(0, ())


@pytest.mark.parametrize("index", [True, False])
def test_bad_magic_names_file_and_offset(tmp_path, index):
    records = face_records([2, 2])
    offset = len(records[0]) + len(records[1])
    records[2] = b"\0\0\0\0" + records[2][4:]
    with pytest.raises(DataError, match=rf"train\.rec is damaged at offset {offset}: no record starts here"):
        image_records(RecordFile(write(tmp_path, records, index=index)))


def test_truncated_file(tmp_path):
    path = write(tmp_path, face_records([2, 2]), index=False)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(
        DataError, match=r"train\.rec is damaged at offset \d+: the record claims 32 bytes, 26 are left"
    ):
        RecordFile(path)


def test_truncated_file_under_an_index(tmp_path):
    records = face_records([2, 2])
    path = write(tmp_path, records)
    cut = sum(map(len, records[:3])) + 4
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train\.idx does not fit train\.rec: key 3 points to offset"):
        RecordFile(path)


def test_image_cut_in_the_middle_is_found_from_its_header(tmp_path):
    records = [by_hand(0, b"a" * 100), by_hand(1, b"b" * 100)]
    path = write(tmp_path, records)
    path.write_bytes(path.read_bytes()[:-50])
    with RecordFile(path) as opened, pytest.raises(DataError, match=f"offset {len(records[0])}: the record claims 124"):
        image_records(opened)


def test_header_promising_more_than_there_is(tmp_path):
    records = face_records([3])
    with RecordFile(write(tmp_path, records[:3])) as opened, pytest.raises(DataError, match=r"1 to 3.*first is 3"):
        image_records(opened)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 2.5])
def test_identities_are_whole_numbers(tmp_path, label):
    path = write(tmp_path, [by_hand(0, b"x"), by_hand(label, b"y")])
    with RecordFile(path) as records, pytest.raises(DataError, match=r"record 1 has the identity"):
        image_records(records)


def test_impossible_header(tmp_path):
    header = by_hand(0, b"", flag=2, extra=struct.pack("<2f", float("nan"), 3))
    with RecordFile(write(tmp_path, [header])) as records, pytest.raises(DataError, match="claims the image range"):
        image_records(records)


def test_label_count_beyond_the_record(tmp_path):
    path = write(tmp_path, [by_hand(0, b"x", flag=2**31)])
    with RecordFile(path) as records, pytest.raises(DataError, match="claims 2147483648 labels"):
        records.record(0)


def test_record_without_header(tmp_path):
    path = write(tmp_path, [MAGIC_BYTES + struct.pack("<I", 4) + b"abcd"])
    with RecordFile(path) as records, pytest.raises(DataError, match="4 bytes, its header needs 24"):
        image_records(records)


@pytest.mark.parametrize("flag", [2, 3])
def test_record_starting_in_the_middle(tmp_path, flag):
    path = write(tmp_path, [MAGIC_BYTES + struct.pack("<I", flag << 29 | 4) + b"abcd"], index=False)
    with pytest.raises(DataError, match=f"cannot start with part flag {flag}"):
        RecordFile(path)


def test_record_that_never_ends(tmp_path):
    part = MAGIC_BYTES + struct.pack("<I", 1 << 29 | 4) + b"abcd"
    with pytest.raises(DataError, match="offset 12: part flag 1 within the record that starts at 0"):
        RecordFile(write(tmp_path, [part, part], index=False))
    with pytest.raises(DataError, match="offset 12: the file ends within a record"):
        RecordFile(write(tmp_path, [part], index=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0\nx\t36\n", r"train\.idx line 2: expected 'key<tab>offset', got 'x"),
        ("0\t0\n1\n", "line 2"),
        ("0\t0\n1\t-36\n", "key 1 points to offset -36"),
        ("", "no index"),
        ("0\t0\n0\t36\n", "key 0 more than once"),
        ("0\t0\n1\t999999\n", "key 1 points to offset 999999, the file has"),
        ("0\t0\n1\t99999999999999999999999\n", "no index"),
        ("0\t0\n1\té\n", "not ASCII"),
    ],
)
def test_bad_index(tmp_path, text, message):
    path = write(tmp_path, [by_hand(0, b"abc"), by_hand(1, b"def")])
    (tmp_path / "train.idx").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        RecordFile(path)


def test_index_pointing_between_records(tmp_path):
    path = write(tmp_path, [by_hand(0, b"abc"), by_hand(1, b"def")])
    (tmp_path / "train.idx").write_text("0\t0\n1\t8\n")
    with RecordFile(path) as records, pytest.raises(DataError, match="offset 8: no record starts here"):
        image_records(records)


def test_missing_and_empty(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        RecordFile(tmp_path / "train.rec")
    (tmp_path / "train.rec").touch()
    with pytest.raises(DataError, match="is empty"):
        RecordFile(tmp_path / "train.rec")


def test_unknown_key(tmp_path):
    with RecordFile(write(tmp_path, [by_hand(0, b"abc")])) as records, pytest.raises(DataError, match="no record 5"):
        records.record(5)


def test_property(tmp_path):
    file = tmp_path / "property"
    assert read_property(file) is None
    file.write_text("355,112,96\n")
    assert read_property(file) == Property(355, 112, 96)
    for bad in ("355", "a,b,c", "1,2,3,4", "-1,2,3"):
        file.write_text(bad)
        with pytest.raises(DataError, match="expected 'identities,height,width'"):
            read_property(file)
