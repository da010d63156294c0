"""WebDataset tar shards as a source: the images stay in their shards, memory holds where they begin.

A sample is a run of neighbouring members that agree up to the first dot of their file name: ``a/b/000017.jpg`` and
``a/b/000017.cls``. Where a shard makes no sense so, names have dots of their own (``St.Clair_0001.jpg``):
its samples are told by the last dot, and that is said. The image has one of the suffixes that the suite reads; the
identity is the whole number or name in ``.cls``, or the value of ``label``, ``cls``, ``identity`` or ``class`` in
``.json``. Shards are plain tar: a compressed one has no place to jump to.

Source: the WebDataset file format (T. Breuel), POSIX.1-2001 for tar.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from bench.data.decode import SUFFIXES, by_threads, readable, shown, stranger, whole_number, workers
from bench.data.encoded import EncodedSource, IdentityView, OpenedSet
from bench.data.loaders import Dataset
from bench.data.ranges import read_ranges
from bench.errors import DataError, MissingError
from bench.files import decode_text, parse_json

#: How the names of shards end, plain and compressed.
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
LABEL_KEYS = ("label", "cls", "identity", "class")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: What says who somebody is takes a line, not a megabyte.
_MOST_LABEL_BYTES = 2**20


class WebDatasetOptions(BaseModel, frozen=True, extra="forbid"):
    """The ``webdataset`` dataset has no options."""


def open_webdataset(path: Path, image_size: int, options: WebDatasetOptions) -> OpenedSet:
    """Tar shards; victims are split off later, and pairs drawn, by seed.

    Raises:
        MissingError: a shard is not there.
        DataError: a damaged shard.
    """
    return OpenedSet(IdentityView.everything(WebDatasetSource(path, image_size)))


DATASET = Dataset(
    "WebDataset tar shards: a folder of them, one, or name-{0000..0123}.tar", WebDatasetOptions, open_webdataset
)


def find_shards(path: Path) -> list[Path]:
    """The shards that ``path`` means: a tar file, the tar files of a folder, or ``name-{0000..0123}.tar``.

    Raises:
        MissingError: there are none, or one of those named is not there.
    """
    if match := _BRACES.search(path.name):
        first, last = match[1], match[2]
        names = [
            path.name[: match.start()] + str(n).zfill(len(first)) + path.name[match.end() :]
            for n in range(int(first), int(last) + 1)
        ]
        shards = [path.with_name(name) for name in names]
        absent = [shard for shard in shards if not shard.is_file()]
        if absent or not shards:
            what = f"{shown(absent[0])} does not exist" if absent else f"{shown(path)} names no shard"
            raise MissingError(f"{what} ({len(absent)} of {len(shards)} shards are missing)")
        return shards
    if path.is_dir():
        shards = sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))
        if not shards:  # compressed ones are refused when they are opened, by what they are
            shards = sorted(shard for shard in path.glob("*.t*") if shard.name.endswith(ARCHIVES))
        if not shards:
            raise MissingError(f"{shown(path)} has no tar shards (*.tar)")
        return shards
    if not path.is_file():
        raise MissingError(f"{shown(path)} does not exist")
    return [path]


class WebDatasetSource(EncodedSource):
    """Images in tar shards.

    Opening walks the headers of all members, once; images are passed over. ``file`` int32 (N,) is the shard of each
    image; ``offsets`` and ``sizes``, int64 (N,), say where it lies in that, in bytes.

    Raises:
        MissingError: a shard is not there.
        DataError: a shard is no tar, compressed or cut off, or a sample has no image or no identity.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.shards = find_shards(path)
        offsets, sizes, people, dotted = zip(*by_threads(_index, self.shards, workers()), strict=True)
        if any(dotted):
            self.notes = (
                f"{shown(path)}: names in {sum(dotted)} of {len(dotted)} shards have dots of their own, so that "
                "samples were told by the last dot, not the first",
            )
        self.file = np.repeat(np.arange(len(people), dtype=np.int32), list(map(len, people)))
        self.offsets, self.sizes = np.concatenate(offsets), np.concatenate(sizes)
        names = sorted(set().union(*people), key=_natural)
        number = {person: i for i, person in enumerate(names)}
        labels = np.fromiter((number[name] for shard in people for name in shard), dtype=np.int32, count=len(self.file))
        if not len(labels):
            raise DataError(f"{shown(path)} holds no samples")
        super().__init__(path, image_size, labels, names)

    def where(self, row: int) -> str:
        return f"{shown(self.shards[self.file[row]].name)} image at offset {self.offsets[row]}"

    def encoded(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images as they lie in their shards.

        Raises:
            DataError: a shard that was cut off.
        """
        sizes = self.sizes[rows]
        buffer, begin = read_ranges(self.shards, self.file[rows].astype(np.int64), self.offsets[rows], sizes)
        return [buffer[a:b] for a, b in zip(begin.tolist(), (begin + sizes).tolist(), strict=True)]


def _natural(name: str) -> tuple[int, str]:
    number = whole_number(name)
    return (2**63 if number is None else number, name)


#: Offset and size of each image in a shard, the identity as it is written, and whether names were cut at the last dot.
_Index = tuple[NDArray[np.int64], NDArray[np.int64], list[str], bool]


def _index(shard: Path) -> _Index:
    with readable(shard), shard.open("rb") as file:
        begin = file.read(64)
    if what := stranger(begin):
        raise DataError(f"{shown(shard)} is no plain tar, whose images are read where they lie, but {what}")
    try:
        return _indexed(shard, last=False)
    except _SampleError as error:
        try:
            return _indexed(shard, last=True)
        except _SampleError:
            raise error from None


class _SampleError(DataError):
    """Members of a shard that make no sample as their names are cut."""


def _indexed(shard: Path, *, last: bool) -> _Index:
    offsets, sizes, people = [], [], []
    once: dict[str, str] = {}  # one string per person, not one per image
    with shard.open("rb") as file:
        for key, members in _samples(shard, file, last):
            images = [member for suffix, member in members.items() if f".{suffix.rpartition('.')[2]}" in SUFFIXES]
            where = f"{shown(shard.name)}: sample {shown(key)!r} at offset {next(iter(members.values())).offset}"
            if len(images) != 1:
                raise _SampleError(f"{where} has {len(images)} images, not one")
            person = _person(where, members, file)
            offsets.append(images[0].offset_data)
            sizes.append(images[0].size)
            people.append(once.setdefault(person, person))
    return np.asarray(offsets, dtype=np.int64), np.asarray(sizes, dtype=np.int64), people, last


def _samples(shard: Path, file: BinaryIO, last: bool) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key of each sample, and its members by suffix, lower case: what stands behind the first or the ``last`` dot."""
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(shard, file):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.rpartition(".") if last else name.partition(".")
        sample, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        if members and sample != key:
            yield key, members
            members = {}
        if suffix in members:
            raise _SampleError(
                f"{shown(shard.name)}: {shown(member.name)!r} at offset {member.offset} is there twice in one sample"
            )
        key, members[suffix] = sample, member
    if members:
        yield key, members


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, one at a time."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # else it remembers every member of the shard
                end = member.offset_data + member.size
                if member.isfile() and not PurePosixPath(member.name).name.startswith((".", "__")):
                    yield member
            closed = tar.offset + tarfile.BLOCKSIZE <= os.fstat(file.fileno()).st_size
    except tarfile.ReadError as error:
        raise DataError(f"{shown(shard)} is damaged or truncated behind offset {end}: {error}") from error
    if not closed:
        raise DataError(f"{shown(shard)} is truncated: it ends at offset {end} without the end mark of an archive")


def _person(where: str, members: dict[str, tarfile.TarInfo], file: BinaryIO) -> str:
    """The identity of a sample."""
    for suffix in ("cls", "json"):
        if suffix not in members:
            continue
        member = members[suffix]
        if member.size > _MOST_LABEL_BYTES:
            raise DataError(f"{where}: its .{suffix} has {member.size} bytes")
        # Not through tarfile, whose position in the file the next member is found by.
        text = os.pread(file.fileno(), member.size, member.offset_data)
        try:
            value = decode_text(text).strip() if suffix == "cls" else _labelled(parse_json(decode_text(text)))
        except ValueError as error:
            raise DataError(f"{where}: its .{suffix} cannot be read: {error}") from error
        if value:
            return value
        raise DataError(f"{where}: its .{suffix} says no identity (looked for {', '.join(LABEL_KEYS)})")
    raise _SampleError(
        f"{where} has neither .cls nor .json next to it: nothing says whose face it is (a tar of one folder a person: "
        "unpack it, and use --dataset folder)"
    )


def _labelled(content: object) -> str:
    if isinstance(content, dict):
        for key in LABEL_KEYS:
            if isinstance(content.get(key), (str, int)) and not isinstance(content[key], bool):
                return str(content[key]).strip()
    return ""
