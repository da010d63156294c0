"""Many short stretches of large files, read in as few and as sequential reads as they allow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import shown
from bench.errors import DataError, MissingError

#: Stretches that are no further apart than this are read at once: cheaper than a second request, on any disk.
GAP = 16 * 1024
#: Room for each file in the address space in which stretches of several files are sorted: 16 TiB.
_ROOM = 44


def read_ranges(
    paths: Sequence[Path],
    file: NDArray[np.int64],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    *,
    spare: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read N stretches, in the order in which they lie on disk.

    No file stays open and no position is shared, so that threads and forked processes can read at the same time.

    Each begins ``offset`` bytes into ``paths[file]`` and has ``size`` bytes, (N,) each; they may repeat and overlap.

    Returns:
        One writable buffer, with ``spare`` zeros at its end, and where in it each stretch begins: int64 (N,).

    Raises:
        MissingError: a file is no longer there.
        DataError: a file cannot be read, or ends within a stretch.
    """
    address = (file << _ROOM) + offset
    order = np.argsort(address, kind="stable")
    begin, end = address[order], np.maximum.accumulate((address + size)[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = (begin[1:] > end[:-1] + GAP) | (begin[1:] >> _ROOM != begin[:-1] >> _ROOM)
    starts = np.flatnonzero(first)
    lengths = end[np.append(starts[1:], len(order)) - 1] - begin[starts] if len(order) else begin
    places = np.cumsum(lengths) - lengths
    buffer = np.empty(int(lengths.sum()) + spare, dtype=np.uint8)
    buffer[len(buffer) - spare :] = 0
    opened, descriptor = -1, -1
    try:
        for address_, length, place in zip(begin[starts].tolist(), lengths.tolist(), places.tolist(), strict=True):
            number, at = address_ >> _ROOM, address_ & (1 << _ROOM) - 1
            if number != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor = -1
                descriptor, opened = _open(paths[number]), number
            _fill(descriptor, buffer[place : place + length], at, paths[number])
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    run = np.cumsum(first) - 1
    position = np.empty(len(order), dtype=np.int64)
    position[order] = places[run] + begin - begin[starts][run]
    return buffer, position


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise MissingError(f"{shown(path)} is no longer there") from error
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from error


def _fill(descriptor: int, target: NDArray[np.uint8], at: int, path: Path) -> None:
    done = 0
    while done < len(target):
        try:
            got = os.preadv(descriptor, [target[done:].data], at + done)
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read at offset {at + done}: {error.strerror or error}") from error
        if not got:
            raise DataError(
                f"{shown(path)} is truncated: it has {os.fstat(descriptor).st_size} bytes, and records are to be read "
                f"from offset {at} to {at + len(target)}"
            )
        done += got
