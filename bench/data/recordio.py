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

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import shown
from bench.errors import DataError, MissingError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One record, parsed.

    Attributes:
        labels: its float labels, at least one.
        identifier: the id written into it (the key, in InsightFace packs).
        payload: the encoded image; empty for records that hold labels only.
    """

    labels: tuple[float, ...]
    identifier: int
    payload: bytes


class RecordFile:
    """A memory-mapped record file with random access by key.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.rec"
    >>> with RecordWriter(path) as writer:
    ...     writer.write(0, (7.0,), b"abc")
    >>> with RecordFile(path) as records:
    ...     records.record(0).payload
    b'abc'

    Args:
        path: the ``.rec`` file.
        index: the ``.idx`` file; None takes the one beside it if there is one, and scans otherwise.

    Raises:
        MissingError: the file is not there.
        DataError: it is empty, its records do not follow one another, or the index does not fit it.
    """

    def __init__(self, path: Path, index: Path | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if path.stat().st_size == 0:
                    raise DataError(f"{shown(path)} is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise MissingError(f"{shown(path)} does not exist") from error
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
        self.index: Path | None = index if index is not None else path.with_suffix(".idx")
        if index is None and not path.with_suffix(".idx").exists():
            self.index = None
        try:
            if self.index is None:
                self.offsets = self.scan()
                self.keys = np.arange(len(self.offsets))
            else:
                self.keys, self.offsets = _read_index(self.index)
                self._check_offsets()
        except BaseException:
            self.close()
            raise
        self._row = {int(key): row for row, key in enumerate(self.keys)}

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.offsets)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def _fail(self, offset: int, what: str) -> DataError:
        return DataError(f"{shown(self.path)} is damaged at offset {offset}: {what}")

    def _part(self, offset: int) -> tuple[int, int]:
        """(flag, length) of the part at ``offset``, checked against the file."""
        if offset + _PART.size > len(self._map):
            raise self._fail(offset, "the file ends within a record")
        magic, word = _PART.unpack_from(self._map, offset)
        if magic != MAGIC:
            raise self._fail(offset, f"no record starts here (found {magic:#010x}, not {MAGIC:#010x})")
        length = word & _LENGTH_MASK
        if offset + _PART.size + length > len(self._map):
            raise self._fail(
                offset, f"the record claims {length} bytes, {len(self._map) - offset - _PART.size} are left"
            )
        return word >> _LENGTH_BITS, length

    def _parts(self, offset: int) -> Iterator[tuple[int, int, int]]:
        """(data offset, length, offset after it) of every part of the record at ``offset``."""
        first = offset
        flag, length = self._part(offset)
        if flag not in (0, 1):
            raise self._fail(offset, f"a record cannot start with part flag {flag}")
        while True:
            end = offset + _PART.size + (length + 3 & ~3)
            yield offset + _PART.size, length, end
            if flag in (0, 3):
                return
            offset = end
            flag, length = self._part(offset)
            if flag not in (2, 3):
                raise self._fail(offset, f"part flag {flag} within the record that starts at {first}")

    def scan(self) -> NDArray[np.int64]:
        """Offset of every record, found by reading the file from its start, whatever the index says.

        Raises:
            DataError: the records do not follow one another to the end.
        """
        offsets = []
        offset = 0
        while offset < len(self._map):
            offsets.append(offset)
            *_, (_, _, offset) = self._parts(offset)
        return np.asarray(offsets, dtype=np.int64)

    def _check_offsets(self) -> None:
        outside = np.flatnonzero((self.offsets < 0) | (self.offsets + _PART.size > len(self._map)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{shown(self.index)} does not fit {shown(self.path.name)}: key {self.keys[row]} points to offset "
                f"{self.offsets[row]}, the file has {len(self._map)} bytes (delete the index to have the file scanned)"
            )
        unique, counts = np.unique(self.keys, return_counts=True)
        if len(unique) < len(self.keys):
            raise DataError(f"{shown(self.index)} has key {unique[counts > 1][0]} more than once")

    def __contains__(self, key: int) -> bool:
        return key in self._row

    def offset(self, key: int) -> int:
        """Where the record ``key`` starts.

        Raises:
            DataError: there is no such record.
        """
        row = self._row.get(key)
        if row is None:
            raise DataError(f"{shown(self.index or self.path)} has no record {key}")
        return int(self.offsets[row])

    def raw(self, key: int) -> bytes:
        """The record ``key``, its parts joined."""
        pieces = [self._map[start : start + length] for start, length, _ in self._parts(self.offset(key))]
        return _MAGIC_BYTES.join(pieces)

    def record(self, key: int) -> Record:
        """The record ``key``, parsed.

        Raises:
            DataError: no such record, or it is damaged.
        """
        data = self.raw(key)
        if len(data) < _HEADER.size:
            raise self._fail(self.offset(key), f"record {key} has {len(data)} bytes, its header needs {_HEADER.size}")
        flag, label, identifier, _ = _HEADER.unpack_from(data)
        start = _HEADER.size + 4 * flag
        if start > len(data):
            raise self._fail(self.offset(key), f"record {key} claims {flag} labels and ends before them")
        labels = struct.unpack_from(f"<{flag}f", data, _HEADER.size) if flag else (label,)
        return Record(labels, identifier, data[start:])

    def labels(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """First label of each of the given records, (N,); vectorised, the images are not touched.

        Raises:
            DataError: no such record, or a damaged one.
        """
        offsets = np.fromiter((self.offset(int(key)) for key in keys), dtype=np.int64, count=len(keys))
        labels = np.empty(len(keys), dtype=np.float64)
        fits = offsets + _PART.size + _HEADER.size + 4 <= len(self._map)
        simple = np.flatnonzero(fits)
        view = np.frombuffer(self._map, dtype=np.uint8)
        span = np.arange(_PART.size + _HEADER.size + 4)
        for block in np.array_split(simple, max(1, len(simple) // 2**16)):
            fields = view[offsets[block, None] + span]
            magic, word, flag = (fields[:, 4 * i : 4 * i + 4].copy().view("<u4")[:, 0] for i in range(3))
            alone, after = (fields[:, o : o + 4].copy().view("<f4")[:, 0] for o in (12, 32))
            length = (word & _LENGTH_MASK).astype(np.int64)
            sound = (
                (magic == MAGIC)
                & (word >> _LENGTH_BITS == 0)
                & (offsets[block] + _PART.size + length <= len(self._map))
                & (length >= _HEADER.size + 4 * flag.astype(np.int64))
            )
            labels[block] = np.where(flag > 0, after, alone)
            fits[block] = sound
        del view  # a buffer that is still exported would keep the file mapped
        # What is split, damaged or at the very end takes the checked way, which also names what is wrong.
        for row in np.flatnonzero(~fits):
            labels[row] = self.record(int(keys[row])).labels[0]
        return labels

    def header(self) -> tuple[int, int] | None:
        """(h0, h1) of a face pack's header record, or None where record 0 is no header.

        Raises:
            DataError: the header claims what cannot be.
        """
        if 0 not in self:
            return None
        record = self.record(0)
        if record.payload or len(record.labels) != 2:
            return None
        if not all(np.isfinite(record.labels)) or not 1 <= record.labels[0] <= record.labels[1]:
            raise self._fail(self.offset(0), f"the header claims the image range {record.labels}")
        return int(record.labels[0]), int(record.labels[1])

    def image_keys(self) -> NDArray[np.int64]:
        """Keys of the image records: 1 .. h0-1 under a header, else every record.

        Raises:
            DataError: the header names records that are not there.
        """
        header = self.header()
        if header is None:
            return np.sort(self.keys)
        keys = np.arange(1, header[0], dtype=np.int64)
        absent = np.setdiff1d(keys, self.keys)
        if len(absent):
            raise DataError(
                f"{shown(self.path)} is incomplete: its header promises images 1 to {header[0] - 1}, "
                f"{len(absent)} of them are missing, the first is {absent[0]}"
            )
        return keys


def _read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise MissingError(f"{shown(path)} does not exist") from error
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)} is no index: byte {error.start} is not ASCII text") from error
    lines = text.splitlines()
    try:
        table = np.asarray([line.split() for line in lines if line.strip()], dtype=np.int64)
    except (ValueError, OverflowError):
        table = np.empty((0, 0), dtype=np.int64)
    if table.ndim != 2 or table.shape[1] != 2:
        for number, line in enumerate(lines, 1):
            columns = line.split()
            if columns and not (len(columns) == 2 and all(c.isdecimal() for c in columns)):
                raise DataError(f"{shown(path)} line {number}: expected 'key<tab>offset', got {shown(line[:60])!r}")
        raise DataError(f"{shown(path)} is no index: expected lines 'key<tab>offset'")
    return table[:, 0].copy(), table[:, 1].copy()


@dataclass(frozen=True, slots=True)
class Property:
    """The ``property`` file: ``identities,height,width``."""

    identities: int
    height: int
    width: int


def read_property(path: Path) -> Property | None:
    """The ``property`` file, or None where there is none.

    Raises:
        DataError: it is not three whole numbers.
    """
    try:
        fields = path.read_text(encoding="ascii", errors="replace").strip().split(",")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    if len(fields) != 3 or not all(field.strip().isdecimal() for field in fields):
        raise DataError(f"{shown(path)}: expected 'identities,height,width', got {shown(','.join(fields)[:60])!r}")
    return Property(*(int(field) for field in fields))


class RecordWriter:
    """Writes a ``.rec`` and its ``.idx``; a context manager.

    Args:
        path: the ``.rec`` file; the index goes beside it.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._index = path.with_suffix(".idx").open("w", encoding="ascii", newline="\n")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._index.close()

    def write(self, key: int, labels: tuple[float, ...], payload: bytes = b"") -> None:
        """Append a record.

        Args:
            key: its key and id.
            labels: one float, stored in the header, or several, stored behind it.
            payload: the encoded image.

        Raises:
            ValueError: no label, or a record too long for the format (2**29 bytes).
        """
        data = _encode(key, labels) + payload
        if len(data) > _LENGTH_MASK:
            raise ValueError(f"record {key} has {len(data)} bytes, the format allows {_LENGTH_MASK}")
        self._index.write(f"{key}\t{self._file.tell()}\n")
        self._append(data)

    def rewrite_first(self, labels: tuple[float, ...]) -> None:
        """Replace record 0, which stands first and holds as many labels, once its labels are known."""
        end = self._file.tell()
        self._file.seek(0)
        self._append(_encode(0, labels))
        self._file.seek(end)

    def _append(self, data: bytes) -> None:
        pieces = _split_at_magic(data)
        for i, piece in enumerate(pieces):
            flag = 0 if len(pieces) == 1 else 1 if i == 0 else 3 if i == len(pieces) - 1 else 2
            self._file.write(_PART.pack(MAGIC, flag << _LENGTH_BITS | len(piece)))
            self._file.write(piece + bytes(-len(piece) % 4))


def _encode(key: int, labels: tuple[float, ...]) -> bytes:
    if not labels:
        raise ValueError("a record needs a label")
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], key, 0)
    return _HEADER.pack(len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels)


def _split_at_magic(data: bytes) -> list[bytes]:
    """Cut out every magic number that stands on a multiple of four, where a reader would look for one."""
    pieces, start, found = [], 0, data.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            pieces.append(data[start:found])
            start = found + 4
            found = data.find(_MAGIC_BYTES, start)
        else:
            found = data.find(_MAGIC_BYTES, found + 1)
    return [*pieces, data[start:]]
