"""The datasets by name, and one function that loads any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from bench.errors import MissingError, UsageError
from bench.registry import Registry

if TYPE_CHECKING:
    from bench.data.faces import Source
    from bench.data.sources.sets import StreamedSource

Report = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Request:
    """What a loader is asked for.

    Attributes:
        data_root: the folder with the data; None where none was given.
        image_size: side of the faces in pixels.
        options: an instance of the dataset's option model.
        report: progress, called as ``report(done, total)``.
    """

    data_root: Path | None
    image_size: int
    options: Any
    report: Report


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that can be chosen by name.

    Attributes:
        summary: one line for ``bench list``.
        Options: its option model.
        needs_root: whether it cannot do without a data root.
        load: the loader.
        stream: opens it with the faces left on disk; None where it cannot be streamed.
    """

    summary: str
    Options: type[BaseModel]
    needs_root: bool
    load: Callable[[Request], Source]
    stream: Callable[[Request], StreamedSource] | None = None


def _report_nothing(done: int, total: int) -> None:
    pass


def _synthetic() -> Dataset:
    from bench.data.synthetic import SyntheticOptions, load_synthetic

    return Dataset(
        "rendered faces, embedded; for trying the suite and for CI",
        SyntheticOptions,
        needs_root=False,
        load=lambda request: load_synthetic(request.options, report=request.report),
    )


def _insightface() -> Dataset:
    from bench.data.insightface import InsightfaceOptions, load_insightface
    from bench.data.sources.sets import stream_insightface

    return Dataset(
        "InsightFace packs: train.rec/.idx and a .bin verification pack",
        InsightfaceOptions,
        needs_root=True,
        load=lambda request: load_insightface(
            _root(request), request.image_size, request.options, report=request.report
        ),
        stream=lambda request: stream_insightface(
            _root(request), request.image_size, request.options, report=request.report
        ),
    )


def _folder() -> Dataset:
    from bench.data.folder import FolderOptions, load_folder
    from bench.data.sources.sets import stream_folder

    return Dataset(
        "root/identity/image.*, with an optional LFW-style pairs.txt",
        FolderOptions,
        needs_root=True,
        load=lambda request: load_folder(_root(request), request.image_size, request.options, report=request.report),
        stream=lambda request: stream_folder(
            _root(request), request.image_size, request.options, report=request.report
        ),
    )


def _webdataset() -> Dataset:
    from bench.data.sources.sets import WebDatasetOptions, load_webdataset, stream_webdataset

    return Dataset(
        "WebDataset tar shards: a folder of them, one, or name-{0000..0123}.tar",
        WebDatasetOptions,
        needs_root=True,
        load=lambda request: load_webdataset(_root(request), request.image_size, report=request.report),
        stream=lambda request: stream_webdataset(_root(request), request.image_size),
    )


def _lfw() -> Dataset:
    from bench.data.lfw import LfwOptions, load_lfw

    return Dataset(
        "Labeled Faces in the Wild, View 1; downloaded unless --data-root has it",
        LfwOptions,
        needs_root=False,
        load=lambda request: load_lfw(request.data_root, request.image_size, request.options, report=request.report),
    )


def _root(request: Request) -> Path:
    assert request.data_root is not None  # load() has made sure
    return request.data_root


DATASETS: Registry[Dataset] = Registry("dataset")
DATASETS.add("synthetic", _synthetic)
DATASETS.add("insightface", _insightface)
DATASETS.add("folder", _folder)
DATASETS.add("webdataset", _webdataset)
DATASETS.add("lfw", _lfw)


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


def load(
    name: str,
    *,
    data_root: Path | None,
    image_size: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    report: Report = _report_nothing,
) -> Source:
    """Load a dataset by name.

    Args:
        name: one of :data:`DATASETS`.
        data_root: where the data lie; not needed by ``synthetic`` and ``lfw``.
        image_size: side of the faces in pixels, at least 8.
        seed: the run's seed, for datasets that are drawn.
        options: the dataset's options.
        report: progress, called as ``report(done, total)`` in images.

    Returns:
        The dataset, not yet split.

    Raises:
        UsageError: unknown dataset or option, or an impossible image size.
        MissingError: no data root, or nothing there.
        DataError: data that cannot be used.
    """
    dataset, request = _request(name, data_root, image_size, seed, options, report)
    return dataset.load(request)


def open_stream(
    name: str,
    *,
    data_root: Path | None,
    image_size: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    report: Report = _report_nothing,
) -> StreamedSource:
    """Open a dataset by name with the faces left on disk, not yet scanned; takes and raises what :func:`load` does.

    Raises:
        UsageError: the dataset cannot be streamed.
    """
    check_stream(name)
    dataset, request = _request(name, data_root, image_size, seed, options, report)
    assert dataset.stream is not None
    return dataset.stream(request)


def check_stream(name: str) -> None:
    """Refuse to stream what cannot be streamed.

    Raises:
        UsageError: unknown dataset, or one of these; names those that can.
    """
    if DATASETS.get(name).stream is None:
        able = ", ".join(other for other in DATASETS if DATASETS.get(other).stream is not None)
        raise UsageError(f"stream=true: dataset {name!r} cannot be streamed (those that can: {able})")


def _request(
    name: str,
    data_root: Path | None,
    image_size: int,
    seed: int,
    options: Mapping[str, Any] | None,
    report: Report,
) -> tuple[Dataset, Request]:
    if image_size < 8:
        raise UsageError(f"the image size must be at least 8 pixels, got {image_size}")
    dataset = DATASETS.get(name)
    parsed = parse_options(name, options or {}, image_size=image_size, seed=seed)
    if dataset.needs_root and data_root is None:
        raise MissingError(f"dataset {name!r} needs to know where its data lie: set --data-root or BENCH_DATA_ROOT")
    return dataset, Request(data_root, image_size, parsed, report)
