"""Reads what a run kept for looking at: ``samples/samples.json`` and the pictures that it names."""

from __future__ import annotations

import base64
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.errors import MissingError

_PNG = b"\x89PNG\r\n\x1a\n"


class Victim(BaseModel):
    """One victim image and what became of it.

    Attributes:
        image: its index in the dataset's victims.
        roles: ``worst`` (most leaks), ``median``, ``best``; ``first`` for those that every run on them shows.
        caption: its figures.
        files: column -> name of a PNG in the folder.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    image: int
    roles: tuple[str, ...]
    caption: str
    files: dict[str, str]


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    columns: tuple[str, ...]
    victims: tuple[Victim, ...]


class Samples(BaseModel):
    """The pictures of a run.

    Attributes:
        folder: holds them.
        columns: what there is of each victim, from left to right; empty where there is only a ready sheet.
        victims: those that were kept.
        sheet: a ready contact sheet, where there is one.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    columns: tuple[str, ...] = ()
    victims: tuple[Victim, ...] = ()
    sheet: Path | None = None


def read_samples(folder: Path) -> Samples | None:
    """The pictures in ``folder``; None where there are none.

    Raises:
        MissingError: the index is damaged, or names a file outside the folder or one that is not there.
    """
    sheet = folder / "contact-sheet.png"
    ready = sheet if sheet.is_file() else None
    path = folder / "samples.json"
    if not path.is_file():
        return None if ready is None else Samples(folder=folder, sheet=ready)
    try:
        index = _Index.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise MissingError(f"{path} is not an index of samples") from None
    for victim in index.victims:
        for name in victim.files.values():
            if Path(name).name != name or not (folder / name).is_file() or (folder / name).is_symlink():
                raise MissingError(f"{path} names {name!r}, which is no file of this folder")
    return Samples(folder=folder, columns=index.columns, victims=index.victims, sheet=ready)


def data_uri(path: Path) -> str:
    """A PNG file as a ``data:`` address.

    Raises:
        MissingError: it is no PNG.
    """
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise MissingError(f"{path} is not a PNG picture")
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
