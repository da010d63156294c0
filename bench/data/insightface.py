"""InsightFace face packs: ``train.rec/.idx/property`` to learn from, a ``.bin`` pack to verify and attack on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bench.data.decode import DEFAULT_LIMITS, Decoded, Limits, Report, decode_all, no_report, shown
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.pairs import PairList, read_pairs
from bench.data.recordio import RecordFile
from bench.data.verification_pack import VerificationPack, read_pack
from bench.errors import DataError, MissingError

DEFAULT_PACK = "lfw.bin"
FOLDS = 10


class InsightfaceOptions(BaseModel):
    """Options of the ``insightface`` dataset.

    Attributes:
        pack: file name of the verification pack; by default ``lfw.bin``, else the only ``.bin`` there is.
        max_identities: load the first so many identities of ``train.rec`` only.
        max_images_per_identity: load the first so many images of each only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pack: str | None = None
    max_identities: Annotated[int, Field(ge=2)] | None = None
    max_images_per_identity: Annotated[int, Field(ge=2)] | None = None


def load_insightface(
    root: Path,
    image_size: int,
    options: InsightfaceOptions | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    report: Report = no_report,
) -> Source:
    """Load ``train.rec`` as faces and a verification pack as victims.

    The pack's pairs keep their order and are cut into ten folds of equal size, as the packs intend. An image that the
    pack repeats is stored once. Its identities are named from the ``pairs.txt`` beside it, if that list
    is the pack's own (:func:`pack_identities`), else ``pack:000000`` and so on.

    Args:
        root: the folder.
        image_size: side of the faces in pixels.
        options: see :class:`InsightfaceOptions`.
        limits: what one image may cost.
        report: progress over the images of both files.

    Returns:
        faces uint8 (N, 3, S, S) with identities ``train:<label>``; victims with the pack's pairs.

    Raises:
        MissingError: no folder, no ``train.rec`` or no pack.
        DataError: a damaged file; an image of the pack that cannot be decoded; nothing left to train on.
    """
    options = options or InsightfaceOptions()
    verification = PackedVictims.open(root, options)
    with RecordFile(root / "train.rec") as records:
        keys, identities = image_records(records)
        chosen = first_rows(identities, options.max_identities, options.max_images_per_identity)
        keys, identities = keys[chosen], identities[chosen]
        total = len(keys) + len(verification)
        decoded = decode_all(
            len(keys),
            lambda i: records.record(int(keys[i])).payload,
            lambda i: f"train.rec record {keys[i]}",
            image_size,
            limits=limits,
            report=lambda done, _: report(done, total),
        )
    faces = _faces(decoded, identities)
    victims, pairs = verification.load(
        image_size, limits=limits, report=lambda done, _: report(len(keys) + done, total)
    )
    return Source("insightface", faces, victims, pairs, details=verification.details)


@dataclass(frozen=True, slots=True)
class PackedVictims:
    """A verification pack, opened, and who is who in it.

    Attributes:
        path: the file.
        pack: its encoded images.
        names: identities.
        owner: int64 (2 P,), the identity of each image slot.
        naming: where the names come from.
        image_of: int64 (2 P,), which stored image each slot shows.
        unique: int64 (M,), the slot that each stored image is taken from.
    """

    path: Path
    pack: VerificationPack
    names: tuple[str, ...]
    owner: NDArray[np.int64]
    naming: str
    image_of: NDArray[np.int64]
    unique: NDArray[np.int64]

    @classmethod
    def open(cls, root: Path, options: InsightfaceOptions) -> PackedVictims:
        """The pack of a folder with a ``train.rec``.

        Raises:
            MissingError: no folder, no ``train.rec`` or no pack.
            DataError: a damaged pack.
        """
        if not root.is_dir():
            raise MissingError(
                f"{shown(root)} is not a folder: point --data-root at one with train.rec and a .bin pack"
            )
        if not (root / "train.rec").is_file():
            raise MissingError(f"{shown(root)} has no train.rec (for folders of images use --dataset folder)")
        path = find_pack(root, options.pack)
        pack = read_pack(path)
        names, owner, naming = pack_identities(pack, root / "pairs.txt", path.stem)
        return cls(path, pack, names, owner, naming, *_unique_images(pack, owner))

    def __len__(self) -> int:
        return len(self.unique)

    @property
    def details(self) -> dict[str, str | int | float]:
        """What a result says of it."""
        return {"pack": self.path.name, "pack_pairs": len(self.pack.same), "pack_identities_from": self.naming}

    def load(
        self, image_size: int, *, limits: Limits = DEFAULT_LIMITS, report: Report = no_report
    ) -> tuple[FaceSet, PairProtocol]:
        """Decode it.

        Raises:
            DataError: an image cannot be decoded.
        """
        victims = decode_all(
            len(self.unique),
            lambda i: self.pack.images[self.unique[i]],
            lambda i: f"image {self.unique[i]}",
            image_size,
            limits=limits,
            report=report,
        )
        if victims.skipped:
            first = victims.skipped[0]
            raise DataError(
                f"{shown(self.path)}: {len(victims.skipped)} of its images cannot be used, and its pairs need them "
                f"all; the first is {first.where}: {first.reason}"
            )
        pairs = PairProtocol(
            torch.from_numpy(self.image_of[0::2]),
            torch.from_numpy(self.image_of[1::2]),
            torch.from_numpy(self.pack.same.copy()),
            torch.from_numpy(fold_numbers(len(self.pack.same))),
        )
        return FaceSet(victims.images, torch.from_numpy(self.owner[self.unique]), self.names), pairs


def find_pack(root: Path, name: str | None) -> Path:
    """The verification pack to use.

    Raises:
        MissingError: it is not there, or there are several and none is ``lfw.bin``.
    """
    packs = sorted(path.name for path in root.glob("*.bin") if path.is_file())
    if name is None:
        if DEFAULT_PACK in packs:
            name = DEFAULT_PACK
        elif len(packs) == 1:
            name = packs[0]
        elif packs:
            raise MissingError(
                f"{shown(root)} has several packs and no {DEFAULT_PACK}: "
                f"choose one with the option pack={'|'.join(map(shown, packs))}"
            )
        else:
            raise MissingError(f"{shown(root)} has no verification pack (.bin)")
    if name not in packs:
        has = f"it has {', '.join(map(shown, packs))}" if packs else "it has none"
        raise MissingError(f"{shown(root)} has no pack {shown(name)!r} ({has})")
    return root / name


def fold_numbers(pairs: int) -> NDArray[np.int64]:
    """Ten folds of consecutive pairs, equal in size up to one; one fold per pair below ten pairs."""
    return np.arange(pairs, dtype=np.int64) * min(FOLDS, pairs) // pairs


def image_records(records: RecordFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys (N,) and labels (N,) of the images in a record file.

    Raises:
        DataError: there is none, or a label is no whole number.
    """
    keys = records.image_keys()
    if not len(keys):
        raise DataError(f"{shown(records.path)} holds no image")
    labels = records.labels(keys)
    bad = np.flatnonzero(~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))))
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{shown(records.path)} is damaged at offset {records.offset(int(keys[row]))}: "
            f"record {keys[row]} has the identity {labels[row]}, which is no whole number"
        )
    return keys, labels.astype(np.int64)


def first_rows(identities: NDArray[np.signedinteger], most: int | None, each: int | None) -> NDArray[np.int64]:
    """Rows of the first ``most`` identities and the first ``each`` images of every one."""
    rows = np.arange(len(identities))
    if most is not None:
        rows = rows[np.isin(identities, np.unique(identities)[:most])]
    if each is not None:
        order = np.argsort(identities[rows], kind="stable")
        _, counts = np.unique(identities[rows], return_counts=True)
        begin = np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.sort(rows[order[np.arange(len(order)) - begin < each]])
    return rows


def _faces(decoded: Decoded, identities: NDArray[np.int64]) -> FaceSet:
    present, labels = np.unique(identities[decoded.kept.numpy()], return_inverse=True)
    if len(present) < 2:
        raise DataError(
            f"train.rec leaves {len(decoded.kept)} usable images of {len(present)} identities "
            f"({len(decoded.skipped)} images skipped), at least 2 identities are needed"
        )
    names = tuple(f"train:{label:06d}" for label in present)
    return FaceSet(decoded.images, torch.from_numpy(labels.astype(np.int64)), names, decoded.skipped)


def pack_identities(
    pack: VerificationPack, pairs_file: Path, stem: str
) -> tuple[tuple[str, ...], NDArray[np.int64], str]:
    """Who is who in a pack, which itself says only who is the same.

    An LFW-style ``pairs.txt`` is taken for the pack's own if it has as many pairs with the same flags, and if two
    slots that it says show one photo (person and number) hold identical bytes: other packs, too, come as ten
    folds of 300 + 300, so the flags alone would prove nothing. Otherwise images are of one person where genuine
    pairs or identical bytes connect them. That may take one person for two (never paired as genuine).

    Args:
        pack: the pack.
        pairs_file: a ``pairs.txt``, which need not exist.
        stem: prefix of the names that come from it (``lfw`` makes ``lfw:Name``).

    Returns:
        The names, the identity of each of the 2 P image slots (indices into the names), and where they come from.

    Raises:
        DataError: ``pairs.txt`` is there and is not LFW-style.
    """
    if pairs_file.exists():
        listed = read_pairs(pairs_file)
        if _belongs(listed, pack):
            slots = [name for pair in listed.pairs for name, _ in (pair.first, pair.second)]
            number = {name: i for i, name in enumerate(listed.names)}
            names = tuple(f"{stem}:{name}" for name in listed.names)
            return names, np.asarray([number[name] for name in slots], dtype=np.int64), pairs_file.name
    ids: dict[bytes, int] = {}
    content = np.asarray([ids.setdefault(image, len(ids)) for image in pack.images], dtype=np.int64)
    first, second = content[0::2][pack.same], content[1::2][pack.same]
    links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(ids), len(ids)))
    count, component = connected_components(links, directed=False)
    return tuple(f"pack:{i:06d}" for i in range(count)), component.astype(np.int64)[content], "genuine pairs"


def _belongs(listed: PairList, pack: VerificationPack) -> bool:
    if len(listed.pairs) != len(pack.same) or not np.array_equal(listed.same, pack.same):
        return False
    shown_by: dict[tuple[str, int], bytes] = {}
    slots = (image for pair in listed.pairs for image in (pair.first, pair.second))
    return all(shown_by.setdefault(photo, image) == image for photo, image in zip(slots, pack.images, strict=True))


def _unique_images(pack: VerificationPack, owner: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(2 P,) which stored image each slot shows; (M,) the slot that each stored image is taken from.

    Identical bytes under two names stay two images, so that each keeps its label.
    """
    ids: dict[tuple[int, bytes], int] = {}
    image_of = np.asarray(
        [ids.setdefault(key, len(ids)) for key in zip(owner.tolist(), pack.images, strict=True)], dtype=np.int64
    )
    _, unique = np.unique(image_of, return_index=True)
    return image_of, unique.astype(np.int64)
