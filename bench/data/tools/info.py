"""``bench data info``: what lies in a dataset, told apart by its layout and described from its headers alone."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.data.decode import MIN_SIDE, open_image, own_limits, shown
from bench.data.encoded import EncodedSource
from bench.data.sources.folder import PAIRS, FolderSource
from bench.data.sources.insightface import PackSource, RecordIOSource
from bench.data.sources.webdataset import WebDatasetSource
from bench.errors import DataError, MissingError
from bench.progress import Report, no_report

#: Image headers looked at per part; more tell little about the sizes in a set of millions.
SAMPLE = 10_000


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


def files_of(path: Path) -> list[Path]:
    """The files or folders that the dataset at ``path`` is made of.

    Raises:
        MissingError: there is nothing.
        DataError: a file of another kind.
    """
    if layout_of(path) is not Layout.INSIGHTFACE:
        return [path]
    return [file for file in (path / "train.rec",) if file.is_file()] + sorted(path.glob("*.bin"))


def open_part(file: Path) -> EncodedSource:
    """The reader of one of :func:`files_of`.

    Raises:
        DataError: a structure that cannot be read.
    """
    layout = layout_of(file)
    if layout is Layout.FOLDER:
        return FolderSource(file, MIN_SIDE, pairs_file=file / PAIRS if (file / PAIRS).exists() else None)
    if layout is Layout.SHARDS:
        return WebDatasetSource(file, MIN_SIDE)
    return PackSource(file, MIN_SIDE) if layout is Layout.PACK else RecordIOSource(file, MIN_SIDE)


def part_name(source: EncodedSource) -> str:
    """The file, or "." for a folder of images."""
    return "." if isinstance(source, FolderSource) else shown(source.path.name) or "."


class PairInfo(BaseModel):
    """A pair list: how many pairs, how many of them genuine, in how many folds."""

    model_config = ConfigDict(frozen=True)

    file: str
    pairs: int
    genuine: int
    folds: int


class PartInfo(BaseModel):
    """One file or folder.

    Attributes:
        name: the file, or "." for a folder of images.
        identities: people with at least one image.
        images: image slots (a pack counts two for each pair).
        images_per_identity: minimum, quartiles and maximum.
        single_image_identities: people with one image.
        sizes: how many images have which size ("112x112") and mode ("RGB"), most frequent first;
            "unreadable" for headers that could not be read.
        headers_read: how many images ``sizes`` is counted over (an even sample of large sets).
        pairs: its pair list.
        ignored: files that are no images.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    identities: int
    images: int
    images_per_identity: dict[str, float]
    single_image_identities: int
    sizes: dict[str, int]
    headers_read: int
    pairs: PairInfo | None
    ignored: int


class DatasetInfo(BaseModel):
    """What :func:`info` found.

    Attributes:
        path: as given.
        kind: the layout.
        parts: its files or folders.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    kind: str
    parts: tuple[PartInfo, ...]


def info(path: Path, *, report: Report = no_report) -> DatasetInfo:
    """Describe the dataset at ``path``: a folder, an InsightFace folder, a ``.rec``, a ``.bin`` or tar shards.

    Raises:
        MissingError: there is nothing.
        DataError: its structure cannot be read.
    """
    layout, sources = layout_of(path), [open_part(file) for file in files_of(path)]
    total = sum(min(len(source), SAMPLE) for source in sources)
    described, done = [], 0
    with own_limits():
        for source in sources:
            described.append(_describe(source, lambda n, _, before=done: report(before + n, total)))
            done += min(len(source), SAMPLE)
    return DatasetInfo(path=str(path), kind=layout.value, parts=tuple(described))


def _describe(source: EncodedSource, report: Report) -> PartInfo:
    pairs, name = source.pairs, source.pairs_file
    counts = np.bincount(source.labels)
    counts = counts[counts > 0]
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(np.int64))
    sizes: Counter[str] = Counter()
    for done, row in enumerate(rows.tolist(), 1):
        try:
            image = open_image(source.encoded_image(row))
            sizes[f"{image.width}x{image.height} {image.mode}"] += 1
        except DataError:
            sizes["unreadable"] += 1
        if done % 500 == 0 or done == len(rows):
            report(done, len(rows))
    quantiles = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1])
    return PartInfo(
        name=part_name(source),
        identities=len(counts),
        images=len(source),
        images_per_identity=dict(zip(("min", "q25", "median", "q75", "max"), map(float, quantiles), strict=True)),
        single_image_identities=int((counts == 1).sum()),
        sizes=dict(sizes.most_common()),
        headers_read=len(rows),
        pairs=None
        if pairs is None or name is None
        else PairInfo(
            file=shown(name.name), pairs=len(pairs), genuine=int(pairs.same.sum()), folds=len(pairs.fold.unique())
        ),
        ignored=len(source.ignored),
    )
