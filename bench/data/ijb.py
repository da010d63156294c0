"""IJB-B and IJB-C: which images make a template, which templates are compared, and whose they are.

In the layout in which the field hands them around: a folder with ``loose_crop/*.jpg`` and ``meta/`` with the lists
``ijbc_face_tid_mid.txt``, ``ijbc_template_pair_label.txt`` (1:1), ``ijbc_1N_gallery_G1.csv``, ``..._G2.csv``,
``ijbc_1N_probe_mixed.csv`` (1:N) and ``ijbc_name_5pts_score.txt`` (five landmarks and the detector's score of each
image).

Whitelam et al., "IARPA Janus Benchmark-B", CVPRW 2017; Maze et al., "IARPA Janus Benchmark - C", ICB 2018.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.data.decode import Encoded, ImageError, decode_image, in_array, read_image_file, readable, shown
from bench.data.encoded import EncodedSource
from bench.errors import DataError, MissingError, first_line

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[np.int64]

#: Where eyes, nose and corners of the mouth lie in an aligned face of :data:`ALIGNED` pixels a side: x and y, counted
#: from the middle of the first pixel (Deng et al., ArcFace, CVPR 2019).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
ALIGNED = 112

_IMAGES = "{}_face_tid_mid.txt"


@dataclass(frozen=True, slots=True)
class TemplateImages:
    """Names of N images, and of each the template that it is part of and the medium that it is from, int64 (N,).

    An image that is part of several templates is there several times.
    """

    names: tuple[str, ...]
    templates: Numbers
    media: Numbers


def read_template_images(path: Path) -> TemplateImages:
    """``ijbc_face_tid_mid.txt``: image, template and medium a line, with blanks between them.

    Raises:
        MissingError: it is not there.
        DataError: it is no such list.
    """
    table = _read(path, {"image": str, "template": np.int64, "medium": np.int64})
    return TemplateImages(tuple(table["image"]), _numbers(table["template"]), _numbers(table["medium"]))


def read_template_pairs(path: Path) -> tuple[Numbers, NDArray[np.bool_]]:
    """``ijbc_template_pair_label.txt``: two templates and 1 or 0 a line, with blanks between them.

    Returns:
        The templates, int64 (P, 2), and whether both are of one person, bool (P,).

    Raises:
        MissingError: it is not there.
        DataError: it is no such list.
    """
    table = _read(path, {"first": np.int64, "second": np.int64, "label": np.int64})
    label = _numbers(table["label"])
    if len(odd := np.flatnonzero((label != 0) & (label != 1))):
        raise DataError(f"{shown(path)} line {odd[0] + 1}: a label is 0 or 1, got {label[odd[0]]}")
    return np.stack([_numbers(table[name]) for name in ("first", "second")], axis=1), label == 1


def read_template_subjects(path: Path) -> tuple[Numbers, Numbers]:
    """A gallery or the probes of a search (``ijbc_1N_gallery_G1.csv``): template, subject and more, below a heading.

    Returns:
        The templates, each once and ascending, and whose each is, int64 (T,) both.

    Raises:
        MissingError: it is not there.
        DataError: it is no such list, or a template is of two people.
    """
    table = _read(path, {"template": np.int64, "subject": np.int64}, heading=True)
    table = table.drop_duplicates().sort_values("template")
    templates = _numbers(table["template"])
    if len(twice := templates[1:][templates[1:] == templates[:-1]]):
        raise DataError(f"{shown(path)}: template {twice[0]} is of two subjects")
    return templates, _numbers(table["subject"])


def read_landmarks(path: Path) -> tuple[dict[str, int], NDArray[np.float64], NDArray[np.float32]]:
    """``ijbc_name_5pts_score.txt``: image, x and y of five landmarks in pixels, and the detector's score a line.

    Returns:
        Where each of N images stands, by its name; the landmarks, float64 (N, 5, 2); the scores, float32 (N,).

    Raises:
        MissingError: it is not there.
        DataError: it is no such list, or a number is not finite.
    """
    numbers = [f"{axis}{point}" for point in range(1, 6) for axis in "xy"]
    table = _read(path, {"image": str, **dict.fromkeys([*numbers, "score"], np.float64)})
    values = table[[*numbers, "score"]].to_numpy()
    if len(odd := np.flatnonzero(~np.isfinite(values).all(axis=1))):
        raise DataError(f"{shown(path)} line {odd[0] + 1}: a number is not finite")
    rows = {str(name): row for row, name in enumerate(table["image"])}
    return rows, values[:, :-1].reshape(-1, 5, 2), values[:, -1].astype(np.float32)


@dataclass(frozen=True, slots=True)
class Janus:
    """One of these benchmarks, opened: N images on disk, and its lists.

    Attributes:
        name: ``ijbb`` or ``ijbc``: what its lists begin with.
        source: the images, in the order of ``images``.
        images: what template each is part of.
        weights: float32 (N,), the detector's score of each image; ones where there is none.
        pairs: int64 (P, 2) templates, and bool (P,) whether they are of one person; None without such a list.
        galleries: by name, the templates that are searched and whose they are.
        probes: the templates that are looked for, and whose they are; None without 1:N lists.
    """

    name: str
    source: JanusImages
    images: TemplateImages
    weights: NDArray[np.float32]
    pairs: tuple[Numbers, NDArray[np.bool_]] | None
    galleries: Mapping[str, tuple[Numbers, Numbers]]
    probes: tuple[Numbers, Numbers] | None

    def subjects(self) -> dict[int, int]:
        """Whose the templates of the 1:N lists are."""
        lists = [*self.galleries.values(), *([] if self.probes is None else [self.probes])]
        return {
            template: subject
            for templates, subjects in lists
            for template, subject in zip(templates.tolist(), subjects.tolist(), strict=True)
        }


def find_janus(folder: Path) -> str | None:
    """What the lists in a folder's ``meta`` begin with, such as ``ijbc``; None where there are no such lists."""
    found = sorted((folder / "meta").glob(_IMAGES.format("*")))
    return found[0].name.removesuffix(_IMAGES.format("")) if found else None


def open_janus(folder: Path, image_size: int) -> Janus:
    """One of these benchmarks; no image is read.

    Without landmarks the images are taken to be aligned, and all weigh the same.

    Args:
        folder: with ``loose_crop`` and ``meta``.
        image_size: height and width of the faces in pixels.

    Raises:
        MissingError: a folder or list is not there.
        DataError: a list is none, or they do not belong together.
    """
    meta, name = folder / "meta", find_janus(folder)
    if name is None:
        raise MissingError(f"{shown(meta)} has no list of templates such as {_IMAGES.format('ijbc')}")
    if not (folder / "loose_crop").is_dir():
        raise MissingError(f"{shown(folder / 'loose_crop')} does not exist: the images of {name} lie there")
    images = read_template_images(meta / _IMAGES.format(name))
    points, weights = None, np.ones(len(images.names), dtype=np.float32)
    if (landmarks := meta / f"{name}_name_5pts_score.txt").exists():
        rows, points, weights = read_landmarks(landmarks)
        if (missing := next((image for image in images.names if image not in rows), None)) is not None:
            raise DataError(f"{shown(landmarks)} lacks {shown(missing)}: the lists do not belong together")
        order = [rows[image] for image in images.names]
        points, weights = points[order], weights[order]
    pairs = meta / f"{name}_template_pair_label.txt"
    galleries = {path.stem.rpartition("_")[2]: path for path in sorted(meta.glob(f"{name}_1N_gallery_*.csv"))}
    probes = meta / f"{name}_1N_probe_mixed.csv"
    if not pairs.exists() and not (galleries and probes.exists()):
        raise MissingError(
            f"{shown(meta)} has neither {pairs.name} (1:1) nor galleries and {probes.name} (1:N): nothing to measure"
        )
    janus = Janus(
        name=name,
        source=JanusImages(folder / "loose_crop", image_size, images.names, points),
        images=images,
        weights=weights,
        pairs=read_template_pairs(pairs) if pairs.exists() else None,
        galleries={gallery: read_template_subjects(path) for gallery, path in galleries.items()},
        probes=read_template_subjects(probes) if galleries and probes.exists() else None,
    )
    listed = [] if janus.pairs is None else [janus.pairs[0].flatten()]
    if janus.probes is not None:
        listed += [templates for templates, _ in (*janus.galleries.values(), janus.probes)]
    if len(absent := np.setdiff1d(np.concatenate(listed), images.templates)):
        raise DataError(f"template {absent[0]} of {shown(meta)} has no image: the lists do not belong together")
    return janus


class JanusImages(EncodedSource):
    """Images of a folder by their names, aligned by landmarks, float64 (N, 5, 2) in pixels, where there are any.

    Nobody is told apart here: all are of one identity.
    """

    def __init__(
        self, path: Path, image_size: int, names: tuple[str, ...], landmarks: NDArray[np.float64] | None
    ) -> None:
        super().__init__(path, image_size, np.zeros(len(names), dtype=np.int32), [path.parent.name])
        self._files, self._landmarks = names, landmarks

    def where(self, row: int) -> str:
        return shown(f"{self.path.name}/{self._files[row]}")

    def encoded(self, rows: NDArray[np.int64]) -> list[Encoded]:
        encoded: list[Encoded] = []
        for row in rows.tolist():
            try:
                data = read_image_file(self.path / self._files[row])
                if self._landmarks is not None:
                    data = aligned(data, self._landmarks[row])
                encoded.append(in_array(data))
            except ImageError as error:
                encoded.append(error)
        return encoded


def aligned(data: bytes, landmarks: NDArray[np.float64]) -> bytes:
    """An encoded image turned, scaled and moved so that its landmarks (5, 2) come nearest to :data:`TEMPLATE`.

    The similarity of least squares; bilinear, black beyond the borders.

    Returns:
        A BMP of :data:`ALIGNED` pixels a side, RGB.

    Raises:
        ImageError: it cannot be decoded.
    """
    image = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    # As complex numbers: w = m z + t from the image to the template; resampling asks for the way back.
    source, target = (points @ np.array([1, 1j]) for points in (landmarks, TEMPLATE))
    spread = source - source.mean()
    if not (power := float(np.square(np.abs(spread)).sum())):
        raise ImageError("its landmarks are one point")
    back = power / np.vdot(spread, target - target.mean())
    a, b = float(back.real), float(back.imag)
    shift = source.mean() - back * target.mean()
    # Pillow counts from the corner of the first pixel, landmarks from its middle.
    c, d = float(shift.real) + 0.5 - 0.5 * (a - b), float(shift.imag) + 0.5 - 0.5 * (a + b)
    face = image.transform(
        (ALIGNED, ALIGNED), Image.Transform.AFFINE, (a, -b, c, b, a, d), resample=Image.Resampling.BILINEAR
    )
    buffer = io.BytesIO()
    face.save(buffer, "BMP")
    return buffer.getvalue()


def _read(path: Path, columns: dict[str, Any], *, heading: bool = False) -> pd.DataFrame:
    """The first columns of a list with commas below a heading, or all of one with blanks and without."""
    import pandas as pd

    what = f"{shown(path)} is no list of {', '.join(columns)}"
    options: dict[str, Any] = {"sep": r"\s+", "header": None}
    if heading:
        options = {"sep": ",", "header": 0, "usecols": range(len(columns))}
    with readable(path):
        try:
            with path.open(encoding="utf-8") as file:
                first = file.readline().strip()
            if heading and first.partition(",")[0].isdigit():
                raise DataError(f"{shown(path)} has no heading: it starts with {shown(first[:60])}")
            if not heading and len(first.split()) != len(columns):
                raise DataError(f"{what}: it starts with '{shown(first[:60])}'")
            options |= {"names": list(columns), "dtype": columns, "keep_default_na": False}
            table: pd.DataFrame = pd.read_csv(path, **options)
        except (ValueError, TypeError, OverflowError) as error:  # pandas' own are of these kinds
            raise DataError(f"{what}: {shown(first_line(error))}") from error
    return table


def _numbers(column: pd.Series[Any]) -> Numbers:
    return column.to_numpy(dtype=np.int64, copy=True)  # torch takes what can be written to
