"""InsightFace RecordIO of any size as a source: 20 bytes of memory an image, whatever the images weigh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, Limits, shown
from bench.data.stream.record_table import HEAD, RecordTable
from bench.data.stream.source import EncodedSource, OnError
from bench.errors import DataError

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
