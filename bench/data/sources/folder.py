"""Folders of images: ``root/identity/image.*``, with an LFW-style ``pairs.txt`` where there is one."""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from bench.data.base import Skipped
from bench.data.decode import SUFFIXES, Encoded, ImageError, in_array, open_image, read_image_file, shown
from bench.data.encoded import EncodedSource, IdentityView, OpenedSet
from bench.data.loaders import Dataset
from bench.data.pairs import NamedPair, PairList, PairRows, read_pairs
from bench.errors import DataError, MissingError

PAIRS = "pairs.txt"


class FolderOptions(BaseModel, frozen=True, extra="forbid"):
    use_pairs: bool = Field(
        True, description="Follow pairs.txt if there is one; false draws pairs by seed all the same."
    )
    crop: float = Field(
        1.0, gt=0, le=1, description="Side of the central square that is kept, as a share of the shorter side."
    )
    nested: bool | None = Field(
        None,
        description="Images lie one folder deeper, root/identity/session/image.*; by default where no identity has any "
        "in its own folder and these do not look like train/val/identity.",
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
    return FolderSource(root, image_size, crop=options.crop, nested=options.nested, pairs_file=pairs_file).opened()


DATASET = Dataset("root/identity/image.*, with an optional LFW-style pairs.txt", FolderOptions, open_folder)


class FolderSource(EncodedSource):
    """``root/identity/image.*``: some tens of bytes of memory an image, for its name.

    Identities, and images within each, come in the order of their names; names that start with a dot are passed over.
    Images are known by their suffix, or, where there is none with such a suffix, by their content. Where they lie one
    folder deeper (``nested``, by default where no identity has one in its own folder), these are sessions of a person.

    ``pairs_file`` is an LFW-style list of verification pairs, read as ``listed``. Image 4 of ``Jo_Doe`` is the file
    whose name is ``Jo_Doe_0004`` up to its suffix; without such a file, the only one in the folder whose name ends in
    the number 4.

    Raises:
        MissingError: there is no such folder, or no such list.
        DataError: it cannot be listed, or holds no image where they should be, or seems to be made of parts that are
            no people (``train``, ``val``); or the list is none, or a person or image is not there, or two files would
            do, with the line number.
    """

    def __init__(
        self,
        path: Path,
        image_size: int,
        *,
        crop: float = 1.0,
        nested: bool | None = None,
        pairs_file: Path | None = None,
    ) -> None:
        if not path.is_dir():
            raise MissingError(f"{shown(path)} is not a folder: expected one with a sub-folder of images per identity")
        try:
            files, ignored, note = _layout(path, nested)
        except OSError as error:
            raise DataError(f"{shown(error.filename or path)} cannot be listed: {error.strerror or error}") from error
        if note is not None:
            self.notes = (note,)
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
            first, second = self._locate(self.listed).T
            self.pairs = PairRows(first, second, self.listed.same, self.listed.fold)

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
                encoded.append(in_array(read_image_file(self.file(row))))
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
                    what = f"names {shown(name)!r}, who has no folder with images in {shown(self.path)} "
                    what += f"(there is {_some(near)})"
                elif rows:
                    what += f"and {len(rows)} files answer to that ({_some(map(self.where, rows))})"
                else:
                    there = [self.where(row) for found in by_stem.values() for row in found]
                    near = get_close_matches(f"{name}/{name}_{number:04d}", there, n=3, cutoff=0) or there
                    what += f"which is not there: wanted {shown(f'{name}_{number:04d}')}.*, or the only file whose "
                    what += f"name ends in {number} (there is {_some(near)})"
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
        ends = np.stack((self.pairs.first, self.pairs.second))
        wanted = np.unique(self.labels[ends])
        if (others := self.identities - len(wanted)) < 2:
            raise DataError(
                f"{shown(self.pairs_file)} names all but {others} of the people in {shown(self.path)}: at least 2 "
                "others are needed to learn from (use_pairs=false splits everyone by seed instead)"
            )
        victims = everyone.of_identities(wanted)
        first, second = np.searchsorted(victims.rows, ends)
        return OpenedSet(
            everyone.where_true(~np.isin(self.labels, wanted)), victims, replace(self.pairs, first=first, second=second)
        )


def _composed(name: str) -> str:
    """A name in Unicode's composed form: file systems and editors differ in how they write an accent."""
    return unicodedata.normalize("NFC", name)


def _some(names: Iterable[str]) -> str:
    """The first names of what there is, for a message."""
    some = list(itertools.islice(names, 4))
    return f"{', '.join(map(shown, some[:3]))}{', ...' if len(some) > 3 else ''}"


#: Folders of these names hold parts of a data set, and no person.
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing", "gallery", "probe"})

#: What lies in a folder that another dataset reads.
_OTHER_LAYOUTS = {".rec": "insightface", ".bin": "insightface", ".tar": "webdataset"}

#: Images of each identity, by their path below its folder.
_Files = dict[str, list[bytes]]


def _layout(root: Path, nested: bool | None) -> tuple[_Files, list[Skipped], str | None]:
    """The images of a folder, what is left out, and what is to be said of how they lie.

    Raises:
        DataError: there are none where they should be, or the folders do not look like people.
        OSError: a folder cannot be listed.
    """
    files, ignored = _gather(root, _is_image, bool(nested))
    note = None
    if not files and nested is None:
        files, ignored = _gather(root, _is_image, nested=True)
        if files:
            folders = len({(person, os.path.dirname(file)) for person in files for file in files[person]})  # noqa: PTH120
            if _PARTS.issuperset(map(str.lower, files)) or len(files) < folders / len(files):
                raise DataError(
                    f"{shown(root)} has its images two folders down, in {folders} folders within {len(files)} "
                    f"({_some(files)}): if those are people, point --data-root at one of these; if these are "
                    "people, and those their sessions, say so with --set dataset_options.nested=true"
                )
            note = f"{shown(root)} has its images two folders down: all below {_some(files)} are taken for one person's"
    if not files:
        files, ignored = _gather(root, _has_image, bool(nested))
        note = f"{shown(root)} has images without the suffix of one: they were told by their content"
    if not files:
        raise DataError(
            f"{shown(root)} holds no images where they are looked for, {shown(root.name)}/<identity>/"
            f"{'<session>/' * bool(nested)}<image>.jpg (or {', '.join(sorted(SUFFIXES - {'.jpg'}))}): {_found(root)}"
        )
    if _PARTS.issuperset(map(str.lower, files)):
        raise DataError(
            f"{shown(root)} has images in {_some(files)}, which are no people: expected {shown(root.name)}/<identity>/"
            "<image>, a folder of its own for each person"
        )
    return files, ignored, note


def _gather(root: Path, takes: Callable[[os.DirEntry[str]], bool], nested: bool) -> tuple[_Files, list[Skipped]]:
    """The images that ``takes`` knows, in the folders of identities or one deeper, and what lies there besides."""
    files: _Files = {}
    ignored: list[Skipped] = []
    for entry in _visible(root):
        if not entry.is_dir():
            if not entry.is_file():
                ignored.append(
                    Skipped(shown(entry.name), "neither a file nor a folder, such as a link that leads nowhere")
                )
            elif _is_image(entry):
                ignored.append(Skipped(shown(entry.name), "lies beside the identity folders, not in one"))
            continue
        folders = [sub for sub in _visible(entry) if sub.is_dir()] if nested else [entry]
        for folder in folders:
            for file in _visible(folder):
                name = f"{folder.name}/{file.name}" if nested else file.name
                if takes(file):
                    files.setdefault(entry.name, []).append(os.fsencode(name))
                else:
                    suffix = PurePath(file.name).suffix.lower() or "no suffix"
                    what = "a folder within an identity" if file.is_dir() else f"not named like an image ({suffix})"
                    ignored.append(Skipped(shown(f"{entry.name}/{name}"), what))
        if nested:
            ignored += [
                Skipped(shown(f"{entry.name}/{file.name}"), "lies beside the sessions of an identity, not in one")
                for file in _visible(entry)
                if not file.is_dir() and _is_image(file)
            ]
    return files, ignored


def _found(root: Path) -> str:
    """What a folder without images holds instead, and what to do about it."""
    seen: Counter[tuple[int, str]] = Counter()
    for folder, within, names in itertools.islice(os.walk(root), 10_000):
        within[:] = [name for name in within if not name.startswith(".")]
        depth = len(Path(folder).relative_to(root).parts)
        seen.update((depth, PurePath(name).suffix.lower()) for name in names if not name.startswith("."))
    if not seen:
        return "it holds no files"
    places = ("beside the identity folders", "one folder down", "two folders down")
    listed = [
        f"{count} {shown(suffix) or 'without suffix'} {(*places, f'{depth} folders down')[min(depth, len(places))]}"
        for (depth, suffix), count in seen.most_common(4)
    ]
    where = next((depth for (depth, suffix), _ in seen.most_common() if suffix in SUFFIXES), None)
    todo = "convert them, or look for the right folder"
    if elsewhere := next((name for suffix, name in _OTHER_LAYOUTS.items() if (0, suffix) in seen), None):
        todo = f"use --dataset {elsewhere}"
    elif where is not None:
        todo = "point --data-root at the folder of people" if where else "give each person a folder of their own"
    return f"found {', '.join(listed)}; {todo}"


def _visible(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return PurePath(entry.name).suffix.lower() in SUFFIXES


def _has_image(entry: os.DirEntry[str]) -> bool:
    """Whether the content of a file is an image, whatever its name."""
    try:
        open_image(read_image_file(Path(entry.path)))
    except ImageError:
        return False
    return True
