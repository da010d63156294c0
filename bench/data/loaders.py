"""The datasets by name, and one function that loads any of them."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ValidationError

from bench.errors import MissingError, UsageError
from bench.progress import Report, no_report
from bench.registry import Registry, target

if TYPE_CHECKING:
    from bench.data.encoded import OpenedSet, Part
    from bench.data.faces import Source

S = TypeVar("S", "OpenedSet", "Source")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that can be chosen by name.

    Attributes:
        summary: one line for ``bench list``.
        Options: its option model.
        open: its reader, called as ``open(data_root, image_size, options)``; None where nothing is read.
        make: makes it where nothing is read, called as ``make(options, report=...)``.
        needs_root: whether it cannot do without a data root.
    """

    summary: str
    Options: type[BaseModel]
    open: Callable[[Any, int, Any], OpenedSet] | None = None
    make: Callable[..., Source] | None = None
    needs_root: bool = True


#: The data set whose identities are shared out, where a part has none of its own.
MAIN = "dataset"

#: Data sets of their own, by the settings that name them, and the parts that come from each.
ROLES: Mapping[str, tuple[str, ...]] = {
    "victims": ("victims",),
    "train_data": ("provider", "evaluator"),
    "attack_data": ("public",),
}


class DataName(NamedTuple):
    """A data set and where it lies, written ``NAME:ROOT``, or ``NAME`` where none is needed."""

    dataset: str
    root: Path | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """A data set by its name and root.

        Raises:
            ValueError: no such data set, or one that needs a root.
        """
        name, _, root = text.partition(":")
        if name not in DATASETS:
            raise ValueError(f"write DATASET:FOLDER, such as folder:photos; datasets are {', '.join(DATASETS)}")
        if DATASETS.get(name).needs_root and not root:
            raise ValueError(f"say where {name} lies: {name}:FOLDER")
        return cls(name, Path(root) if root else None)


#: Every file of ``sources`` is a data set, with an entry ``DATASET``.
DATASETS: Registry[Dataset] = Registry("dataset")
for _module in pkgutil.iter_modules([str(Path(__file__).parent / "sources")]):
    DATASETS.add(_module.name, target(f"bench.data.sources.{_module.name}:DATASET"))
DATASETS.add("synthetic", target("bench.data.synthetic:DATASET"))


def parse_options(name: str, options: Mapping[str, Any], *, image_size: int, seed: int) -> BaseModel:
    """Validate the options of the dataset ``name``.

    ``image_size`` and ``seed`` of the run are passed on where the dataset has options of these names.

    Raises:
        UsageError: unknown dataset, unknown option or a value that will not do.
    """
    model = DATASETS.get(name).Options
    defaults = {key: value for key, value in (("image_size", image_size), ("seed", seed)) if key in model.model_fields}
    try:
        return model.model_validate({**defaults, **options})
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(map(str, problem["loc"])) or "options"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) or "it has none"
            raise UsageError(f"dataset {name!r} has no option {option!r}: available: {known}") from error
        raise UsageError(f"dataset {name!r}, option {option}={problem['input']!r}: {problem['msg'].lower()}") from error


def check_stream(name: str) -> None:
    """Refuse to stream what is not on disk.

    Raises:
        UsageError: unknown dataset, or one of these; names those that can be streamed.
    """
    if DATASETS.get(name).open is None:
        able = ", ".join(other for other in DATASETS if DATASETS.get(other).open is not None)
        raise UsageError(f"stream=true: dataset {name!r} cannot be streamed (those that can: {able})")


def check_root(name: str, data_root: Path | None) -> None:
    """Refuse a dataset that needs a data root and is given none.

    Raises:
        UsageError: unknown dataset.
        MissingError: no data root.
    """
    if DATASETS.get(name).needs_root and data_root is None:
        raise MissingError(f"dataset {name!r} needs to know where its data lie: set --data-root or BENCH_DATA_ROOT")


def check_there(root: Path | None, flag: str = "--data-root") -> None:
    """Refuse a root that is not there, without looking into it; patterns of shards are not looked for.

    Raises:
        MissingError: it is not there; says which ``flag`` gave it.
    """
    if root is not None and root.suffix != ".tar" and not root.exists():
        raise MissingError(f"{flag}: {root} does not exist")


def load(
    name: str,
    *,
    data_root: Path | None,
    image_size: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    stream: bool = False,
    part: Part = "everything",
    limit: int | None = None,
    report: Report = no_report,
) -> Source:
    """Load a dataset by name; it is not yet split.

    ``data_root`` is not needed by ``synthetic`` and ``lfw``; ``image_size`` is in pixels; ``seed``, the run's, is for
    datasets that are drawn. With ``stream`` the faces are left on disk, not yet scanned; victims of its own are in
    memory either way. Of a ``part`` the rest is not decoded (:meth:`bench.data.encoded.OpenedSet.decoded`). With a
    ``limit`` so many faces are used at most, of whole identities drawn by ``seed``; victims of its own and their pairs
    stay whole. ``report(done, total)`` counts images.

    Raises:
        UsageError: unknown dataset or option, an impossible image size, or a dataset that cannot be streamed.
        MissingError: no data root, or nothing there.
        DataError: data that cannot be used.
    """
    if image_size < 8:
        raise UsageError(f"the image size must be at least 8 pixels, got {image_size}")
    if stream:
        check_stream(name)
    dataset = DATASETS.get(name)
    parsed = parse_options(name, options or {}, image_size=image_size, seed=seed)
    check_root(name, data_root)

    from bench.data.decode import readable  # whoever lists data sets needs no torch
    from bench.data.splits import whole_identities
    from bench.randomness import Streams

    def limited(loaded: S) -> S:
        if limit is None:
            return loaded
        faces = whole_identities(loaded.faces, limit, Streams(seed).generator("limit"))
        return replace(loaded, faces=faces, details=loaded.details | {"limit": limit})

    if dataset.open is not None:
        with readable(data_root or Path()):
            if data_root is not None and data_root.is_dir():
                os.scandir(data_root).close()  # what cannot be listed is not empty
            opened = limited(dataset.open(data_root, image_size, parsed))
            return opened.decoded(name, stream=stream, part=part, report=report)
    assert dataset.make is not None
    return limited(dataset.make(parsed, report=report))
