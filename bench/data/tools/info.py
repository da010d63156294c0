"""``bench data info``: what a dataset holds, from its headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.data.decode import Report, no_report, open_image, own_limits
from bench.data.tools.inventory import Part, files_of, layout_of, open_part
from bench.errors import DataError

#: Image headers looked at per part; more tell little about the sizes in a set of millions.
SAMPLE = 10_000


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
    layout, parts = layout_of(path), [open_part(file) for file in files_of(path)]
    total = sum(min(len(part.source), SAMPLE) for part in parts)
    described, done = [], 0
    with own_limits():
        for part in parts:
            start = done
            described.append(_describe(part, lambda n, _, start=start: report(start + n, total)))
            done += min(len(part.source), SAMPLE)
    return DatasetInfo(path=str(path), kind=layout.value, parts=tuple(described))


def _describe(part: Part, report: Report) -> PartInfo:
    source, pairs = part.source, part.pairs
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
        name=part.name,
        identities=len(counts),
        images=len(source),
        images_per_identity=dict(zip(("min", "q25", "median", "q75", "max"), map(float, quantiles), strict=True)),
        single_image_identities=int((counts == 1).sum()),
        sizes=dict(sizes.most_common()),
        headers_read=len(rows),
        pairs=pairs
        and PairInfo(file=pairs.file, pairs=len(pairs.same), genuine=int(pairs.same.sum()), folds=pairs.folds),
        ignored=len(source.ignored),
    )
