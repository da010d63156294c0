from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import read_record

from bench.data.recordio import MAGIC, RecordFile, RecordWriter, read_property, scan
from bench.errors import DataError, MissingError

MAGIC_BYTES = struct.pack("<I", MAGIC)


def by_hand(label: float, payload: bytes, *, key: int = 0, flag: int = 0, extra: bytes = b"") -> bytes:
    """A whole record spelled out byte by byte, independently of the writer."""
    body = struct.pack("<IfQQ", flag, label, key, 0) + extra + payload
    return MAGIC_BYTES + struct.pack("<I", len(body)) + body + b"\0" * (-len(body) % 4)


def write(tmp_path: Path, records: list[bytes], *, index: bool = True) -> Path:
    path = tmp_path / "train.rec"
    path.write_bytes(b"".join(records))
    if index:
        offsets = np.cumsum([0, *map(len, records)])[:-1]
        (tmp_path / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in enumerate(offsets)))
    return path


PAIR = struct.pack("<2f", 9, 0.5)


def test_labels_stand_in_the_header_or_behind_it(tmp_path):
    path = write(tmp_path, [by_hand(7, b"a"), by_hand(0, b"pixels", flag=2, extra=PAIR), by_hand(3, b"")])
    records = RecordFile(path)
    assert [read_record(path, key) for key in range(3)] == [([7.0], b"a"), ([9.0, 0.5], b"pixels"), ([3.0], b"")]
    heads = records.heads(np.array([2, 1, 0]))
    assert heads["count"].tolist() == [0, 2, 0]
    assert heads["label"].tolist() == [3, 0, 7]
    assert heads["first"][1] == 9
    assert records.where(1) == "train.rec record 1 at offset 36"


@pytest.mark.parametrize("index", [True, False])
def test_multi_part_record_spelled_out(tmp_path, index):
    body = struct.pack("<IfQQ", 0, 4.0, 0, 0) + b"abcd" + MAGIC_BYTES + b"efgh" + MAGIC_BYTES + b"ij"
    parts = [(1, body[:28]), (2, b"efgh"), (3, b"ij")]
    data = b"".join(
        MAGIC_BYTES + struct.pack("<I", flag << 29 | len(piece)) + piece + b"\0" * (-len(piece) % 4)
        for flag, piece in parts
    )
    path = write(tmp_path, [data, by_hand(2, b"next")], index=index)
    records = RecordFile(path)
    assert len(records) == 2
    assert [read_record(path, key) for key in range(2)] == [([4.0], body[24:]), ([2.0], b"next")]
    assert records.heads(np.arange(2))["label"].tolist() == [4, 2]


@given(st.lists(st.sampled_from([MAGIC_BYTES, b"x", b"yz", b"1234", b"\0\0\0"]), max_size=12).map(b"".join))
def test_what_is_written_is_read(tmp_path_factory, payload):
    path = tmp_path_factory.mktemp("records") / "train.rec"
    with RecordWriter(path) as writer:
        writer.write(0, (1.0,), payload)
        writer.write(1, (2.0, 3.0), payload)
    records = RecordFile(path)
    assert [read_record(path, key) for key in (0, 1)] == [([1.0], payload), ([2.0, 3.0], payload)]
    assert scan(path).tolist() == records.offsets.tolist()


def test_writer_spells_records_as_mxnet_does(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (5.0,), b"abc")
        writer.write(7, (1.0, 2.0), b"")
        writer.write(8, (5.0,), b"x" + MAGIC_BYTES + b"abc")  # split at an aligned magic number only
        with pytest.raises(ValueError, match="label"):
            writer.write(9, ())
    expected = by_hand(5, b"abc") + by_hand(0, b"", key=7, flag=2, extra=struct.pack("<2f", 1, 2))
    assert (tmp_path / "train.rec").read_bytes() == expected + by_hand(5, b"x" + MAGIC_BYTES + b"abc", key=8)
    assert (tmp_path / "train.idx").read_text() == "0\t0\n7\t36\n8\t76\n"


def test_first_record_can_be_rewritten(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, (0.0, 0.0))
        writer.write(1, (1.0,), b"a")
        writer.rewrite_first((2.0, 3.0))
        writer.write(2, (1.0, 2.0))
    stored = [read_record(tmp_path / "train.rec", key) for key in range(3)]
    assert stored == [([2.0, 3.0], b""), ([1.0], b"a"), ([1.0, 2.0], b"")]


def test_bad_magic_names_file_and_offset(tmp_path):
    path = write(tmp_path, [by_hand(0, b"abc"), b"\0\0\0\0" + by_hand(0, b"abc")[4:], by_hand(0, b"abc")])
    with pytest.raises(DataError, match=r"train\.rec is damaged at offset 36: no record starts here"):
        scan(path)
    records = RecordFile(path)
    for read in (records.heads, records.bodies):
        with pytest.raises(DataError, match=r"train\.rec record 1 at offset 36 is damaged: no record starts here"):
            read(np.arange(3))


@pytest.mark.parametrize(
    ("cut", "index", "message"),
    [
        (6, False, r"train\.rec is damaged at offset 36: the record claims 32 bytes, 26 are left"),
        (6, True, r"train\.rec was cut off at 70 bytes within the record at offset 36 .*lists 2 records, 1 are whole"),
        (
            36,
            True,
            r"train\.rec was cut off at 40 bytes within the record at offset 36 .*copy or download the file again",
        ),
        (40, True, r"train\.rec was cut off at 36 bytes: train\.idx lists 2 records, 1 are whole"),
    ],
)
def test_a_file_that_was_cut_off(tmp_path, cut, index, message):
    path = write(tmp_path, [by_hand(0, b"abc"), by_hand(0, b"abcdefgh")], index=index)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=message):
        RecordFile(path)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (by_hand(0, b"x", flag=2**31), "it claims 2147483648 labels and ends before them"),
        (MAGIC_BYTES + struct.pack("<I", 4) + b"abcd", "4 bytes, its header needs 24"),
        (MAGIC_BYTES + struct.pack("<I", 2 << 29 | 4) + b"abcd", "cannot start with part flag 2"),
        (MAGIC_BYTES + struct.pack("<I", 3 << 29 | 4) + b"abcd", "cannot start with part flag 3"),
        (2 * (MAGIC_BYTES + struct.pack("<I", 1 << 29 | 4) + b"abcd"), "part flag 1 within the record"),
        (MAGIC_BYTES + struct.pack("<I", 1 << 29 | 4) + b"abcd", "the record ends within a part"),
    ],
)
def test_records_that_are_none(tmp_path, damaged, message):
    with pytest.raises(DataError, match=message):
        RecordFile(write(tmp_path, [damaged]))
    if "flag" in message or "part" in message:
        with pytest.raises(DataError, match=rf"train\.rec is damaged at offset \d+: .*{message}"):
            scan(tmp_path / "train.rec")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0\nx\t36\n", r"train\.idx line 2: expected 'key<tab>offset', got 'x"),
        ("0\t0\n1\n", "line 2"),
        ("0\t0\n1\t-36\n", "key 1 points to offset -36"),
        ("", "no index"),
        ("0\t0\n0\t36\n", "key 0 more than once"),
        ("0\t0\n1\t999999\n", "key 1 points to offset 999999, the file has"),
        ("0\t0\n1\t99999999999999999999999\n", "key 1 points to offset"),
        ("0\t0\n1\té\n", r"line 2: expected .*\(delete the index"),
        ("0\t0\n1\t8\n", "key 1 points to offset 8, where no record of it starts"),
    ],
)
def test_bad_index(tmp_path, text, message):
    path = write(tmp_path, [by_hand(0, b"abc"), by_hand(1, b"def")])
    (tmp_path / "train.idx").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        RecordFile(path)


def test_whether_the_file_or_its_index_is_at_fault(tmp_path):
    """Cut to 60 % it is the file; whole, with an index that is off by four, it is the index."""
    records = [by_hand(i, bytes(range(i, i + 40))) for i in range(20)]
    path, index = write(tmp_path, records), tmp_path / "train.idx"
    whole, lines = path.read_bytes(), index.read_text().split()
    path.write_bytes(whole[: int(0.6 * len(whole))])
    with pytest.raises(DataError, match=r"train\.rec was cut off at 864 bytes: train\.idx lists 20 records, 12 are"):
        RecordFile(path)
    path.write_bytes(whole)
    for step in (4, -4):
        index.write_text("".join(f"{k}\t{int(at) + step}\n" for k, at in zip(lines[::2], lines[1::2], strict=True)))
        with pytest.raises(DataError, match=r"train\.idx does not fit train\.rec, whose records follow one another to"):
            RecordFile(path)
    index.unlink()
    assert len(RecordFile(path)) == 20


@pytest.mark.parametrize("index", [True, False])
def test_what_is_no_record_file_is_named(tmp_path, index):
    path = write(tmp_path, [by_hand(i, b"abc") for i in range(5)], index=index)
    for content, what in ((gzip.compress(path.read_bytes()), r"compressed \(gzip\)"), (b"<html>" * 9, "a web page")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"train\.rec is no record file, but .*{what}"):
            RecordFile(path)


def test_an_index_that_goes_wrong_in_the_middle(tmp_path):
    path = write(tmp_path, [by_hand(i, b"abc") for i in range(5)])
    (tmp_path / "train.idx").write_text("0\t0\n1\t36\n2\t76\n3\t108\n4\t144\n")
    records = RecordFile(path)
    for rows in ([2], [0, 2, 4]):
        with pytest.raises(DataError, match=r"train\.idx does not fit .*key 2 points to offset 76, where no record of"):
            records.bodies(np.array(rows))


def test_an_index_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path, [by_hand(i, b"abc") for i in range(3)])
    (tmp_path / "train.idx").write_bytes(b"\xef\xbb\xbf0\t0\r\n1\t36\r\n2\t72\r\n")
    assert RecordFile(path).offsets.tolist() == [0, 36, 72]


def test_missing_and_empty(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        RecordFile(tmp_path / "train.rec")
    (tmp_path / "train.rec").touch()
    with pytest.raises(DataError, match="is empty"):
        RecordFile(tmp_path / "train.rec")


def test_property(tmp_path):
    file = tmp_path / "property"
    assert read_property(file) is None
    file.write_bytes(b"\xef\xbb\xbf355,112,96\r\n")
    assert read_property(file) == (355, 112, 96)
    file.write_text("355,112,96\n")
    assert read_property(file) == (355, 112, 96)
    for bad in ("355", "a,b,c", "1,2,3,4", "-1,2,3", f"{5000 * '9'},2,3"):
        file.write_text(bad)
        with pytest.raises(DataError, match="expected 'identities,height,width'"):
            read_property(file)
