"""What lies in a dataset, image by image, without decoding: the ground that ``info`` and ``verify`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import MIN_SIDE, read_image_file, shown
from bench.data.faces import Skipped
from bench.data.folder import PAIRS, locate_pairs, scan_tree
from bench.data.insightface import fold_numbers, image_records, pack_identities
from bench.data.pairs import read_pairs
from bench.data.recordio import RecordFile
from bench.data.sources.webdataset import WebDatasetSource
from bench.data.verification_pack import read_pack
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
        first, second: int64 (P,), indices into the part that it belongs to.
        same: bool (P,).
        folds: how many.
    """

    file: str
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: int


@dataclass(frozen=True, slots=True)
class Part:
    """One file or folder of a dataset.

    Attributes:
        name: the file, or "." for a folder of images.
        names: identities.
        identities: int64 (N,), indices into ``names``.
        read: bytes of the i-th image; may raise :class:`bench.data.decode.ImageError`.
        where: what messages call the i-th image.
        pairs: its pair list, if any.
        ignored: files that are no images.
    """

    name: str
    names: tuple[str, ...]
    identities: NDArray[np.int64]
    read: Callable[[int], bytes]
    where: Callable[[int], str]
    pairs: Pairs | None = None
    ignored: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.identities)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Layout, tuple[Part, ...]]]:
    """The layout at ``path`` and its parts; record files are mapped for as long as the context lasts.

    Raises:
        MissingError: there is nothing.
        DataError: a structure that cannot be read.
    """
    layout = layout_of(path)
    with ExitStack() as stack:
        parts = []
        if layout is Layout.FOLDER:
            parts.append(_tree(path))
        if layout is Layout.RECORDS or (path / "train.rec").is_file():
            file = path if layout is Layout.RECORDS else path / "train.rec"
            parts.append(_records(stack.enter_context(RecordFile(file)), file))
        if layout is Layout.PACK:
            parts.append(_pack(path))
        if layout is Layout.SHARDS:
            parts.append(_shards(path))
        if layout is Layout.INSIGHTFACE:
            parts += [_pack(pack) for pack in sorted(path.glob("*.bin"))]
        yield layout, tuple(parts)


def _tree(root: Path) -> Part:
    tree = scan_tree(root)
    pairs = None
    if (root / PAIRS).exists():
        listed = read_pairs(root / PAIRS)
        ends = locate_pairs(tree, listed, root / PAIRS)
        pairs = Pairs(PAIRS, ends[:, 0], ends[:, 1], listed.same, listed.folds)
    return Part(
        ".",
        tree.names,
        np.asarray(tree.labels, dtype=np.int64),
        lambda i: read_image_file(tree.paths[i]),
        lambda i: shown(tree.paths[i].relative_to(root)),
        pairs,
        tree.ignored,
    )


def _records(records: RecordFile, path: Path) -> Part:
    keys, labels = image_records(records)
    values, identities = np.unique(labels, return_inverse=True)
    return Part(
        shown(path.name),
        tuple(str(value) for value in values),
        identities.astype(np.int64),
        lambda i: records.record(int(keys[i])).payload,
        lambda i: f"{shown(path.name)} record {keys[i]}",
    )


def _shards(path: Path) -> Part:
    source = WebDatasetSource(path, MIN_SIDE)
    names = tuple(source.name(label) for label in range(source.identities))
    return Part(shown(path.name) or ".", names, source.labels.astype(np.int64), source.encoded, source.where)


def _pack(path: Path) -> Part:
    pack = read_pack(path)
    names, owner, _ = pack_identities(pack, path.parent / PAIRS, path.stem)
    folds = int(fold_numbers(len(pack.same)).max()) + 1
    slots = np.arange(len(owner), dtype=np.int64)
    return Part(
        shown(path.name),
        names,
        owner,
        lambda i: pack.images[i],
        lambda i: f"{shown(path.name)} image {i}",
        Pairs(shown(path.name), slots[0::2], slots[1::2], pack.same, folds),
    )
