"""What kind of data a path holds."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from bench.data.decode import shown
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
