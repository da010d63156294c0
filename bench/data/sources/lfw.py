"""Labeled Faces in the Wild in its official layout, downloaded once and checked by SHA-256.

What is downloaded is what scikit-learn publishes on figshare: the original ``lfw.tgz`` and ``lfw-funneled.tgz``, the
latter by default. That is the *funnelled* alignment (Huang, Jain & Learned-Miller, ICCV 2007), not the *deep-funnelled*
one (Huang et al., NIPS 2012), for which there is no such mirror; an unpacked ``lfw-deepfunneled`` folder
is taken where one is found in the data root.

Faces are the central square of the 250x250 photos, 144 pixels wide by default. The photos are 2.2 times the box of the
face detector, so the box is the central 114 pixels; 144 adds forehead and chin, and makes the eyes about as far
apart, relative to the image, as in the 112x112 template that aligned packs use.

Victims and learners must be different people, and View 2, the reported protocol (``pairs.txt``), names
nearly everyone who has more than one photo: nobody would be left to learn from. Hence View 1, which
LFW provides for development: the people in ``pairsDevTest.txt`` are the victims, under its 500 + 500 pairs, and
everyone else is there to learn from. Figures are therefore *not* comparable with the usual View 2 accuracies; for those
use a verification pack and learn from another dataset (``--dataset insightface``).
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pooch
from pydantic import BaseModel, Field

from bench.data.decode import shown
from bench.data.encoded import OpenedSet
from bench.data.loaders import Dataset
from bench.data.sources.folder import FolderSource
from bench.errors import DataError, MissingError
from bench.files import cache_folder


@dataclass(frozen=True, slots=True)
class Remote:
    """A published file: where it is and what it must hash to."""

    name: str
    url: str
    sha256: str


#: scikit-learn's mirrors (``sklearn/datasets/_lfw.py``).
ARCHIVES = {
    "funneled": Remote(
        "lfw-funneled.tgz",
        "https://ndownloader.figshare.com/files/5976015",
        "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a",
    ),
    "original": Remote(
        "lfw.tgz",
        "https://ndownloader.figshare.com/files/5976018",
        "055f7d9c632d7370e6fb4afc7468d40f970c34a80d4c6f50ffec63f5a8d536c0",
    ),
}
PAIRS = Remote(
    "pairsDevTest.txt",
    "https://ndownloader.figshare.com/files/5976009",
    "7cb06600ea8b2814ac26e946201cdb304296262aad67d046a16a7ec85d0ff87c",
)
#: Folders that an unpacked archive may be found in, best first.
FOLDERS: dict[str, tuple[str, ...]] = {
    "funneled": ("lfw_funneled", "lfw-funneled", "lfw-deepfunneled"),
    "original": ("lfw",),
}


class LfwOptions(BaseModel, frozen=True, extra="forbid"):
    alignment: Literal["funneled", "original"] = Field("funneled", description="Which of the published archives.")
    crop: int = Field(
        144, ge=32, le=250, description="Side of the central square of the 250x250 photo that is kept, in pixels."
    )
    download: bool = Field(True, description="Fetch what is missing; false fails instead.")


def default_root() -> Path:
    """Where LFW is kept if no data root is given: in ``BENCH_CACHE``, else in the user's cache folder."""
    return cache_folder() / "lfw"


def open_lfw(root: Path | None, image_size: int, options: LfwOptions) -> OpenedSet:
    """LFW under the View 1 split, downloaded (about 230 MB) if need be.

    ``root`` is a folder with the unpacked photos, or the archive, or neither yet; None for the user's cache folder.
    Everyone not in ``pairsDevTest.txt`` is there as faces, the others as victims under its 1,000 pairs (10 folds of
    50 + 50).

    Raises:
        MissingError: not there and not to be downloaded; says what to put where.
        DataError: a download with the wrong hash, or an unsafe archive.
    """
    root = root or default_root()
    pairs_file = _obtain(PAIRS, root, options.download)
    photos = _photos(root, options)
    return FolderSource(photos, image_size, crop=options.crop / 250, pairs_file=pairs_file).opened()


DATASET = Dataset(
    "Labeled Faces in the Wild, View 1; downloaded unless --data-root has it", LfwOptions, open_lfw, needs_root=False
)


def _photos(root: Path, options: LfwOptions) -> Path:
    for name in FOLDERS[options.alignment]:
        if (root / name).is_dir() and any(path.suffix == ".jpg" for path in (root / name).glob("*/*.jpg")):
            return root / name
    archive = ARCHIVES[options.alignment]
    unpack(_obtain(archive, root, options.download), root)
    for name in FOLDERS[options.alignment]:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{shown(root / archive.name)} holds none of the folders {', '.join(FOLDERS[options.alignment])}")


def _obtain(remote: Remote, root: Path, download: bool) -> Path:
    """The file, from the root or the network, its hash checked either way."""
    path = root / remote.name
    by_hand = f"download {remote.url} and save it as {shown(path)}"
    if path.exists():
        if (actual := pooch.file_hash(str(path), alg="sha256")) != remote.sha256:
            raise DataError(f"{shown(path)} has SHA-256 {actual}, expected {remote.sha256}: delete it and {by_hand}")
        return path
    if not download:
        raise MissingError(f"LFW is incomplete, {remote.name} is not there: {by_hand}")
    pooch.get_logger().setLevel("WARNING")  # stdout and stderr belong to the command line
    try:
        pooch.retrieve(remote.url, known_hash=f"sha256:{remote.sha256}", fname=remote.name, path=root)
    except ValueError as error:  # how pooch reports a wrong hash
        raise DataError(f"what {remote.url} serves is not {remote.name} (wrong SHA-256): {by_hand}") from error
    except Exception as error:  # requests, urllib3, ftplib and the file system each have their own
        reason = type(error).__name__ if not isinstance(error, OSError) or error.strerror is None else error.strerror
        raise MissingError(f"{remote.name} cannot be downloaded ({shown(reason)}): {by_hand}") from error
    return path


def unpack(archive: Path, root: Path) -> None:
    """Unpack an archive into ``root``, all of it or nothing.

    Members that would land elsewhere, links out of the folder and devices are refused (PEP 706, ``data`` filter).

    Raises:
        DataError: not an archive, damaged, or unsafe; or no space left.
    """
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
            with tarfile.open(archive, "r:*") as tar:
                tar.extractall(scratch, filter="data")
            for entry in Path(scratch).iterdir():
                if not (root / entry.name).exists():
                    os.replace(entry, root / entry.name)  # noqa: PTH105 - rename semantics are the point
    except tarfile.FilterError as error:
        raise DataError(f"{shown(archive)} is refused: {shown(error)}") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{shown(archive)} cannot be unpacked: {shown(error)}") from error
