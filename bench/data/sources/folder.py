"""Folders of images: ``root/identity/image.*``, with an LFW-style ``pairs.txt`` where there is one."""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from bench.data.decode import SUFFIXES, Encoded, ImageError, read_image_file, shown
from bench.data.encoded import EncodedSource, IdentityView, OpenedSet
from bench.data.faces import PairProtocol, Skipped
from bench.data.loaders import Dataset
from bench.data.pairs import NamedPair, PairList, read_pairs
from bench.errors import DataError, MissingError

PAIRS = "pairs.txt"


class FolderOptions(BaseModel, frozen=True, extra="forbid"):
    use_pairs: bool = Field(
        True, description="Follow pairs.txt if there is one; false draws pairs by seed all the same."
    )
    crop: float = Field(
        1.0, gt=0, le=1, description="Side of the central square that is kept, as a share of the shorter side."
    )


def pairs_in(root: Path) -> Path | None:
    """The list of pairs that lies in a folder of identities, if there is one."""
    return root / PAIRS if (root / PAIRS).exists() else None


def open_folder(root: Path, image_size: int, options: FolderOptions) -> OpenedSet:
    """A folder of identities.

    With a ``pairs.txt`` the people it names are the victims, with all their images, and everyone else is there to
    learn from. Without one, victims are split off and pairs drawn later, by seed.

    Raises:
        MissingError: there is no such folder.
        DataError: no image, a pair that names what is not there, or nobody left to learn from.
    """
    pairs_file = pairs_in(root) if options.use_pairs else None
    return FolderSource(root, image_size, crop=options.crop, pairs_file=pairs_file).opened()


DATASET = Dataset("root/identity/image.*, with an optional LFW-style pairs.txt", FolderOptions, open_folder)


class FolderSource(EncodedSource):
    """``root/identity/image.*``: some tens of bytes of memory an image, for its name.

    Identities, and images within each, come in the order of their names; names that start with a dot are passed over.

    ``pairs_file`` is an LFW-style list of verification pairs, read as ``listed``. Image 4 of ``Jo_Doe`` is the file
    whose name is ``Jo_Doe_0004`` up to its suffix; without such a file, the only one in the folder whose name ends in
    the number 4.

    Raises:
        MissingError: there is no such folder, or no such list.
        DataError: it cannot be listed, or holds no image one level down; or the list is none, or a person or image is
            not there, or two files would do, with the line number.
    """

    def __init__(self, path: Path, image_size: int, *, crop: float = 1.0, pairs_file: Path | None = None) -> None:
        if not path.is_dir():
            raise MissingError(f"{shown(path)} is not a folder: expected one with a sub-folder of images per identity")
        files: dict[str, list[bytes]] = {}
        ignored: list[Skipped] = []
        try:
            for entry in _visible(path):
                if not entry.is_dir():
                    if _is_image(entry.name):
                        ignored.append(Skipped(shown(entry.name), "lies beside the identity folders, not in one"))
                    continue
                for file in _visible(entry):
                    if _is_image(file.name):
                        files.setdefault(entry.name, []).append(os.fsencode(file.name))
                    else:
                        what = "a folder within an identity" if file.is_dir() else "not named like an image"
                        ignored.append(Skipped(shown(f"{entry.name}/{file.name}"), what))
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be listed: {error.strerror or error}") from error
        if not files:
            raise DataError(
                f"{shown(path)} holds no images: expected {shown(path.name)}/<identity>/<image>.jpg or .png"
            )
        if len(set(map(shown, files))) < len(files):
            raise DataError(f"{shown(path)} has two folders whose names differ in unprintable characters only")
        counts = list(map(len, files.values()))
        labels = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        self._first = np.cumsum(counts) - counts
        self._files = [b"\0".join(images) for images in files.values()]  # no object per image: no name holds a zero
        super().__init__(path, image_size, labels, list(files), crop=crop, ignored=ignored)
        self.pairs_file = pairs_file
        self.listed = None if pairs_file is None else read_pairs(pairs_file)
        if self.listed is not None:
            first, second = torch.from_numpy(self._locate(self.listed).T.copy())
            same, fold = torch.from_numpy(self.listed.same), torch.from_numpy(self.listed.fold)
            self.pairs = PairProtocol(first, second, same, fold)

    def name(self, label: int) -> str:
        return shown(self._names[label])

    def file(self, row: int) -> Path:
        """The image's file."""
        label = int(self.labels[row])
        name = self._files[label].split(b"\0")[row - int(self._first[label])]
        return self.path / str(self._names[label]) / os.fsdecode(name)

    def where(self, row: int) -> str:
        return shown(self.file(row).relative_to(self.path))

    def where_pair(self, number: int) -> str:
        assert self.listed is not None
        return f"{shown(self.pairs_file)} line {self.listed.pairs[number].line}"

    def encoded(self, rows: NDArray[np.int64]) -> list[Encoded]:
        encoded: list[Encoded] = []
        for row in rows.tolist():
            try:
                encoded.append(torch.tensor(bytearray(read_image_file(self.file(row))), dtype=torch.uint8))
            except ImageError as error:
                encoded.append(error)
        return encoded

    def _locate(self, listed: PairList) -> NDArray[np.int64]:
        """The rows that the pairs mean, int64 (P, 2)."""
        label_of = {_composed(self.name(label)): label for label in range(self.identities)}

        @functools.cache
        def photos(name: str) -> tuple[dict[str, list[int]], dict[int, list[int]]]:
            """Rows of a person's images by stem, and by the number that the stem ends in."""
            by_stem: dict[str, list[int]] = {}
            by_number: dict[int, list[int]] = {}
            label = label_of[name]
            for row, file in enumerate(self._files[label].split(b"\0"), int(self._first[label])):
                stem = _composed(PurePath(os.fsdecode(file)).stem)
                by_stem.setdefault(stem, []).append(row)
                if ending := re.search(r"[0-9]+$", stem):
                    by_number.setdefault(int(ending[0]), []).append(row)
            return by_stem, by_number

        def locate(photo: tuple[str, int], pair: NamedPair) -> int:
            name, number = _composed(photo[0]), photo[1]
            rows: list[int] = []
            if name in label_of:
                by_stem, by_number = photos(name)
                rows = by_stem.get(f"{name}_{number:04d}") or by_number.get(number) or []
            if len(rows) != 1:
                what = f"names image {number} of {shown(name)!r}, "
                if name not in label_of:
                    near = get_close_matches(name, label_of, n=3, cutoff=0.5) or list(itertools.islice(label_of, 3))
                    what = f"names {shown(name)!r}, who has no folder with images in {shown(self.path)} ({_some(near)})"
                elif rows:
                    what += f"and {len(rows)} files answer to that ({_some(map(self.where, rows))})"
                else:
                    there = [self.where(row) for found in by_stem.values() for row in found]
                    near = get_close_matches(f"{name}/{name}_{number:04d}", there, n=3, cutoff=0) or there
                    what += (
                        f"which is not there: wanted {shown(f'{name}_{number:04d}')}.*, or the only file whose name "
                    )
                    what += f"ends in {number} ({_some(near)})"
                raise DataError(f"{shown(self.pairs_file)} line {pair.line} {what}")
            return rows[0]

        return np.asarray([(locate(pair.first, pair), locate(pair.second, pair)) for pair in listed.pairs])

    def opened(self) -> OpenedSet:
        """The data set, in which the people whom its pairs name are the victims.

        Raises:
            DataError: fewer than two other people.
        """
        everyone = IdentityView.everything(self)
        if self.pairs is None:
            return OpenedSet(everyone)
        ends = torch.stack((self.pairs.first, self.pairs.second)).numpy()
        wanted = np.unique(self.labels[ends])
        if (others := self.identities - len(wanted)) < 2:
            raise DataError(
                f"{shown(self.pairs_file)} names all but {others} of the people in {shown(self.path)}: at least 2 "
                "others are needed to learn from (use_pairs=false splits everyone by seed instead)"
            )
        victims = everyone.of_identities(torch.from_numpy(wanted))
        first, second = torch.from_numpy(np.searchsorted(victims.rows, ends))
        return OpenedSet(
            everyone.where_true(~np.isin(self.labels, wanted)), victims, replace(self.pairs, first=first, second=second)
        )


def _composed(name: str) -> str:
    """A name in Unicode's composed form: file systems and editors differ in how they write an accent."""
    return unicodedata.normalize("NFC", name)


def _some(names: Iterable[str]) -> str:
    """The first names of what there is, for a message."""
    some = list(itertools.islice(names, 4))
    return f"there is {', '.join(map(shown, some[:3]))}{', ...' if len(some) > 3 else ''}"


def _visible(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return PurePath(name).suffix.lower() in SUFFIXES
