"""``bench data pack``: a folder of identities to InsightFace files."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel

from bench.data.base import Skipped
from bench.data.decode import ImageError, decode_image, open_image, shown
from bench.data.pairs import PairList
from bench.data.recordio import RecordWriter
from bench.data.sources.folder import PAIRS, FolderSource, pairs_in
from bench.data.verification_pack import VerificationPack, write_pack
from bench.errors import DataError, UsageError
from bench.progress import Report, no_report

#: Quality of what has to be encoded anew, as InsightFace's own packer has it.
JPEG_QUALITY = 95

#: Labels and counts are stored as float32, which is exact up to here.
_MAX_EXACT = 2**24

_EXIF_ORIENTATION = 0x0112


class Packed(BaseModel, frozen=True):
    """What :func:`pack` wrote: ``files`` by name in the folder ``out``, and what is in them.

    ``copied`` images are stored byte for byte, because they were JPEGs of the right size already; image files left out
    are ``skipped``, as (where, reason).
    """

    out: str
    files: tuple[str, ...]
    identities: int
    images: int
    pairs: int
    copied: int
    skipped: tuple[tuple[str, str], ...]


def pack(
    folder: Path,
    out: Path,
    *,
    image_size: int = 112,
    name: str = "lfw",
    overwrite: bool = False,
    report: Report = no_report,
) -> Packed:
    """Pack ``folder/identity/image.*`` as ``train.rec``, ``train.idx`` and ``property``.

    With a ``pairs.txt`` in the folder, the pairs go into ``<name>.bin``, the list is copied beside it, and the people
    it names are left out of ``train.rec``, so that both stay disjoint. JPEGs of the right size are stored as
    they are; everything else is decoded, cropped and resized as the loaders do it, and encoded as JPEG. Everything is
    written beside ``out`` and renamed when complete.

    ``image_size`` is in pixels, and 112 in InsightFace packs; ``name`` the stem of the verification pack; ``overwrite``
    replaces files of these names in ``out``.

    Raises:
        UsageError: a file to be written exists and ``overwrite`` is not set, or ``name`` is no file stem.
        MissingError: no such folder.
        DataError: no usable image, an image that a pair needs cannot be used, or writing failed.
    """
    if Path(name).name != name or not name:
        raise UsageError(f"{shown(name)!r} is no name for a verification pack")
    source = FolderSource(folder, image_size, pairs_file=pairs_in(folder))
    listed, pairs = source.listed, source.pairs
    slots = [] if pairs is None else np.stack((pairs.first, pairs.second), axis=1).flatten().tolist()
    files = ["train.rec", "train.idx", "property", *([f"{name}.bin", PAIRS] if listed is not None else [])]
    present = [file for file in files if (out / file).exists()]
    if present and not overwrite:
        raise UsageError(f"{shown(out / present[0])} exists already: choose another folder or allow overwriting")

    skipped: list[Skipped] = list(source.ignored)
    copied = done = 0
    total = len(source)

    def encoded(i: int) -> bytes:
        nonlocal copied, done
        done += 1
        if done % 50 == 0 or done == total:
            report(done, total)
        data, as_it_was = _encode(source.encoded_image(i), image_size)
        copied += as_it_was
        return data

    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        learners = np.flatnonzero(~np.isin(source.labels, source.labels[slots])).tolist()
        identities, images = _write_records(scratch / "train.rec", source, learners, encoded, skipped)
        if identities < 2:
            raise DataError(f"{shown(folder)} leaves {identities} identities to learn from, at least 2 are needed")
        (scratch / "property").write_text(f"{identities},{image_size},{image_size}", encoding="ascii")
        if listed is not None:
            blobs: dict[int, bytes] = {}
            for slot, row in enumerate(slots):
                try:
                    blobs[row] = blobs[row] if row in blobs else encoded(row)
                except ImageError as error:
                    raise DataError(f"{source.where_pair(slot // 2)} needs {source.where(row)}: {error}") from error
            write_pack(scratch / f"{name}.bin", VerificationPack(tuple(blobs[row] for row in slots), listed.same))
            (scratch / PAIRS).write_text(_as_text(listed), encoding="utf-8", newline="\n")
        scratch.chmod(0o755)  # mkdtemp's is private
        if out.exists():
            for file in files:
                os.replace(scratch / file, out / file)  # noqa: PTH105 - rename over what is there
        else:
            scratch.rename(out)
        report(total, total)
    except OSError as error:
        raise DataError(f"{shown(out)} cannot be written: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return Packed(
        out=str(out),
        files=tuple(files),
        identities=identities,
        images=images,
        pairs=0 if listed is None else len(listed.pairs),
        copied=copied,
        skipped=tuple((entry.where, entry.reason) for entry in skipped),
    )


def _write_records(
    file: Path, source: FolderSource, chosen: list[int], encoded: Callable[[int], bytes], skipped: list[Skipped]
) -> tuple[int, int]:
    """Write the chosen images; returns how many identities and images there are."""
    starts: list[int] = []  # the first image record of each identity
    key, person = 1, -1
    with RecordWriter(file) as writer:
        # The header comes first and knows how many images follow, which is known at the end. Its length is fixed.
        writer.write(0, (0.0, 0.0))
        for i in chosen:
            try:
                data = encoded(i)
            except ImageError as error:
                skipped.append(Skipped(source.where(i), str(error)))
                continue
            if source.labels[i] != person:
                person = int(source.labels[i])
                starts.append(key)
            writer.write(key, (float(len(starts) - 1),), data)
            key += 1
        if key + len(starts) > _MAX_EXACT:
            raise DataError(f"{key - 1} images are more than the format can count ({_MAX_EXACT})")
        for offset, bounds in enumerate(itertools.pairwise([*starts, key])):
            writer.write(key + offset, tuple(map(float, bounds)))
        writer.rewrite_first((float(key), float(key + len(starts))))
    return len(starts), key - 1


def _as_text(listed: PairList) -> str:
    each = len(listed.pairs) // (2 * listed.folds)
    lines = [f"{listed.folds}\t{each}" if listed.folds > 1 else f"{each}"]
    for pair in listed.pairs:
        (name, number), (other, last) = pair.first, pair.second
        lines.append(f"{name}\t{number}\t{last}" if pair.same else f"{name}\t{number}\t{other}\t{last}")
    return "\n".join(lines) + "\n"


def _encode(data: bytes, image_size: int) -> tuple[bytes, bool]:
    """(JPEG of the right size, whether it is ``data`` itself)."""
    pixels = decode_image(data, image_size)  # also for what is copied: a truncated file must not get in
    image = open_image(data)
    if (
        image.format == "JPEG"
        and image.mode == "RGB"
        and image.size == (image_size, image_size)
        and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    ):
        return data, True
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), False
