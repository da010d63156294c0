"""A set that could be streamed, decoded into memory as a whole: what runs on small sets load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from bench.data.decode import Report, decode_all, no_report, shown
from bench.data.faceset import FaceSet, Source
from bench.data.stream.webdataset_source import WebDatasetSource
from bench.errors import DataError


class WebDatasetOptions(BaseModel):
    """The ``webdataset`` dataset has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load_webdataset(path: Path, image_size: int, *, report: Report = no_report) -> Source:
    """Decode all shards; victims are split off later, and pairs drawn, by seed.

    Args:
        path: see :func:`bench.data.stream.webdataset_source.find_shards`.
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
