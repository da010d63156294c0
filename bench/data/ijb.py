"""The lists of IJB-B and IJB-C: which images make a template, which templates are compared, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.data.decode import readable, shown
from bench.errors import DataError

Numbers = NDArray[np.int64]


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


def _read(path: Path, columns: dict[str, Any], *, heading: bool = False) -> pd.DataFrame:
    """The first columns of a list with commas below a heading, or all of one with blanks and without."""
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
        except (ValueError, TypeError) as error:  # pandas' own are of these kinds
            raise DataError(f"{what}: {shown(str(error).strip().splitlines()[0])}") from error
    return table


def _numbers(column: pd.Series[Any]) -> Numbers:
    return column.to_numpy(dtype=np.int64, copy=True)  # torch takes what can be written to
