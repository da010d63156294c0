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


def layout_of(path: Path) -> Layout:
    """Tell the layouts apart by what is there; nothing is read.

    Raises:
        MissingError: there is no such path.
        DataError: a file that is neither ``.rec`` nor ``.bin``.
    """
    if path.is_dir():
        packed = (path / "train.rec").is_file() or any(path.glob("*.bin"))
        return Layout.INSIGHTFACE if packed else Layout.FOLDER
    if not path.exists():
        raise MissingError(f"{shown(path)} does not exist")
    if path.suffix == ".rec":
        return Layout.RECORDS
    if path.suffix == ".bin":
        return Layout.PACK
    raise DataError(f"{shown(path)} is neither a folder nor a .rec or .bin file")
