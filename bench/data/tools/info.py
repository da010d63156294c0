"""``bench data info``: what lies in a dataset, told apart by its layout and described from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from bench.data.decode import AT_ONCE, MIN_SIDE, Encoded, ImageError, open_image, own_limits, readable, shown
from bench.data.encoded import EncodedSource
from bench.data.sources.folder import FolderSource, pairs_in
from bench.data.sources.insightface import PackSource, RecordIOSource
from bench.data.sources.webdataset import ARCHIVES, WebDatasetSource
from bench.errors import DataError, MissingError
from bench.progress import Report, no_report

#: Image headers looked at per part; more tell little about the sizes in a set of millions.
SAMPLE = 10_000


#: What a file holds, and its reader, by its suffix.
READERS: dict[str, tuple[str, Callable[[Path, int], EncodedSource]]] = {
    ".rec": ("record file", RecordIOSource),
    ".bin": ("verification pack", PackSource),
    ".tar": ("tar shards", WebDatasetSource),  # one, or the pattern of several
}


def layout_of(path: Path) -> tuple[str, list[Path]]:
    """The layout of a dataset, and the files or folders that it is made of, told by their names; nothing is read.

    Raises:
        MissingError: there is no such path.
        DataError: a file that is neither ``.rec``, ``.bin`` nor ``.tar``.
    """
    if path.is_dir():
        with readable(path):
            packed = [file for kind in ("*.rec", "*.bin") for file in sorted(path.glob(kind)) if file.is_file()]
            compressed = any(shard.name.endswith(ARCHIVES) for shard in path.iterdir())
            shards = any(path.glob("*.tar")) or (compressed and not any(entry.is_dir() for entry in path.iterdir()))
        return ("insightface", packed) if packed else ("tar shards" if shards else "folder", [path])
    if not path.exists() and path.suffix != ".tar":
        raise MissingError(f"{shown(path)} does not exist")
    if path.name.endswith(ARCHIVES):
        return READERS[".tar"][0], [path]
    if path.suffix not in READERS:
        raise DataError(f"{shown(path)} is neither a folder nor a .rec or .bin file, nor a .tar shard")
    return READERS[path.suffix][0], [path]


def open_part(file: Path) -> EncodedSource:
    """The reader of one of the parts that :func:`layout_of` gives.

    Raises:
        DataError: a structure that cannot be read.
    """
    layout, _ = layout_of(file)
    with readable(file):
        if layout == "folder":
            return FolderSource(file, MIN_SIDE, pairs_file=pairs_in(file))
        return next(reader for name, reader in READERS.values() if name == layout)(file, MIN_SIDE)


def part_name(source: EncodedSource) -> str:
    """The file, or "." for a folder of images."""
    return "." if isinstance(source, FolderSource) else shown(source.path.name) or "."


class PairInfo(BaseModel, frozen=True):
    """A pair list: how many pairs, how many of them genuine, in how many folds."""

    file: str
    pairs: int
    genuine: int
    folds: int


class PartInfo(BaseModel, frozen=True):
    """One file or folder, called ``name`` ("." for a folder of images).

    ``identities`` counts people with an image; ``images`` slots, of which a pack has two for each pair;
    ``images_per_identity`` has minimum, quartiles and maximum. ``sizes`` says how many images have which size and mode
    ("112x112 RGB"), most frequent first, or an "unreadable" header, over ``headers_read`` images: an even sample of
    large sets. ``ignored`` files are no images, or not where images are looked for: ``left_out`` counts them by reason.
    ``notes`` say how the files were understood where that could be doubted.
    """

    name: str
    identities: int
    images: int
    images_per_identity: dict[str, float]
    single_image_identities: int
    sizes: dict[str, int]
    headers_read: int
    pairs: PairInfo | None
    ignored: int
    left_out: dict[str, int] = {}
    notes: tuple[str, ...] = ()


class DatasetInfo(BaseModel, frozen=True):
    """What lies at a ``path``: its layout, and its files or folders."""

    path: str
    kind: str
    parts: tuple[PartInfo, ...]


def info(path: Path, *, report: Report = no_report) -> DatasetInfo:
    """Describe the dataset at ``path``: a folder, an InsightFace folder, a ``.rec``, a ``.bin`` or tar shards.

    Raises:
        MissingError: there is nothing.
        DataError: its structure cannot be read.
    """
    kind, files = layout_of(path)
    sources = list(map(open_part, files))
    sampled = [min(len(source), SAMPLE) for source in sources]
    before, total = np.cumsum([0, *sampled]).tolist(), sum(sampled)
    with own_limits():
        parts = [
            _describe(source, lambda done, _, start=start: report(start + done, total))
            for source, start in zip(sources, before, strict=False)
        ]
    return DatasetInfo(path=str(path), kind=kind, parts=tuple(parts))


def _alone(source: EncodedSource, row: np.int64) -> Encoded:
    try:
        return source.encoded(np.array([row]))[0]
    except DataError as error:
        return ImageError(str(error))


def _size(encoded: Encoded) -> str:
    """Size and mode by the header."""
    if isinstance(encoded, ImageError):
        return "unreadable"
    try:
        image = open_image(encoded.tobytes())
    except ImageError:
        return "unreadable"
    return f"{image.width}x{image.height} {image.mode}"


def _describe(source: EncodedSource, report: Report) -> PartInfo:
    pairs, name = source.pairs, source.pairs_file
    counts = np.bincount(source.labels)
    counts = counts[counts > 0]
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(np.int64))
    sizes: Counter[str] = Counter()
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        try:
            encoded = source.encoded(some)
        except DataError:  # one of them is damaged
            encoded = [_alone(source, row) for row in some]
        sizes.update(map(_size, encoded))
        report(start + len(some), len(rows))
    listed = None
    if pairs is not None and name is not None:
        folds, genuine = len(np.unique(pairs.fold)), int(pairs.same.sum())
        listed = PairInfo(file=shown(name.name), pairs=len(pairs.same), genuine=genuine, folds=folds)
    quantiles = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1])
    return PartInfo(
        name=part_name(source),
        identities=len(counts),
        images=len(source),
        images_per_identity=dict(zip(("min", "q25", "median", "q75", "max"), map(float, quantiles), strict=True)),
        single_image_identities=int((counts == 1).sum()),
        sizes=dict(sizes.most_common()),
        headers_read=len(rows),
        pairs=listed,
        ignored=len(source.ignored),
        left_out=dict(Counter(entry.reason for entry in source.ignored).most_common()),
        notes=source.notes,
    )
