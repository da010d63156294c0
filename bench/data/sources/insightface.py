"""InsightFace face packs: ``train.rec/.idx/property`` to learn from, a ``.bin`` pack to verify and attack on.

A pack alone has victims and nobody to learn from. Without a pack the people of the ``.rec`` are shared out, victims
included, as those of a folder are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from bench.data.base import GUESSED, components
from bench.data.decode import in_array, shown
from bench.data.encoded import EncodedSource, IdentityView, OpenedSet
from bench.data.loaders import Dataset
from bench.data.pairs import PairList, PairRows, even_folds, read_pairs
from bench.data.recordio import HEAD, RecordFile, scan
from bench.data.verification_pack import VerificationPack, read_pack
from bench.errors import DataError, MissingError

DEFAULT_PACK = "lfw.bin"
#: Where the identities of a pack come from that has no list of names.
FROM_PAIRS = "genuine pairs"


class InsightfaceOptions(BaseModel, frozen=True, extra="forbid"):
    pack: str | None = Field(
        None,
        description="File name of the verification pack; by default lfw.bin, else the only .bin there is. Without any, "
        "victims are split off train.rec and pairs drawn, by seed.",
    )
    max_identities: int | None = Field(
        None, ge=2, description="Only the first so many identities of train.rec are read; all by default."
    )
    max_images_per_identity: int | None = Field(
        None, ge=2, description="Only the first so many images of each identity are read; all by default."
    )


def open_insightface(root: Path, image_size: int, options: InsightfaceOptions) -> OpenedSet:
    """``train.rec``, or the only ``.rec`` there is, to learn from and a verification pack as victims.

    ``root`` is their folder, or the ``.rec`` alone, beside which no pack is looked for unless the options name one, or
    a ``.bin`` alone. Without a pack, victims are split off and pairs drawn later, by seed.

    The pack's pairs keep their order and are cut into ten folds of equal size, as the packs intend. An image that the
    pack repeats is a row once. Its identities are named from the ``pairs.txt`` beside it, if that list
    is the pack's own (:func:`pack_identities`), else ``pack:000000`` and so on.

    Raises:
        MissingError: no folder, no ``.rec``, or several packs and none is named.
        DataError: a damaged file.
    """
    if root.is_file() and root.suffix == ".bin":
        pack = PackSource(root, image_size)
        victims, pairs = pack.once()
        return OpenedSet(victims, victims, pairs, _told(pack))
    records = find_records(root)
    folder = records.parent
    source = RecordIOSource(records, image_size)
    faces = IdentityView.everything(source)
    if options.max_identities is not None or options.max_images_per_identity is not None:
        kept = np.zeros(len(source), dtype=bool)
        kept[first_rows(source.labels, options.max_identities, options.max_images_per_identity)] = True
        faces = faces.where_true(kept)
    if options.pack is None and (root != folder or not any(folder.glob("*.bin"))):
        return OpenedSet(faces)
    pack = PackSource(find_pack(folder, options.pack), image_size)
    return OpenedSet(faces, *pack.once(), _told(pack))


def _told(pack: PackSource) -> dict[str, str | int | float]:
    """What a result says of a pack."""
    guessed = {} if pack.guessed is None else {GUESSED: pack.guessed}
    return {
        "pack": pack.path.name,
        "pack_pairs": len(pack) // 2,
        "pack_identities_from": pack.naming,
        **guessed,
    }


DATASET = Dataset(
    "InsightFace packs: train.rec/.idx, with or without a .bin verification pack", InsightfaceOptions, open_insightface
)


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


#: From here on float32 leaves out whole numbers.
_FIRST_INEXACT = 2**24
#: Bytes of a record of two labels and no image.
_WITHOUT_IMAGE = HEAD.itemsize


class RecordIOSource(EncodedSource):
    """The images of a ``.rec`` file: 20 bytes of memory an image, whatever the images weigh.

    Opening reads the index and the labels: off the first image of every identity where the file says which images are
    whose, else off all headers, in one pass through the file. What an image's own header says is compared with that
    when it is read.

    Raises:
        MissingError: there is no such file.
        DataError: it is empty, cut off or damaged, or its index does not fit it.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.records, ranges = _images(RecordFile(path))
        if not len(self.records):
            raise DataError(f"{shown(path)} holds no image")
        if ranges is None:
            values = self._labels_of(np.arange(len(self.records)))
        else:
            values = np.repeat(self._labels_of(ranges[:, 0] - 1), ranges[:, 1] - ranges[:, 0])
        names, labels = np.unique(values, return_inverse=True)
        super().__init__(path, image_size, labels.astype(np.int32), names)

    def name(self, label: int) -> str:
        return f"train:{int(self._names[label]):06d}"

    def where(self, row: int) -> str:
        return self.records.where(row)

    def _labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._whole(rows, self.records.heads(rows))

    def _whole(self, rows: NDArray[np.int64], heads: NDArray[np.void]) -> NDArray[np.int64]:
        """The labels in the headers."""
        labels = np.where(heads["count"] > 0, heads["first"], heads["label"]).astype(np.float64)
        bad = np.flatnonzero(~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))))
        if len(bad):
            row = int(rows[bad[0]])
            raise DataError(f"{self.where(row)} has the identity {labels[bad[0]]}, which is no whole number")
        return labels.astype(np.int64)

    def encoded(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images, of which each is the identity's that it is listed under.

        Raises:
            DataError: a damaged record, or one of another identity.
        """
        buffer, begin, end, heads = self.records.bodies(rows)
        labels, known = self._whole(rows, heads), np.asarray(self._names)[self.labels[rows]]
        if not np.array_equal(labels, known):
            i = int(np.flatnonzero(labels != known)[0])
            raise DataError(
                f"{self.where(int(rows[i]))} is of identity {labels[i]}, "
                f"but the file's list of identities says {known[i]}"
            )
        return [buffer[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]


def _images(records: RecordFile) -> tuple[RecordFile, NDArray[np.int64] | None]:
    """The image records, and the keys [first, end) of each identity, int64 (K, 2), where the file has them.

    Record 0 of a face pack is a header with two labels and no image.
    """
    head = records.heads(np.zeros(1, dtype=np.int64))[0]
    if records.keys[0] != 0 or head["count"] != 2 or records.sizes[0] > _WITHOUT_IMAGE:
        return records, None
    if not (np.isfinite([head["first"], head["second"]]).all() and 1 <= head["first"] <= head["second"]):
        raise DataError(f"{records.where(0)}: the header claims the image range {head['first']} to {head['second']}")
    first, last = int(head["first"]), int(head["second"])
    if last >= _FIRST_INEXACT:
        # Labels are float32: these are rounded, and so are the ranges. Records of identities are known by their size.
        return records.select(np.flatnonzero((records.keys > 0) & (records.sizes > _WITHOUT_IMAGE))), None
    wanted = np.arange(1, first)
    rows = np.searchsorted(records.keys, wanted)
    absent = wanted[records.keys[np.minimum(rows, len(records) - 1)] != wanted]
    if len(absent):
        if records.index is not None and (unlisted := len(np.setdiff1d(scan(records.path), records.offsets))):
            raise DataError(
                f"{shown(records.index)} lacks {unlisted} of the records of {shown(records.path.name)} (delete the "
                "index to have the file scanned)"
            )
        raise DataError(
            f"{shown(records.path)} is incomplete: its header promises images 1 to {first - 1}, "
            f"{len(absent)} of them are missing, the first is {absent[0]}"
        )
    people = np.flatnonzero((records.keys >= first) & (records.keys < last))
    return records.select(rows), _ranges(records.heads(people), first)


def _ranges(heads: NDArray[np.void], end: int) -> NDArray[np.int64] | None:
    """The image ranges in the records of identities, where these share out all images 1 .. ``end`` - 1; else None."""
    pairs = np.stack((heads["first"], heads["second"]), axis=1)
    if not ((heads["count"] == 2) & np.isfinite(pairs).all(axis=1)).all() or (pairs != np.floor(pairs)).any():
        return None
    ranges = pairs[np.argsort(pairs[:, 0], kind="stable")].astype(np.int64)
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    if not len(ranges) or not np.array_equal(np.append(ranges[:, 0], end), np.append(1, ranges[:, 1])):
        return None
    return ranges


def find_records(root: Path) -> Path:
    """The record file that ``root`` means: itself, ``train.rec`` in it, or the only other ``.rec``.

    Raises:
        MissingError: there is none, or there are several and none is ``train.rec``.
    """
    if root.is_file() and root.suffix == ".rec":
        return root
    if not root.is_dir():
        raise MissingError(f"{shown(root)} is not a folder: point --data-root at one with train.rec, or at a .rec file")
    found = sorted(path.name for path in root.glob("*.rec") if path.is_file())
    if "train.rec" not in found and len(found) > 1:
        raise MissingError(
            f"{shown(root)} has several record files and no train.rec: point --data-root at one of "
            f"{', '.join(map(shown, found))}"
        )
    if not found:
        alone = " but a verification pack, and nobody else to learn from" if any(root.glob("*.bin")) else ""
        raise MissingError(f"{shown(root)} has no train.rec{alone} (for folders of images use --dataset folder)")
    return root / ("train.rec" if "train.rec" in found else found[0])


def find_pack(root: Path, name: str | None) -> Path:
    """The verification pack to use.

    Raises:
        MissingError: it is not there, or there are several and none is ``lfw.bin``.
    """
    packs = sorted(path.name for path in root.glob("*.bin") if path.is_file())
    if name is None:
        if not packs:
            raise MissingError(f"{shown(root)} has no verification pack (.bin)")
        if DEFAULT_PACK not in packs and len(packs) > 1:
            raise MissingError(
                f"{shown(root)} has several packs and no {DEFAULT_PACK}: "
                f"choose one with the option pack={'|'.join(map(shown, packs))}"
            )
        name = DEFAULT_PACK if DEFAULT_PACK in packs else packs[0]
    if name not in packs:
        has = f"it has {', '.join(map(shown, packs))}" if packs else "it has none"
        raise MissingError(f"{shown(root)} has no pack {shown(name)!r} ({has})")
    return root / name


class PackSource(EncodedSource):
    """The images of a verification pack, which is read into memory as it is: 2 P rows, pair i being 2 i and 2 i + 1.

    Attributes:
        naming: where the names of its people come from.

    Raises:
        MissingError: there is no such file.
        DataError: it is no pack or damaged, or the ``pairs.txt`` beside it is.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        pack = read_pack(path)
        names, owner, self.naming = pack_identities(pack, path.with_name("pairs.txt"), path.stem)
        super().__init__(path, image_size, owner.astype(np.int32), names)
        if self.naming == FROM_PAIRS:
            self.guessed = (
                f"{shown(path.name)} does not name its people: they are guessed from genuine pairs, which may take one "
                "for two, so nobody can be looked up among them (the pairs.txt it was made from, beside it, names them)"
            )
            self.notes = (self.guessed,)
        self._images, self.pairs_file = pack.images, path
        slots = np.arange(len(self))
        self.pairs: PairRows = PairRows(slots[0::2], slots[1::2], pack.same, even_folds(len(pack.same)))

    def where(self, row: int) -> str:
        return f"{shown(self.path.name)} image {row}"

    def encoded(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [in_array(self._images[row]) for row in rows.tolist()]

    def once(self) -> tuple[IdentityView, PairRows]:
        """The images, every one once, and the pairs over them.

        Identical bytes under two names stay two images, so that each keeps its label.
        """
        ids: dict[tuple[int, bytes], int] = {}
        image_of = np.array(
            [ids.setdefault(key, len(ids)) for key in zip(self.labels.tolist(), self._images, strict=True)]
        )
        new = np.zeros(len(self), dtype=bool)
        new[np.unique(image_of, return_index=True)[1]] = True
        pairs = replace(self.pairs, first=image_of[0::2], second=image_of[1::2])
        return IdentityView.everything(self).where_true(new), pairs


def pack_identities(
    pack: VerificationPack, pairs_file: Path, stem: str
) -> tuple[tuple[str, ...], NDArray[np.int64], str]:
    """Who is who in a pack, which itself says only who is the same.

    An LFW-style ``pairs.txt`` is taken for the pack's own if it has as many pairs with the same flags, and if two
    slots that it says show one photo (person and number) hold identical bytes: other packs, too, come as ten
    folds of 300 + 300, so the flags alone would prove nothing. Otherwise images are of one person where genuine
    pairs or identical bytes connect them. That may take one person for two (never paired as genuine).

    Returns:
        The names, those from a list behind a ``stem`` (``lfw`` makes ``lfw:Name``), the identity of each of the 2 P
        image slots (indices into the names), and where they come from.

    Raises:
        DataError: ``pairs.txt`` is there and is not LFW-style.
    """
    if pairs_file.exists() and _belongs(listed := read_pairs(pairs_file), pack):
        number = {name: i for i, name in enumerate(listed.names)}
        owner = [number[name] for pair in listed.pairs for name, _ in (pair.first, pair.second)]
        return tuple(f"{stem}:{name}" for name in number), np.asarray(owner, dtype=np.int64), pairs_file.name
    ids: dict[bytes, int] = {}
    content = np.asarray([ids.setdefault(image, len(ids)) for image in pack.images], dtype=np.int64)
    component = components(content[0::2][pack.same], content[1::2][pack.same], len(ids))
    return tuple(f"pack:{i:06d}" for i in range(component.max() + 1)), component[content], FROM_PAIRS


def _belongs(listed: PairList, pack: VerificationPack) -> bool:
    if len(listed.pairs) != len(pack.same) or not np.array_equal(listed.same, pack.same):
        return False
    shown_by: dict[tuple[str, int], bytes] = {}
    slots = (image for pair in listed.pairs for image in (pair.first, pair.second))
    return all(shown_by.setdefault(photo, image) == image for photo, image in zip(slots, pack.images, strict=True))
