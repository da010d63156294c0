"""Folders of images: ``root/identity/image.*``, with an LFW-style ``pairs.txt`` where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bench.data.decode import DEFAULT_LIMITS, SUFFIXES, Decoded, Limits, Report, decode_files, no_report, shown
from bench.data.faces import FaceSet, PairProtocol, Skipped, Source
from bench.data.pairs import NamedPair, PairList, read_pairs
from bench.errors import DataError, MissingError

PAIRS = "pairs.txt"


class FolderOptions(BaseModel):
    """Options of the ``folder`` dataset.

    Attributes:
        use_pairs: follow ``pairs.txt`` if there is one; false draws pairs by seed all the same.
        crop: side of the central square that is kept, as a share of the shorter side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    use_pairs: bool = True
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, slots=True)
class Tree:
    """What lies in a folder of identities.

    Attributes:
        root: the folder.
        names: identities with at least one image file, sorted.
        paths: the image files, sorted within each identity, identities in order.
        labels: identity of each path, an index into ``names``.
        ignored: what is no image, with the reason.
    """

    root: Path
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    ignored: tuple[Skipped, ...]


def scan_tree(root: Path) -> Tree:
    """List a folder of identities; no image is opened. Names that start with a dot are passed over.

    Raises:
        MissingError: there is no such folder.
        DataError: it cannot be listed, or holds no image one level down.
    """
    if not root.is_dir():
        raise MissingError(f"{shown(root)} is not a folder: expected one with a sub-folder of images per identity")
    names: list[str] = []
    paths: list[Path] = []
    labels: list[int] = []
    ignored: list[Skipped] = []
    try:
        for entry in _visible(root):
            if not entry.is_dir():
                if entry.suffix.lower() in SUFFIXES:
                    ignored.append(Skipped(shown(entry.name), "lies beside the identity folders, not in one"))
                continue
            images = []
            for file in _visible(entry):
                if file.suffix.lower() in SUFFIXES:
                    images.append(file)
                else:
                    what = "a folder within an identity" if file.is_dir() else "not named like an image"
                    ignored.append(Skipped(shown(file.relative_to(root)), what))
            if images:
                labels += [len(names)] * len(images)
                names.append(shown(entry.name))
                paths += images
    except OSError as error:
        raise DataError(f"{shown(root)} cannot be listed: {error.strerror or error}") from error
    if not paths:
        raise DataError(f"{shown(root)} holds no images: expected {shown(root.name)}/<identity>/<image>.jpg or .png")
    if len(set(names)) < len(names):
        raise DataError(f"{shown(root)} has two folders whose names differ in unprintable characters only")
    return Tree(root, tuple(names), tuple(paths), tuple(labels), tuple(ignored))


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def load_folder(
    root: Path,
    image_size: int,
    options: FolderOptions | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    report: Report = no_report,
) -> Source:
    """Load a folder of identities.

    With a ``pairs.txt`` the people it names are the victims, with all their images, and everyone else is there to
    learn from. Without one, victims are split off and pairs drawn later, by seed.

    Args:
        root: the folder.
        image_size: side of the faces in pixels.
        options: see :class:`FolderOptions`.
        limits: what one image may cost.
        report: progress.

    Returns:
        faces (and victims) uint8 (N, 3, S, S); identities are named after their folders.

    Raises:
        MissingError: there is no such folder.
        DataError: no image, nobody with two images, a pair that names what is not there, or nobody left to learn from.
    """
    options = options or FolderOptions()
    tree = scan_tree(root)
    listed = read_pairs(root / PAIRS) if options.use_pairs and (root / PAIRS).exists() else None
    return load_tree("folder", tree, listed, root / PAIRS, image_size, crop=options.crop, limits=limits, report=report)


def load_tree(
    name: str,
    tree: Tree,
    listed: PairList | None,
    pairs_file: Path,
    image_size: int,
    *,
    crop: float = 1.0,
    limits: Limits = DEFAULT_LIMITS,
    report: Report = no_report,
) -> Source:
    """Decode a tree and set apart as victims the people whom a pair list names; see :func:`load_folder`."""
    pairs = None if listed is None else locate_pairs(tree, listed, pairs_file)  # before the long part
    decoded = decode_files(list(tree.paths), tree.root, image_size, crop=crop, limits=limits, report=report)
    skipped = tree.ignored + decoded.skipped
    kept = decoded.kept.numpy()
    if not len(kept):
        reason = f"{decoded.skipped[0].where}: {decoded.skipped[0].reason}"
        raise DataError(
            f"none of the {len(tree.paths)} images in {shown(tree.root)} can be used; the first is {reason}"
        )
    labels = np.asarray(tree.labels, dtype=np.int64)[kept]
    everyone = FaceSet(decoded.images, torch.from_numpy(labels), tree.names, skipped)
    if pairs is None or listed is None:
        if int(np.bincount(labels).max()) < 2:
            raise DataError(
                f"nobody in {shown(tree.root)} has two usable images ({len(skipped)} files skipped): "
                "without a second image of a person nothing can be verified"
            )
        present = np.unique(labels)
        return Source(name, _with_skipped(everyone.of_identities(torch.from_numpy(present)), skipped))
    ends = _decoded_ends(tree, listed, pairs, pairs_file, decoded)
    wanted = np.unique(np.asarray(tree.labels)[pairs])
    others = np.setdiff1d(np.unique(labels), wanted)
    if len(others) < 2:
        raise DataError(
            f"{shown(pairs_file)} names all but {len(others)} of the people in {shown(tree.root)}: at least 2 others "
            "are needed to learn from (use_pairs=false splits everyone by seed instead)"
        )
    victims, protocol = _listed_people(everyone, wanted, ends, listed)
    faces = everyone.of_identities(torch.from_numpy(others))
    return Source(name, _with_skipped(faces, skipped), victims, protocol)


def load_listed(
    tree: Tree, listed: PairList, pairs_file: Path, image_size: int, *, crop: float = 1.0, report: Report = no_report
) -> tuple[FaceSet, PairProtocol]:
    """The people whom a pair list names, with all their images, and the pairs.

    Args:
        tree: at least these people.
        listed: the list.
        pairs_file: where it lies.
        image_size: side of the faces in pixels.
        crop: see :class:`FolderOptions`.
        report: progress.

    Raises:
        DataError: a pair names what is not there or cannot be decoded.
    """
    pairs = locate_pairs(tree, listed, pairs_file)
    wanted = np.unique(np.asarray(tree.labels)[pairs])
    decoded = decode_files(list(tree.paths), tree.root, image_size, crop=crop, report=report)
    ends = _decoded_ends(tree, listed, pairs, pairs_file, decoded)
    labels = torch.tensor(tree.labels)[decoded.kept]
    victims, protocol = _listed_people(FaceSet(decoded.images, labels, tree.names), wanted, ends, listed)
    return _with_skipped(victims, decoded.skipped), protocol


def _decoded_ends(
    tree: Tree, listed: PairList, pairs: NDArray[np.int64], pairs_file: Path, decoded: Decoded
) -> NDArray[np.int64]:
    """``pairs`` (P, 2), indices into the tree, as indices into what could be decoded.

    Raises:
        DataError: one of them could not.
    """
    position = np.full(len(tree.paths), -1, dtype=np.int64)
    position[decoded.kept.numpy()] = np.arange(len(decoded.kept))
    lost = np.flatnonzero((position[pairs] < 0).any(axis=1))
    if len(lost):
        row = pairs[lost[0]]
        path = tree.paths[int(row[position[row] < 0][0])]
        reasons = {entry.where: entry.reason for entry in decoded.skipped}
        where = shown(path.relative_to(tree.root))
        raise DataError(
            f"{shown(pairs_file)} line {listed.pairs[int(lost[0])].line} needs {where}, "
            f"which cannot be used: {reasons[where]}"
        )
    return position[pairs]


def _listed_people(
    everyone: FaceSet, wanted: NDArray[np.int64], ends: NDArray[np.int64], listed: PairList
) -> tuple[FaceSet, PairProtocol]:
    """The identities ``wanted``, and the pairs ``ends`` (P, 2), indices into ``everyone``, over them."""
    within = np.cumsum(np.isin(everyone.labels.numpy(), wanted)) - 1
    first, second = torch.from_numpy(within[ends]).unbind(1)
    same, folds = torch.from_numpy(listed.same.copy()), torch.from_numpy(_folds(listed))
    protocol = PairProtocol(first.clone(), second.clone(), same, folds)
    return everyone.of_identities(torch.from_numpy(wanted)), protocol


def _folds(listed: PairList) -> NDArray[np.int64]:
    """The list's own folds; a list without any (View 1) is cut into ten, each with its share of both kinds.

    Somebody has to choose the threshold on other pairs than those it is judged on.
    """
    if listed.folds > 1:
        return np.asarray([pair.fold for pair in listed.pairs], dtype=np.int64)
    each = len(listed.pairs) // 2
    return np.tile(np.arange(each, dtype=np.int64) * min(10, each) // each, 2)


def _with_skipped(faces: FaceSet, skipped: tuple[Skipped, ...]) -> FaceSet:
    return FaceSet(faces.images, faces.labels, faces.names, skipped)


def locate_pairs(tree: Tree, listed: PairList, pairs_file: Path) -> NDArray[np.int64]:
    """The files that a list means: int64 (P, 2), indices into ``tree.paths``.

    Image 4 of ``Jo_Doe`` is the file whose name is ``Jo_Doe_0004`` up to its suffix; without such a file, the
    only one in the folder whose name ends in the number 4.

    Raises:
        DataError: a person or image is not there, or two files would do; with the line number.
    """
    by_stem: dict[tuple[str, str], list[int]] = {}
    by_number: dict[tuple[str, int], list[int]] = {}
    for i, path in enumerate(tree.paths):
        person = tree.names[tree.labels[i]]
        by_stem.setdefault((person, path.stem), []).append(i)
        if ending := re.search(r"[0-9]+$", path.stem):
            by_number.setdefault((person, int(ending[0])), []).append(i)
    people = set(tree.names)

    def locate(photo: tuple[str, int], pair: NamedPair) -> int:
        name, number = photo
        found = by_stem.get((name, f"{name}_{number:04d}")) or by_number.get((name, number)) or []
        if len(found) != 1:
            if name not in people:
                what = f"names {shown(name)!r}, who has no folder with images in {shown(tree.root)}"
            elif not found:
                what = f"names image {number} of {shown(name)!r}, which is not there"
            else:
                what = f"names image {number} of {shown(name)!r}, and {len(found)} files answer to that"
            raise DataError(f"{shown(pairs_file)} line {pair.line} {what}")
        return found[0]

    rows: Iterable[tuple[int, int]] = ((locate(p.first, p), locate(p.second, p)) for p in listed.pairs)
    return np.asarray(list(rows), dtype=np.int64)
