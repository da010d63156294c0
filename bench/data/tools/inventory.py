"""What lies in a dataset, image by image, without decoding: the ground that ``info`` and ``verify`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import MIN_SIDE, shown
from bench.data.encoded import EncodedSource
from bench.data.sources.folder import PAIRS, FolderSource
from bench.data.sources.insightface import PackSource, RecordIOSource
from bench.data.sources.webdataset import WebDatasetSource
from bench.errors import DataError, MissingError


class Layout(StrEnum):
    """The layouts that the suite reads."""

    INSIGHTFACE = "insightface"
    FOLDER = "folder"
    RECORDS = "record file"
    PACK = "verification pack"
    SHARDS = "tar shards"


def layout_of(path: Path) -> Layout:
    """Tell the layouts apart by what is there; nothing is read.

    Raises:
        MissingError: there is no such path.
        DataError: a file that is neither ``.rec``, ``.bin`` nor ``.tar``.
    """
    if path.is_dir():
        packed = (path / "train.rec").is_file() or any(path.glob("*.bin"))
        if packed:
            return Layout.INSIGHTFACE
        return Layout.SHARDS if any(path.glob("*.tar")) else Layout.FOLDER
    if path.suffix == ".tar":
        return Layout.SHARDS  # one, or the pattern of several
    if not path.exists():
        raise MissingError(f"{shown(path)} does not exist")
    if path.suffix == ".rec":
        return Layout.RECORDS
    if path.suffix == ".bin":
        return Layout.PACK
    raise DataError(f"{shown(path)} is neither a folder nor a .rec or .bin file, nor a .tar shard")


@dataclass(frozen=True, slots=True)
class Pairs:
    """A pair list found in a dataset.

    Attributes:
        file: its name.
        ends: int64 (P, 2), rows of the part that it belongs to.
        same: bool (P,).
        folds: how many.
    """

    file: str
    ends: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: int


@dataclass(frozen=True, slots=True)
class Part:
    """One file or folder of a dataset.

    Attributes:
        name: the file, or "." for a folder of images.
        source: its reader.
        pairs: its pair list, if any.
    """

    name: str
    source: EncodedSource
    pairs: Pairs | None = None


def files_of(path: Path) -> list[Path]:
    """The files or folders that the dataset at ``path`` is made of.

    Raises:
        MissingError: there is nothing.
        DataError: a file of another kind.
    """
    if layout_of(path) is not Layout.INSIGHTFACE:
        return [path]
    return [file for file in (path / "train.rec",) if file.is_file()] + sorted(path.glob("*.bin"))


def open_part(file: Path) -> Part:
    """One of :func:`files_of`.

    Raises:
        DataError: a structure that cannot be read.
    """
    return _OPEN[layout_of(file)](file)


def _tree(root: Path) -> Part:
    source = FolderSource(root, MIN_SIDE)
    if not (root / PAIRS).exists():
        return Part(".", source)
    listed, ends = source.locate_pairs(root / PAIRS)
    return Part(".", source, Pairs(PAIRS, ends, listed.same, listed.folds))


def _pack(path: Path) -> Part:
    source, name = PackSource(path, MIN_SIDE), shown(path.name)
    return Part(name, source, Pairs(name, np.arange(len(source)).reshape(-1, 2), source.same, int(source.fold[-1]) + 1))


_OPEN: dict[Layout, Callable[[Path], Part]] = {
    Layout.FOLDER: _tree,
    Layout.RECORDS: lambda path: Part(shown(path.name), RecordIOSource(path, MIN_SIDE)),
    Layout.PACK: _pack,
    Layout.SHARDS: lambda path: Part(shown(path.name) or ".", WebDatasetSource(path, MIN_SIDE)),
}
