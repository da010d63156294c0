"""The datasets that can be streamed, opened: everybody to learn from on disk, victims of their own in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from bench.data.decode import Report, decode_all, no_report, shown
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.folder import PAIRS, FolderOptions, Tree, load_listed
from bench.data.insightface import InsightfaceOptions, PackedVictims, first_rows
from bench.data.pairs import read_pairs
from bench.data.sources.folder import FolderSource
from bench.data.sources.recordio import RecordIOSource
from bench.data.sources.webdataset import WebDatasetSource
from bench.data.stream.view import IdentityView
from bench.errors import DataError


@dataclass(frozen=True, slots=True)
class StreamedSource:
    """What :class:`bench.data.faces.Source` is in memory.

    Attributes:
        name: the dataset.
        faces: the identities that provider, attacker and evaluator share out.
        victims, pairs: a verification set of its own, or None.
        synthetic: never.
        details: for the result.
    """

    name: str
    faces: IdentityView
    victims: FaceSet | None = None
    pairs: PairProtocol | None = None
    synthetic: bool = False
    details: dict[str, str | int | float] = field(default_factory=dict)


def stream_insightface(
    root: Path, image_size: int, options: InsightfaceOptions, *, report: Report = no_report
) -> StreamedSource:
    """``train.rec`` on disk and the verification pack in memory; see :func:`bench.data.insightface.load_insightface`.

    Raises:
        MissingError: no folder, no ``train.rec`` or no pack.
        DataError: a damaged file, or an image of the pack that cannot be decoded.
    """
    verification = PackedVictims.open(root, options)
    source = RecordIOSource(root, image_size)
    faces = IdentityView.everything(source)
    if options.max_identities is not None or options.max_images_per_identity is not None:
        kept = np.zeros(len(source), dtype=bool)
        kept[first_rows(source.labels, options.max_identities, options.max_images_per_identity)] = True
        faces = faces.where_true(kept)
    victims, pairs = verification.load(image_size, report=report)
    return StreamedSource("insightface", faces, victims, pairs, details=verification.details)


def stream_folder(root: Path, image_size: int, options: FolderOptions, *, report: Report = no_report) -> StreamedSource:
    """A folder of identities on disk, without those whom a ``pairs.txt`` names: they are the victims, in memory.

    Raises:
        MissingError: there is no such folder.
        DataError: no image, or a pair that names what is not there or cannot be decoded.
    """
    source = FolderSource(root, image_size, crop=options.crop)
    everyone = IdentityView.everything(source)
    if not (options.use_pairs and (root / PAIRS).exists()):
        return StreamedSource("folder", everyone)
    listed = read_pairs(root / PAIRS)
    wanted = frozenset(listed.names)
    named = np.fromiter((source.name(label) in wanted for label in range(source.identities)), dtype=bool)
    rows = np.flatnonzero(named[source.labels])
    people, labels = np.unique(source.labels[rows], return_inverse=True)
    names = tuple(source.name(label) for label in people.tolist())
    paths = tuple(source.file(row) for row in rows.tolist())
    tree = Tree(root, names, paths, tuple(labels.tolist()), ())
    victims, pairs = load_listed(tree, listed, root / PAIRS, image_size, crop=options.crop, report=report)
    return StreamedSource("folder", everyone.where_true(~named[source.labels]), victims, pairs)


def stream_webdataset(path: Path, image_size: int) -> StreamedSource:
    """Tar shards on disk.

    Raises:
        MissingError: a shard is not there.
        DataError: a damaged shard.
    """
    return StreamedSource("webdataset", IdentityView.everything(WebDatasetSource(path, image_size)))


class WebDatasetOptions(BaseModel):
    """The ``webdataset`` dataset has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load_webdataset(path: Path, image_size: int, *, report: Report = no_report) -> Source:
    """Decode all shards; victims are split off later, and pairs drawn, by seed.

    Args:
        path: see :func:`bench.data.sources.webdataset.find_shards`.
        image_size: side of the faces in pixels.
        report: progress.

    Returns:
        faces uint8 (N, 3, S, S), named as the shards name them; images that cannot be decoded are listed as skipped.

    Raises:
        MissingError: a shard is not there.
        DataError: a damaged shard, a set that does not fit into memory, or nobody with two images.
    """
    source = WebDatasetSource(path, image_size)
    decoded = decode_all(len(source), source.encoded, source.where, image_size, report=report)
    labels = torch.from_numpy(source.labels[decoded.kept.numpy()].astype(np.int64))
    if not len(labels) or int(torch.bincount(labels).max()) < 2:
        raise DataError(
            f"nobody in {shown(path)} has two usable images ({len(decoded.skipped)} images skipped): without a second "
            "image of a person nothing can be verified"
        )
    names = tuple(source.name(label) for label in range(source.identities))
    everyone = FaceSet(decoded.images, labels, names).of_identities(torch.unique(labels))
    return Source("webdataset", FaceSet(everyone.images, everyone.labels, everyone.names, decoded.skipped))
