"""InsightFace RecordIO (``train.rec``, ``train.idx``, ``property``), read and written without MXNet.

A record file is a sequence of parts, each starting on a multiple of four bytes::

    uint32 magic = 0xced7230a | uint32 flag << 29 | length | length bytes | zeros up to a multiple of four

Flag 0 is a whole record; 1, 2 and 3 are the first, middle and last part of one that was split wherever the
magic number occurred in it on a multiple of four (the magic itself is left out and put back between
the parts when reading). A record starts with the image header, little endian::

    uint32 flag | float32 label | uint64 id | uint64 id2 | flag x float32 labels

where ``flag > 0`` says that the labels stand behind the header instead. Record 0 of a face pack is a header with two
labels (h0, h1): images are the records 1 .. h0-1, and h0 .. h1-1 are one record per identity with the range of
its images. The index has one line ``key <tab> offset`` per record; where it is missing, the file is scanned and the
keys are the record numbers.

Sources: the dmlc-core RecordIO header and MXNet's ``recordio.py`` for the layout, InsightFace's ``face2rec2.py`` for
the use of the labels.
"""

from __future__ import annotations

import copy
import mmap
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import read_text, readable, shown, stranger, whole_number
from bench.data.ranges import read_ranges
from bench.errors import DataError, MissingError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1

#: A part's and an image's header with room for two labels behind it.
HEAD = np.dtype(
    {
        "names": ["magic", "word", "count", "label", "ids", "first", "second"],
        "formats": ["<u4", "<u4", "<u4", "<f4", ("<u8", 2), "<f4", "<f4"],
    }
)
#: Records whose headers are read at once.
_AT_ONCE = 4096


class RecordFile:
    """Where the records of a file lie, by key; 16 bytes of memory a record, and no file stays open.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.rec"
    >>> with RecordWriter(path) as writer:
    ...     writer.write(0, (7.0,), b"abc")
    >>> records = RecordFile(path)
    >>> buffer, begin, end, heads = records.bodies(np.array([0]))
    >>> bytes(buffer[begin[0] : end[0]]), float(heads["label"][0])
    (b'abc', 7.0)

    The ``.idx`` beside the file says where the records are; without one, ``index`` is None and the file is scanned.
    ``keys`` (N,) ascend, in the smallest type that holds them; ``offsets`` are int64 (N,); ``sizes`` uint32 (N,), in
    bytes up to the next record.

    Raises:
        MissingError: there is no such file.
        DataError: it is empty or cut off, its records do not follow one another, or the index does not fit it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingError(f"{shown(path)} does not exist")
        end = path.stat().st_size
        if not end:
            raise DataError(f"{shown(path)} is empty")
        self.path, index = path, path.with_suffix(".idx")
        self.index = index if index.exists() else None
        if self.index is None:
            offsets = scan(path)
            keys = np.arange(len(offsets))
        else:
            keys, offsets = self.keys, self.offsets = _read_index(index)
            outside = np.flatnonzero((offsets < 0) | (offsets > end - _PART.size))
            if len(outside):
                row = int(outside[offsets[outside].argmin()])
                raise self._fault(row, f"the file has {end} bytes")
        by_offset = np.argsort(offsets, kind="stable")
        sizes = np.empty_like(offsets)
        sizes[by_offset] = np.diff(offsets[by_offset], append=end)
        if sizes.max() > np.iinfo(np.uint32).max:
            row = int(sizes.argmax())
            raise self._fault(row, f"{sizes[row]} bytes lie between it and the next")
        by_key = np.argsort(keys, kind="stable")
        keys = keys[by_key]
        if (twice := keys[1:][keys[1:] == keys[:-1]]).size:
            raise DataError(f"{shown(index)} has key {twice[0]} more than once")
        self.keys = keys.astype(np.min_scalar_type(int(keys[-1])))
        self.offsets, self.sizes = offsets[by_key], sizes[by_key].astype(np.uint32)
        self.bodies(np.array([self.offsets.argmax()]))  # a file that was cut off ends within its last record

    def _fault(self, row: int, what: str) -> DataError:
        """Whose fault it is that the index and the file do not fit at a record, told by the file without the index."""
        if self.index is None:
            return DataError(f"{self.where(row)} is damaged: {what}")
        at, end, file = int(self.offsets[row]), self.path.stat().st_size, shown(self.path.name)
        (starts, damage), (_, listed) = _records(self.path), _read_index(self.index)
        reached, last = end if damage is None else damage.record, int(listed.max())
        if damage is not None and not len(starts):
            return _damaged(self.path, starts, damage)
        # Behind what can be followed nothing tells, except that the index was right so far.
        if at < reached or (at > reached and not np.isin(starts, listed).all()):
            place = f"where no record of it starts ({what})" if 0 <= at < end and at not in starts else what
            return DataError(
                f"{shown(self.index)} does not fit {file}, whose records follow one another to offset {reached}: key "
                f"{self.keys[row]} points to offset {at}, {place} (delete the index to have the file scanned)"
            )
        if damage is None or (damage.cut_off and (last == reached or last > end - _PART.size)):
            within = "" if damage is None else f" within the record at offset {reached} ({damage.what})"
            return DataError(
                f"{shown(self.path)} was cut off at {end} bytes{within}: {shown(self.index.name)} lists {len(listed)} "
                f"records, {len(starts)} are whole; copy or download the file again"
            )
        first = "" if at == reached else f" (the first damage of the file is at offset {damage.offset}: {damage.what})"
        return DataError(f"{self.where(row)} is damaged: {what}{first}")

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Some of the records."""
        other = copy.copy(self)
        other.keys, other.offsets, other.sizes = self.keys[rows], self.offsets[rows], self.sizes[rows]
        return other

    def where(self, row: int) -> str:
        """File, record and offset."""
        return f"{shown(self.path.name)} record {self.keys[row]} at offset {self.offsets[row]}"

    def heads(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """The headers of some records, :data:`HEAD` (n,), read in the order in which they lie on disk.

        Raises:
            DataError: one of them is damaged.
        """
        heads = np.empty(len(rows), dtype=HEAD)
        by_offset = np.argsort(self.offsets[rows], kind="stable")
        for start in range(0, len(rows), _AT_ONCE):
            part = by_offset[start : start + _AT_ONCE]
            buffer, at = self._read(rows[part], HEAD.itemsize)
            heads[part], sound = self._parse(buffer, at, rows[part])
            for i in np.flatnonzero(~sound).tolist():
                whole = self._joined(int(rows[part[i]])).ljust(HEAD.itemsize, b"\0")
                heads[part[i]] = np.frombuffer(whole, dtype=HEAD, count=1)[0]
        return heads

    def bodies(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.void]]:
        """Some records as a whole.

        Returns:
            One writable buffer, where in it the encoded image of each record begins and ends, int64 (n,), and the
            headers.

        Raises:
            DataError: one of them is damaged.
        """
        buffer, at = self._read(rows)
        heads, sound = self._parse(buffer, at, rows)
        split = np.flatnonzero(~sound).tolist()
        if split:
            pieces, place = [buffer], len(buffer)
            for i in split:
                record = np.frombuffer(self._joined(int(rows[i])), dtype=np.uint8)
                pieces.append(record)
                at[i], place = place, place + len(record)
            buffer = np.concatenate((*pieces, np.zeros(HEAD.itemsize, dtype=np.uint8)))
            heads = buffer[at[:, None] + np.arange(HEAD.itemsize)].view(HEAD)[:, 0]
        begin = at + _PART.size + _HEADER.size + 4 * heads["count"].astype(np.int64)
        return buffer, begin, at + _PART.size + (heads["word"] & _LENGTH_MASK), heads

    def _read(self, rows: NDArray[np.int64], most: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The (first ``most``) bytes of records, with room for a header behind the last one."""
        sizes = self.sizes[rows].astype(np.int64)
        sizes = sizes if most is None else np.minimum(sizes, most)
        return read_ranges([self.path], np.zeros_like(rows), self.offsets[rows], sizes, spare=HEAD.itemsize)

    def _parse(
        self, buffer: NDArray[np.uint8], at: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """Headers, and which of the records are whole, in one part, and as long as they say."""
        heads = buffer[at[:, None] + np.arange(HEAD.itemsize)].view(HEAD)[:, 0]
        length = (heads["word"] & _LENGTH_MASK).astype(np.int64)
        sound = (heads["magic"] == MAGIC) & (heads["word"] >> _LENGTH_BITS == 0)
        sound &= (_PART.size + length <= self.sizes[rows]) & (
            length >= _HEADER.size + 4 * heads["count"].astype(np.int64)
        )
        return heads, sound

    def _joined(self, row: int) -> bytes:
        """A record that was split where the magic number occurs in it, rewritten in one part."""

        data = self._read(np.array([row]))[0][: self.sizes[row]].tobytes()
        try:
            body = _MAGIC_BYTES.join(data[start : start + length] for start, length, _ in _parts(data, 0))
        except _Damage as damage:
            raise self._fault(row, damage.what) from damage
        if len(body) < _HEADER.size:
            raise DataError(f"{self.where(row)} is damaged: it has {len(body)} bytes, its header needs {_HEADER.size}")
        count = _HEADER.unpack_from(body)[0]
        if len(body) < _HEADER.size + 4 * count:
            raise DataError(f"{self.where(row)} is damaged: it claims {count} labels and ends before them")
        return _PART.pack(MAGIC, len(body)) + body


class _Damage(Exception):
    """Where and why the parts of the record at an offset do not follow one another; ``cut_off`` where the data end."""

    def __init__(self, record: int, offset: int, what: str, *, cut_off: bool = False) -> None:
        super().__init__(what)
        self.record, self.offset, self.what, self.cut_off = record, offset, what, cut_off


def _parts(data: bytes | mmap.mmap, offset: int) -> Iterator[tuple[int, int, int]]:
    """(data offset, length, offset after it) of every part of the record at ``offset``."""
    first = offset
    while True:
        if offset + _PART.size > len(data):
            raise _Damage(first, offset, "the record ends within a part", cut_off=True)
        magic, word = _PART.unpack_from(data, offset)
        if magic != MAGIC:
            raise _Damage(first, offset, f"no record starts here (found {magic:#010x}, not {MAGIC:#010x})")
        flag, length, start = word >> _LENGTH_BITS, word & _LENGTH_MASK, offset + _PART.size
        if start + length > len(data):
            raise _Damage(
                first, offset, f"the record claims {length} bytes, {len(data) - start} are left", cut_off=True
            )
        if offset == first and flag not in (0, 1):
            raise _Damage(first, offset, f"a record cannot start with part flag {flag}")
        if offset != first and flag not in (2, 3):
            raise _Damage(first, offset, f"part flag {flag} within the record that starts at {first}")
        offset = start + (length + 3 & ~3)
        yield start, length, offset
        if flag in (0, 3):
            return


def scan(path: Path) -> NDArray[np.int64]:
    """Offset of every record, found by reading the file from its start, whatever an index says.

    Raises:
        DataError: the file cannot be read, or the records do not follow one another to the end.
    """
    offsets, damage = _records(path)
    if damage is not None:
        raise _damaged(path, offsets, damage)
    return offsets


def _damaged(path: Path, whole: NDArray[np.int64], damage: _Damage) -> DataError:
    with path.open("rb") as file:
        what = None if len(whole) else stranger(file.read(64))
    if what is not None:
        return DataError(f"{shown(path)} is no record file, but {what}")
    return DataError(
        f"{shown(path)} is damaged at offset {damage.offset}: {damage.what}; {len(whole)} records before it are whole: "
        "copy or download it again"
    )


def _records(path: Path) -> tuple[NDArray[np.int64], _Damage | None]:
    """Offsets of the whole records from the start of the file, and what ended them before the file's end."""
    offsets, offset, damage = [], 0, None
    with readable(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while offset < len(data):
            try:
                *_, (_, _, behind) = _parts(data, offset)
            except _Damage as found:
                damage = found
                break
            offsets.append(offset)
            offset = behind
    return np.asarray(offsets, dtype=np.int64), damage


def _read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets, without an object per line."""
    with readable(path), warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how numpy says that it stopped at something else
        try:
            table = np.fromfile(path, dtype=np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            table = np.empty(0, dtype=np.int64)
    if len(table) and len(table) % 2 == 0:
        return table[0::2].copy(), table[1::2].copy()
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        columns = [whole_number(column) for column in line.split()]
        if columns and (len(columns) != 2 or None in columns):
            raise DataError(
                f"{shown(path)} line {number}: expected 'key<tab>offset', got {shown(line[:60])!r} (delete the index "
                "to have the file scanned)"
            )
        rows += [columns] if columns else []
    if not rows:
        raise DataError(
            f"{shown(path)} is no index: expected lines 'key<tab>offset' (delete it to have the file scanned)"
        )
    keys, offsets = np.asarray(rows, dtype=np.int64).T
    return keys.copy(), offsets.copy()


def read_property(path: Path) -> tuple[int, int, int] | None:
    """Identities, height and width in the ``property`` file, or None where there is none.

    Raises:
        DataError: it is not three whole numbers.
    """
    if not path.exists():
        return None
    text = read_text(path).strip()
    match [whole_number(field.strip()) for field in text.split(",")]:
        case [int(identities), int(height), int(width)]:
            return identities, height, width
    raise DataError(f"{shown(path)}: expected 'identities,height,width', got {shown(text[:60])!r}")


class RecordWriter:
    """Writes a ``.rec`` and, beside it, its ``.idx``; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._index = path.with_suffix(".idx").open("w", encoding="ascii", newline="\n")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._index.close()

    def write(self, key: int, labels: tuple[float, ...], payload: bytes = b"") -> None:
        """Append a record under its key, which is also its id.

        One label is stored in the header, several behind it; ``payload`` is the encoded image.

        Raises:
            ValueError: no label, or a record too long for the format (2**29 bytes).
        """
        data = _header(key, labels) + payload
        if len(data) > _LENGTH_MASK:
            raise ValueError(f"record {key} has {len(data)} bytes, the format allows {_LENGTH_MASK}")
        self._index.write(f"{key}\t{self._file.tell()}\n")
        self._append(data)

    def rewrite_first(self, labels: tuple[float, ...]) -> None:
        """Replace record 0, which stands first and holds as many labels, once its labels are known."""
        end = self._file.tell()
        self._file.seek(0)
        self._append(_header(0, labels))
        self._file.seek(end)

    def _append(self, data: bytes) -> None:
        pieces = _split_at_magic(data)
        for i, piece in enumerate(pieces):
            flag = 0 if len(pieces) == 1 else 1 if i == 0 else 3 if i == len(pieces) - 1 else 2
            self._file.write(_PART.pack(MAGIC, flag << _LENGTH_BITS | len(piece)))
            self._file.write(piece + bytes(-len(piece) % 4))


def _header(key: int, labels: tuple[float, ...]) -> bytes:
    if not labels:
        raise ValueError("a record needs a label")
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], key, 0)
    return _HEADER.pack(len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels)


def _split_at_magic(data: bytes) -> list[bytes]:
    """Cut out every magic number that stands on a multiple of four, where a reader would look for one."""
    pieces, start, at = [], 0, data.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            pieces.append(data[start:at])
            start = at + 4
        at = data.find(_MAGIC_BYTES, max(start, at + 1))
    return [*pieces, data[start:]]
