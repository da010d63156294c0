"""Protocols that are measured beside the victims': which packs and benchmarks there are, and a pack as verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.data import splits
from bench.data.decode import readable, shown
from bench.data.encoded import OpenedSet
from bench.data.faces import FaceSet, PairProtocol
from bench.data.ijb import ALIGNED, find_janus, open_janus
from bench.data.loaders import MAIN
from bench.data.sources.insightface import PackSource, find_pack, find_records
from bench.data.verification_pack import read_pack
from bench.errors import DataError, MissingError, UsageError
from bench.progress import Report, no_report
from bench.run.config import RunConfig

#: Stands for no pack.
NO_PACK = "none"

#: Benchmarks of templates, by what their lists begin with.
JANUS = ("ijbb", "ijbc")


@dataclass(frozen=True, slots=True)
class VerificationSet:
    """Faces that are verified under a protocol of their own, and not attacked.

    Attributes:
        name: of the pack, without its ending.
        faces: N of them.
        pairs: the protocol over ``faces``.
        notes: sentences that a result warns of.
        key: of all that it holds, for whoever stores what is made of it.
    """

    name: str
    faces: FaceSet
    pairs: PairProtocol
    notes: tuple[str, ...] = ()
    key: str = ""


def packs_of(config: RunConfig) -> dict[str, Path]:
    """What a run verifies beside its victims, by name: named in either data root, or beside the pack of the victims.

    Raises:
        MissingError, UsageError: as :func:`find_packs`.
    """
    if not config.utility:
        return {}
    victims, main = config.data_of(config.home), config.data_of(MAIN)
    root = victims.root if victims.dataset == "insightface" else main.root or victims.root
    return find_packs(config.verify, victims.dataset, root, config.options_of(config.home))


def find_packs(asked: Sequence[Path], dataset: str, root: Path | None, options: Mapping[str, Any]) -> dict[str, Path]:
    """The packs to verify beside the one that the victims of ``dataset`` come from, by name, in the order asked for.

    Benchmarks of templates (IJB-B, IJB-C) are folders among them.

    Args:
        asked: paths, or names of packs in the data root, with or without ``.bin``, or of benchmarks; ``none`` for no
            pack. Empty for all packs that lie in the folder of an InsightFace dataset whose victims come from one.
        dataset: name of the dataset.
        root: its data root.
        options: its options.

    Raises:
        MissingError: a pack is not there; names those that are.
        UsageError: two packs are of one name, or ``none`` stands beside a pack.
    """
    if Path(NO_PACK) in asked:
        if len(asked) > 1:
            raise UsageError(f"--verify {NO_PACK} leaves out all packs: name packs, or {NO_PACK}")
        return {}
    folder, victims = root, None
    if dataset == "insightface" and root is not None:
        with readable(root):
            if root.is_file() and root.suffix == ".bin":
                folder, victims = root.parent, root
            else:
                folder, named = find_records(root).parent, options.get("pack")
                if named is not None or (root == folder and any(folder.glob("*.bin"))):
                    victims = find_pack(folder, named)
    if asked:
        found = [_find(folder, pack) for pack in asked]
    else:
        found = sorted(victims.parent.glob("*.bin")) if victims is not None and root == folder else []
    packs: dict[str, Path] = {}
    for path in found:
        if victims is None or not path.samefile(victims):
            name = (find_janus(path) if path.is_dir() else None) or path.stem
            if name in packs:
                raise UsageError(f"--verify: two packs are called {shown(name)}: give each a name of its own")
            packs[name] = path
    return packs


def _find(folder: Path | None, pack: Path) -> Path:
    if pack.is_file() or (pack.is_dir() and find_janus(pack) is not None):
        return pack
    wanted = _plain(pack.name)
    if wanted in JANUS or pack.is_dir():
        inside = [] if folder is None or not folder.is_dir() or pack.name != str(pack) else [folder, *folder.iterdir()]
        for place in sorted(inside):
            if place.is_dir() and find_janus(place) == wanted:
                return place
        raise MissingError(
            f"--verify: there is no {shown(pack)}: expected a folder with loose_crop and meta/"
            f"{wanted if wanted in JANUS else JANUS[-1]}_face_tid_mid.txt, in the data root or by its path"
        )
    if folder is None or not folder.is_dir() or pack.name != str(pack):
        raise MissingError(f"--verify: there is no verification pack {shown(pack)}")
    return find_pack(folder, pack.name if pack.suffix == ".bin" else f"{pack.name}.bin")


def _plain(name: str) -> str:
    """``ijbc`` of ``IJB-C``."""
    return name.lower().replace("-", "").replace("_", "")


def check_packs(packs: Iterable[Path]) -> None:
    """Refuse a file that is no pack, and lists that are none, before anything is trained.

    Raises:
        MissingError: a list is not there.
        DataError: one is none, or damaged.
    """
    for path in packs:
        try:
            if path.is_dir():
                open_janus(path, ALIGNED)
            else:
                read_pack(path)
        except DataError as error:
            raise DataError(f"{error} (--verify names the packs to measure, or {NO_PACK})") from error


def load_pack(
    path: Path, image_size: int, learnt: Callable[[FaceSet], NDArray[np.bool_]], report: Report = no_report
) -> VerificationSet:
    """A pack decoded at ``image_size`` pixels, as a dataset's own verification set is.

    Whoever shares an identical image with those that a recogniser learns from is left out, with all pairs of theirs:
    what is trained depends on no pack.

    Args:
        path: of the pack.
        image_size: height and width in pixels.
        learnt: says of faces (N) which equal an image that is learnt from, bool (N,).
        report: called as ``report(done, total)``, counting images.

    Raises:
        MissingError: there is no such file.
        DataError: it is no pack or damaged, or an image cannot be decoded.
    """
    with readable(path):
        view, protocol = PackSource(path, image_size).once()
        source = OpenedSet(view, view, protocol).decoded(path.stem, stream=True, report=report)
    assert source.victims is not None
    assert source.pairs is not None
    # Its name decides, as part of its code, the keys of all that was ever trained.
    faces, pairs, _, notes = splits._official(source.victims, source.pairs)
    known = torch.isin(faces.labels, faces.labels[torch.from_numpy(learnt(faces))])
    kept = ~(known[pairs.first] | known[pairs.second])
    if left_out := int((~kept).sum()):
        people = len(faces.labels[known].unique())
        notes.append(f"{left_out} pairs of {people} people whose image a recogniser learns from are left out")
        pairs = PairProtocol(pairs.first[kept], pairs.second[kept], pairs.same[kept], pairs.fold[kept])
    where = shown(path.name)
    return VerificationSet(path.stem, faces, pairs, tuple(f"{where}: {note}" for note in notes))
