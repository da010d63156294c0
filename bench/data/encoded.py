"""Faces that stay on disk: sources of encoded images, views of some of their people, and both decoded whole.

There is one reader per format, in :mod:`bench.data.sources`. A data set in memory is what it gives, decoded whole.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bench.data.base import Contents, Faces, Skipped
from bench.data.decode import Encoded, ImageError, decode_all, decode_batch, shown
from bench.data.pairs import PairRows
from bench.errors import DataError
from bench.progress import Report, no_report

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data.faces import FaceSet, Source

OnError = Literal["refuse", "skip"]

#: What is wanted of a data set.
Part = Literal["everything", "faces", "victims"]


class Batch(NamedTuple):
    """A batch as it was read.

    ``images`` are uint8 (N, 3, S, S), RGB in [0, 255]; ``labels`` int64 (N,) in 0..K-1; ``rows`` int64 (N,), which
    images of the source these are, in the order asked for. ``skipped`` were asked for and could not be decoded.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    skipped: tuple[Skipped, ...] = ()


def _batch(images: Tensor, labels: NDArray[np.int32], rows: NDArray[np.int64], skipped: tuple[Skipped, ...]) -> Batch:
    import torch  # here: whoever looks at an index alone does without

    return Batch(images, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(rows), skipped)


class EncodedSource(ABC):
    """Images on disk, of which memory holds the index only; a subclass, one a format, says where their bytes lie.

    Reading is safe from any thread and after a fork. An image that cannot be decoded is refused; see :meth:`reading`.

    ``image_size`` is S, in pixels; ``labels`` int32 (N,) in 0..K-1, with a name for each of the K identities; ``crop``
    the side of the central square of each image that is kept, as a share of its shorter side; ``ignored`` what lies
    among the images and is none. ``pairs`` are verification pairs over the rows, where there are any, from
    ``pairs_file``. ``notes`` are sentences on how the files were understood, where that could be doubted;
    ``guessed`` says why nobody can be looked up by name, where people are guessed.
    """

    notes: tuple[str, ...] = ()
    guessed: str | None = None
    pairs: PairRows | None = None
    pairs_file: Path | None = None

    def __init__(
        self,
        path: Path,
        image_size: int,
        labels: NDArray[np.int32],
        names: Sequence[str] | NDArray[np.int64],
        *,
        crop: float = 1.0,
        ignored: Sequence[Skipped] = (),
    ) -> None:
        self.path, self.image_size, self.labels, self.crop = path, image_size, labels, crop
        self.ignored = tuple(ignored)
        self.on_error: OnError = "refuse"
        self.exact = False
        self._names = names

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identities(self) -> int:
        """K, how many people there are."""
        return len(self._names)

    def name(self, label: int) -> str:
        """What the identity ``label`` is called; unique within the source."""
        return str(self._names[label])

    def reading(self, on_error: OnError, *, exact: bool = False) -> Self:
        """This source, where images that cannot be decoded are refused or skipped.

        With ``exact`` images are decoded bit for bit as sets in memory are, which is slower: to be compared with them.
        """
        other = copy.copy(self)
        other.on_error, other.exact = on_error, exact
        return other

    @abstractmethod
    def where(self, row: int) -> str:
        """What messages call the image ``row``."""

    def where_pair(self, number: int) -> str:
        """What messages call a pair of the verification set."""
        return f"{shown(self.pairs_file)} pair {number}"

    @abstractmethod
    def encoded(self, rows: NDArray[np.int64]) -> Sequence[Encoded]:
        """The encoded images, in the order of ``rows``.

        Raises:
            DataError: a damaged file.
        """

    def encoded_image(self, row: int) -> bytes:
        """One image as it is stored.

        Raises:
            DataError: a damaged file, or an image that cannot be read.
        """
        (data,) = self.encoded(np.array([row]))
        if isinstance(data, ImageError):
            raise data
        return data.tobytes()

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """Read and decode the images ``rows`` (N,).

        Raises:
            DataError: a damaged file; or an image that cannot be decoded, unless those are skipped.
        """
        images, failed = decode_batch(self.encoded(rows), self.image_size, crop=self.crop, exact=self.exact)
        skipped = self.skip(rows, failed)
        kept = np.delete(np.arange(len(rows)), list(failed)) if failed else slice(None)
        return _batch(images[kept], self.labels[rows][kept], rows[kept], skipped)

    def skip(self, rows: NDArray[np.int64], failed: dict[int, str]) -> tuple[Skipped, ...]:
        """List what could not be decoded, by its place in ``rows``.

        Raises:
            DataError: such images are refused.
        """
        skipped = tuple(Skipped(self.where(int(rows[place])), reason) for place, reason in sorted(failed.items()))
        if skipped and self.on_error == "refuse":
            first = skipped[0]
            raise DataError(f"{first.where}: {first.reason} (on_error=skip leaves out images that cannot be decoded)")
        return skipped


@dataclass(frozen=True, slots=True)
class IdentityView(Faces):
    """Some identities of a source, relabelled 0..K-1 in the order given.

    ``chosen`` int64 (K,) are labels of the source; ``rows`` int64 (N,), ascending, the images of these identities, and
    ``labels`` int32 (N,) their labels here; ``contents`` tells the images apart, where somebody looked.
    """

    source: EncodedSource
    chosen: NDArray[np.int64]
    rows: NDArray[np.int64]
    labels: NDArray[np.int32]
    contents: Contents | None = None
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def everything(cls, source: EncodedSource) -> Self:
        """The view of all identities, labelled as the source labels them."""
        rows = np.arange(len(source))
        return cls(source, np.arange(source.identities), rows, source.labels, skipped=source.ignored)

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def image_size(self) -> int:
        return self.source.image_size

    @property
    def identities(self) -> int:
        return len(self.chosen)

    def name(self, label: int) -> str:
        return self.source.name(int(self.chosen[label]))

    def where(self, row: int) -> str:
        return self.source.where(int(self.rows[row]))

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """As the source does, with the labels of the view."""
        read = self.source.read(self.rows[rows])
        back = np.searchsorted(self.rows, read.rows.numpy())
        return _batch(read.images, self.labels[back], back, read.skipped)

    def of_identities(self, identities: NDArray[np.integer]) -> Self:
        if len(np.unique(identities)) < len(identities):
            raise ValueError("an identity is chosen twice")
        if len(identities) and not 0 <= identities.min() <= identities.max() < self.identities:
            raise ValueError(f"identities must be labels of this set, 0 to {self.identities - 1}")
        lookup = np.full(self.identities, -1, dtype=np.int32)
        lookup[identities] = np.arange(len(identities), dtype=np.int32)
        labels = lookup[self.labels]
        kept = labels >= 0
        contents = None if self.contents is None else self.contents.where_true(kept)
        return type(self)(self.source, self.chosen[identities], self.rows[kept], labels[kept], contents)

    def where_true(self, kept: NDArray[np.bool_]) -> Self:
        contents = None if self.contents is None else self.contents.where_true(kept)
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], contents=contents)

    def _scanned(self) -> Contents:
        if self.contents is None:
            raise ValueError("the faces were not scanned: nothing is known of their copies")
        return self.contents

    def copies(self) -> NDArray[np.int64]:
        return self._scanned().copies()

    def firsts(self) -> NDArray[np.int64]:
        return self._scanned().firsts(self.labels)

    def among(self, images: Tensor) -> NDArray[np.bool_]:
        return np.isin(self._scanned().digests, Contents.of(images).digests)

    def digests(self) -> NDArray[np.uint64]:
        return self._scanned().digests

    def decode(self, report: Report = no_report) -> tuple[Tensor, dict[int, str]]:
        """All images, see :func:`bench.data.decode.decode_all`."""
        source = self.source
        return decode_all(self.rows, source.encoded, source.image_size, crop=source.crop, report=report)

    def load(self, report: Report = no_report) -> FaceSet:
        """Decode everything into memory.

        Raises:
            DataError: the set does not fit into memory, or an image cannot be decoded, unless the source skips those.
        """
        return self._in_memory(*self.decode(report))

    def _in_memory(self, images: Tensor, failed: dict[int, str]) -> FaceSet:
        import torch

        from bench.data.faces import FaceSet

        skipped = self.skipped + self.source.skip(self.rows, failed)
        labels = torch.from_numpy(np.delete(self.labels, list(failed)).astype(np.int64))
        return FaceSet(images, labels, tuple(map(self.name, range(self.identities))), skipped)


#: What can be read in batches.
RecordSource = EncodedSource | IdentityView


@dataclass(frozen=True, slots=True)
class OpenedSet:
    """A data set as its reader opens it: nothing is decoded yet.

    ``faces`` are to learn from; ``victims``, the people of a verification set, are not among them; ``pairs`` is its
    protocol over the rows of ``victims``; ``details`` are what a result says of the dataset.
    """

    faces: IdentityView
    victims: IdentityView | None = None
    pairs: PairRows | None = None
    details: dict[str, str | int | float] = field(default_factory=dict)

    def decoded(
        self, name: str, *, stream: bool = False, part: Part = "everything", report: Report = no_report
    ) -> Source:
        """The data set called ``name``, its victims in memory, and its faces, too, unless they are streamed.

        Of a ``part`` the rest is not decoded: who wants ``faces`` gets no victims, and who wants ``victims`` gets the
        faces undecoded where there are victims, else all faces, of whom everybody can be one.

        Images that cannot be decoded are skipped and listed; who has no others is not in memory.

        Raises:
            DataError: a damaged file, what does not fit into memory, an image that a pair needs and that cannot be
                decoded, or too few people left.
        """
        from bench.data.faces import PairProtocol, Source

        if part == "faces":
            return replace(self, victims=None, pairs=None).decoded(name, stream=stream, report=report)
        stream = (stream and part == "everything") or (part == "victims" and self.victims is not None)
        before = 0 if self.victims is None else len(self.victims)
        total = before + (0 if stream else len(self.faces))
        victims, rows = self._verification(lambda done, _: report(done, total))
        faces = self.faces if stream else self._people(lambda done, _: report(before + done, total))
        notes = (*self.faces.source.notes, *(self.victims.source.notes if self.victims is not None else ()))
        pairs = None if rows is None else PairProtocol.of(rows)
        return Source(name, faces, victims, pairs, details=self.details, notes=tuple(dict.fromkeys(notes)))

    def _people(self, report: Report) -> FaceSet:
        view = replace(self.faces, source=self.faces.source.reading("skip"))
        faces, path = view.load(report), shown(view.path)
        if not len(faces):
            first = faces.skipped[len(view.skipped)]
            raise DataError(
                f"none of the {len(view)} images in {path} can be used; the first is {first.where}: {first.reason}"
            )
        present, counts = np.unique(faces.labels.numpy(), return_counts=True)
        if self.victims is None and counts.max() < 2:
            raise DataError(
                f"nobody in {path} has two usable images ({len(faces.skipped)} images skipped): without a second image "
                "of a person nothing can be verified"
            )
        if self.victims is not None and len(present) < 2:
            raise DataError(
                f"{path} leaves {len(faces)} usable images of {len(present)} identities ({len(faces.skipped)} images "
                "skipped), at least 2 identities are needed to learn from"
            )
        return replace(faces.of_identities(present), skipped=faces.skipped)

    def _verification(self, report: Report) -> tuple[FaceSet | None, PairRows | None]:
        if self.victims is None or self.pairs is None:
            return None, None
        view = replace(self.victims, source=self.victims.source.reading("skip"))
        images, failed = view.decode(report)
        position = np.full(len(view), -1, dtype=np.int64)
        position[np.delete(np.arange(len(view)), list(failed))] = np.arange(len(images))
        ends = np.stack((self.pairs.first, self.pairs.second), axis=1)
        lost = np.argwhere(position[ends] < 0)
        if len(lost):
            number, row = int(lost[0, 0]), int(ends[tuple(lost[0])])
            raise DataError(
                f"{view.source.where_pair(number)} needs {view.where(row)}, which cannot be used: {failed[row]}"
            )
        first, second = position[ends].T
        return view._in_memory(images, failed), replace(self.pairs, first=first, second=second)
