"""Training sets too large for memory: sources, the order in which they are shown, and the loader.

>>> source = open_source("insightface", Path("faces"), image_size=112)            # doctest: +SKIP
>>> order = EpochOrder(images=len(source), batch_size=128, seed=0)                # doctest: +SKIP
>>> loader = StreamLoader(source, order, workers=2)                               # doctest: +SKIP
>>> for batch in loader: ...                                                      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.data.stream.folder_source import FolderSource
from bench.data.stream.loader import StreamLoader
from bench.data.stream.recordio_source import RecordIOSource
from bench.data.stream.sampler import EpochOrder
from bench.data.stream.source import Batch, EncodedSource, OnError, RecordSource
from bench.data.stream.view import IdentityView
from bench.data.stream.webdataset_source import WebDatasetSource
from bench.errors import UsageError

__all__ = ["Batch", "EpochOrder", "IdentityView", "RecordSource", "StreamLoader", "open_source"]

SOURCES: dict[str, Callable[..., EncodedSource]] = {
    "insightface": RecordIOSource,
    "folder": FolderSource,
    "webdataset": WebDatasetSource,
}


def open_source(kind: str, path: Path, *, image_size: int = 112, on_error: OnError = "refuse") -> EncodedSource:
    """Open a training set for streaming.

    Args:
        kind: ``insightface`` (a ``.rec`` or the folder of a ``train.rec``), ``folder`` (``root/identity/image.*``) or
            ``webdataset`` (tar shards: a file, a folder, or ``name-{0000..0123}.tar``).
        path: where it lies.
        image_size: side of the faces in pixels.
        on_error: ``refuse`` a set in which an image cannot be decoded (when it comes to that image), or ``skip`` it.

    Raises:
        UsageError: another kind, or options that cannot be.
        MissingError: there is nothing.
        DataError: its structure cannot be read.
    """
    if kind not in SOURCES:
        raise UsageError(f"{kind!r} cannot be streamed: choose {', '.join(SOURCES)}")
    return SOURCES[kind](path, image_size, on_error=on_error)
