"""InsightFace RecordIO of any size as a source: 20 bytes of memory an image, whatever the images weigh."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, Limits, shown
from bench.data.recordio import MAGIC, RecordFile
from bench.data.sources.ranges import read_ranges
from bench.data.sources.source import EncodedSource, OnError
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


#: From here on float32 leaves out whole numbers.
_FIRST_INEXACT = 2**24
#: Bytes of a record of two labels and no image.
_WITHOUT_IMAGE = HEAD.itemsize


class RecordIOSource(EncodedSource):
    """The images of a ``.rec`` file, or of the ``train.rec`` in a folder.

    Opening reads the index and the labels: off the first image of every identity where the file says which images are
    whose, else off all headers, in one pass through the file. What an image's own header says is compared with that
    when it is read.

    Args:
        path: the file or folder.
        image_size: S, in pixels.
        on_error: what becomes of an image that cannot be decoded.
        limits: what one image may cost.

    Raises:
        MissingError: there is no such file.
        DataError: it is empty, cut off or damaged, or its index does not fit it.
    """

    def __init__(
        self, path: Path, image_size: int, *, on_error: OnError = "refuse", limits: Limits = DEFAULT_LIMITS
    ) -> None:
        table = RecordTable.open(path / "train.rec" if path.is_dir() else path)
        self.table, ranges = _images(table)
        if not len(self.table):
            raise DataError(f"{shown(table.path)} holds no image")
        if ranges is None:
            values = self._own_labels(np.arange(len(self.table)))
        else:
            values = np.repeat(self._own_labels(ranges[:, 0] - 1), ranges[:, 1] - ranges[:, 0])
        found, labels = np.unique(values, return_inverse=True)
        super().__init__(table.path, image_size, labels.astype(np.int32), found, on_error=on_error, limits=limits)

    def name(self, label: int) -> str:
        """``train:000012``, as where the set is loaded as a whole."""
        return f"train:{int(self._names[label]):06d}"

    def where(self, row: int) -> str:
        """File, record and offset."""
        return self.table.where(row)

    def _own_labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._whole(rows, self.table.heads(rows))

    def _whole(self, rows: NDArray[np.int64], heads: NDArray[np.void]) -> NDArray[np.int64]:
        """The labels in the headers."""
        labels = np.where(heads["count"] > 0, heads["first"], heads["label"]).astype(np.float64)
        bad = np.flatnonzero(~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))))
        if len(bad):
            row = int(rows[bad[0]])
            raise DataError(f"{self.where(row)} has the identity {labels[bad[0]]}, which is no whole number")
        return labels.astype(np.int64)

    def _encoded(self, rows: NDArray[np.int64]) -> list[Tensor]:
        buffer, begin, end, heads = self.table.bodies(rows)
        labels, known = self._whole(rows, heads), np.asarray(self._names)[self.labels[rows]]
        if not np.array_equal(labels, known):
            i = int(np.flatnonzero(labels != known)[0])
            raise DataError(
                f"{self.where(int(rows[i]))} is of identity {labels[i]}, "
                f"but the file's list of identities says {known[i]}"
            )
        data = torch.from_numpy(buffer)
        return [data[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]


def _images(table: RecordTable) -> tuple[RecordTable, NDArray[np.int64] | None]:
    """The image records, and the keys [first, end) of each identity, int64 (K, 2), where the file has them.

    Raises:
        DataError: the header of the pack claims what cannot be, or images that are not there.
    """
    header = _pairs(table, np.zeros(1, dtype=np.int64)) if table.keys[0] == 0 else None
    if header is None:
        return table, None
    first, last = header[0].tolist()
    if not 1 <= first <= last:
        raise DataError(f"{table.where(0)}: the header claims the image range {first} to {last}")
    if last >= _FIRST_INEXACT:
        # Labels are float32: these are rounded, and so are the ranges. Records of identities are known by their size.
        return table.select(np.flatnonzero((table.keys > 0) & (table.sizes > _WITHOUT_IMAGE))), None
    wanted = np.arange(1, first)
    rows = np.searchsorted(table.keys, wanted)
    absent = wanted[table.keys[np.minimum(rows, len(table) - 1)] != wanted]
    if len(absent):
        raise DataError(
            f"{shown(table.path)} is incomplete: its header promises images 1 to {first - 1}, "
            f"{len(absent)} of them are missing, the first is {absent[0]}"
        )
    people = np.flatnonzero((table.keys >= first) & (table.keys < last))
    ranges = _pairs(table, people) if len(people) else None
    if ranges is not None:
        ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
        ranges = ranges[ranges[:, 1] > ranges[:, 0]]
        # They are taken at their word only where they share out all images.
        if not np.array_equal(np.append(ranges[:, 0], first), np.append(1, ranges[:, 1])):
            ranges = None
    return table.select(rows), ranges


def _pairs(table: RecordTable, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The two labels of each record, (n, 2), if all of these hold two whole numbers."""
    heads = table.heads(rows)
    pairs = np.stack((heads["first"], heads["second"]), axis=1)
    sound = (heads["count"] == 2) & np.isfinite(pairs).all(axis=1)
    if not sound.all() or not np.array_equal(pairs, np.floor(pairs)):
        return None
    return pairs.astype(np.int64)
