"""Folders of images, one folder an identity, as a source: some tens of bytes of memory an image, for its name."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.decode import DEFAULT_LIMITS, SUFFIXES, ImageError, Limits, read_image_file, shown
from bench.data.sources.source import EncodedSource, OnError
from bench.errors import DataError, MissingError


class FolderSource(EncodedSource):
    """``root/identity/image.*``, the same images in the same order as :func:`bench.data.folder.scan_tree` finds.

    Args:
        path: the folder.
        image_size: S, in pixels.
        on_error: what becomes of an image that cannot be read or decoded.
        limits: what one image may cost.
        crop: side of the central square of each image that is kept, as a share of its shorter side.

    Raises:
        MissingError: there is no such folder.
        DataError: it cannot be listed, or holds no image one level down.
    """

    def __init__(
        self,
        path: Path,
        image_size: int,
        *,
        on_error: OnError = "refuse",
        limits: Limits = DEFAULT_LIMITS,
        crop: float = 1.0,
    ) -> None:
        if not path.is_dir():
            raise MissingError(f"{shown(path)} is not a folder: expected one with a sub-folder of images per identity")
        people: list[str] = []
        counts: list[int] = []
        names: list[bytes] = []
        try:
            for person in _visible(path, files=False):
                images = [os.fsencode(name) for name in _visible(path / person, files=True)]
                if images:
                    people.append(person)
                    counts.append(len(images))
                    names.append(b"\0".join(images))  # no object per image: a name cannot hold a zero byte
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be listed: {error.strerror or error}") from error
        if not people:
            raise DataError(
                f"{shown(path)} holds no images: expected {shown(path.name)}/<identity>/<image>.jpg or .png"
            )
        labels = np.repeat(np.arange(len(people), dtype=np.int32), counts)
        self._files, self._first = names, np.cumsum(counts) - counts
        super().__init__(path, image_size, labels, people, on_error=on_error, limits=limits, crop=crop)

    def name(self, label: int) -> str:
        """The identity's folder."""
        return shown(self._names[label])

    def file(self, row: int) -> Path:
        """The image's file."""
        label = int(self.labels[row])
        name = self._files[label].split(b"\0")[row - int(self._first[label])]
        return self.path / str(self._names[label]) / os.fsdecode(name)

    def where(self, row: int) -> str:
        """The file, below the folder."""
        return shown(self.file(row).relative_to(self.path))

    def _encoded(self, rows: NDArray[np.int64]) -> list[Tensor]:
        encoded = []
        for row in rows.tolist():
            try:
                data = bytearray(read_image_file(self.file(row), self.limits))
            except ImageError as error:
                if self.on_error == "refuse":
                    raise DataError(f"{self.where(row)}: {error}") from error
                data = bytearray()  # an empty image is skipped as one that cannot be decoded
            encoded.append(torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8))
        return encoded


def _visible(folder: Path, *, files: bool) -> list[str]:
    with os.scandir(folder) as entries:
        found = [
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (PurePath(entry.name).suffix.lower() in SUFFIXES if files else entry.is_dir())
        ]
    return sorted(found)
