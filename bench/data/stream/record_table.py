"""Where every record of a RecordIO file lies, as arrays, and batches of records read through them."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import shown
from bench.data.recordio import MAGIC, RecordFile
from bench.data.stream.ranges import read_ranges
from bench.errors import DataError, MissingError

#: A part's and an image's header with room for two labels behind it: see :mod:`bench.data.recordio`.
HEAD = np.dtype(
    [
        ("magic", "<u4"),
        ("word", "<u4"),
        ("count", "<u4"),
        ("label", "<f4"),
        ("ids", "<u8", 2),
        ("first", "<f4"),
        ("second", "<f4"),
    ]
)
#: Bytes before a part's data, and of an image header.
_PART, _HEADER = 8, 24
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
#: Records whose headers are read at once.
_AT_ONCE = 4096


class RecordTable:
    """Keys, offsets and sizes of records, by key; 16 bytes a record.

    Attributes:
        path: the ``.rec`` file.
        keys: (N,), ascending, in the smallest type that holds them.
        offsets: int64 (N,).
        sizes: uint32 (N,), bytes up to the next record.
    """

    def __init__(self, path: Path, keys: NDArray[np.int64], offsets: NDArray[np.int64], sizes: NDArray[np.int64]):
        self.path, self.offsets, self.sizes = path, offsets, sizes.astype(np.uint32)
        self.keys = keys.astype(np.min_scalar_type(int(keys.max(initial=0))))

    @classmethod
    def open(cls, path: Path) -> RecordTable:
        """Read the index beside ``path``; without one, scan the file.

        Raises:
            MissingError: there is no such file.
            DataError: it is empty or cut off, or the index does not fit it.
        """
        if not path.is_file():
            raise MissingError(f"{shown(path)} does not exist")
        keys, offsets = _read_index(path)
        end = path.stat().st_size
        by_place = np.argsort(offsets, kind="stable")
        sizes = np.empty_like(offsets)
        sizes[by_place] = np.diff(offsets[by_place], append=end)
        if sizes.max() > np.iinfo(np.uint32).max:
            row = int(sizes.argmax())
            raise DataError(
                f"{shown(path.with_suffix('.idx'))} does not fit {shown(path.name)}: {sizes[row]} bytes lie between "
                f"record {keys[row]} and the next (delete the index to have the file scanned)"
            )
        by_key = np.argsort(keys, kind="stable")
        table = cls(path, keys[by_key], offsets[by_key], sizes[by_key])
        table.bodies(np.array([table.offsets.argmax()]))  # a file that was cut off ends within its last record
        return table

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: NDArray[np.int64]) -> RecordTable:
        """The table of some of the records."""
        return RecordTable(self.path, self.keys[rows], self.offsets[rows], self.sizes[rows].astype(np.int64))

    def where(self, row: int) -> str:
        """File, record and offset."""
        return f"{shown(self.path.name)} record {self.keys[row]} at offset {self.offsets[row]}"

    def heads(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """The headers of some records, :data:`HEAD` (n,), read in the order in which they lie on disk.

        Raises:
            DataError: one of them is damaged.
        """
        heads = np.empty(len(rows), dtype=HEAD)
        by_place = np.argsort(self.offsets[rows], kind="stable")
        for start in range(0, len(rows), _AT_ONCE):
            part = by_place[start : start + _AT_ONCE]
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
        begin = at + _PART + _HEADER + 4 * heads["count"].astype(np.int64)
        return buffer, begin, at + _PART + (heads["word"] & _LENGTH_MASK), heads

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
        sound &= (_PART + length <= self.sizes[rows]) & (length >= _HEADER + 4 * heads["count"].astype(np.int64))
        return heads, sound

    def _joined(self, row: int) -> bytes:
        """A record that was split where the magic number occurs in it, rewritten in one part.

        Raises:
            DataError: it was not split but is damaged; names file, record and offset.
        """
        start, end = int(self.offsets[row]), int(self.offsets[row]) + int(self.sizes[row])
        data = read_ranges([self.path], *(np.array([n]) for n in (0, start, end - start)))[0].tobytes()
        pieces: list[bytes] = []
        at, flag = 0, 2
        while flag not in (0, 3):
            if at + _PART > len(data):
                raise self._damaged(row, "it ends within a part")
            magic, word = struct.unpack_from("<II", data, at)
            flag, length = word >> _LENGTH_BITS, word & _LENGTH_MASK
            if magic != MAGIC or (flag not in (0, 1) if not pieces else flag not in (2, 3)):
                raise self._damaged(row, f"no part starts {at} bytes into it")
            if at + _PART + length > len(data):
                raise self._damaged(row, f"it claims {length} bytes, {len(data) - at - _PART} are left")
            pieces.append(data[at + _PART : at + _PART + length])
            at += _PART + (length + 3 & ~3)
        body = struct.pack("<I", MAGIC).join(pieces)
        count = struct.unpack_from("<I", body)[0] if len(body) >= _HEADER else 0
        if len(body) < _HEADER + 4 * count:
            raise self._damaged(row, f"it has {len(body)} bytes, its header and {count} labels need more")
        return struct.pack("<II", MAGIC, len(body)) + body

    def _damaged(self, row: int, what: str) -> DataError:
        return DataError(f"{self.where(row)} is damaged: {what}")


def _read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets, without an object per line; what is wrong with them is said by :class:`RecordFile`."""
    index = path.with_suffix(".idx")
    end = path.stat().st_size
    if index.is_file() and end:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how numpy says that it stopped at something else
            try:
                table = np.fromfile(index, dtype=np.int64, sep=" ")
            except (DeprecationWarning, ValueError):
                table = np.empty(0, dtype=np.int64)
        if len(table) and len(table) % 2 == 0:
            keys, offsets = table[0::2].copy(), table[1::2].copy()
            if offsets.min() >= 0 and offsets.max() + _PART <= end and len(np.unique(keys)) == len(keys):
                return keys, offsets
    with RecordFile(path) as records:
        return records.keys.astype(np.int64), records.offsets.astype(np.int64)
