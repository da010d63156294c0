"""The stages that make the data of a run, and how any stage is made, stored and read back."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.cache import StageCache, make_key
from bench.config import RunConfig
from bench.data.faceset import FaceSet, Source
from bench.data.loaders import load, open_stream
from bench.data.splits import Splits, split
from bench.data.stream.scan import Scan, scan
from bench.data.stream.sets import StreamedSource
from bench.data.stream.webdataset_source import find_shards
from bench.files import write_text
from bench.progress import ProgressBars, Report
from bench.randomness import Streams
from bench.team import Team

T = TypeVar("T")
Log = Callable[..., None]

#: Code that the data depends on: a change in it makes the stage anew.
DATA_CODE = ("bench.data",)


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One stage: how it is called and keyed, how it is made in a folder and read back from it."""

    stage: str
    key: str
    what: str
    make: Callable[[Path, Report], None]
    read: Callable[[Path], T]


class DataStages:
    """Makes, stores and reloads what the stages of one run produce; this part, its data.

    Args:
        config: the resolved configuration.
        fabric: device and precision.
        cache: where finished stages lie.
        bars: progress.
        log: called as ``log(event, **fields)``.
        team: processes that help to train recognisers, if there are any.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        fabric: Fabric,
        cache: StageCache,
        bars: ProgressBars,
        log: Log,
        team: Team | None = None,
    ) -> None:
        self.config = config
        self.team = team
        self.fabric = fabric
        self.cache = cache
        self.bars = bars
        self.log = log
        self.streams = Streams(config.seed)
        self.seconds: dict[str, float] = {}
        self.cached: list[str] = []
        self._results: dict[tuple[str, str], Any] = {}

    # -- data ------------------------------------------------------------------------------------

    @functools.cached_property
    def faces_key(self) -> str:
        """Key of all faces that there are: what was asked for and, for data on disk, what lies there."""
        config = self.config
        return make_key(
            {
                "dataset": config.dataset,
                "options": config.dataset_options,
                "image_size": config.image_size,
                "seed": self.streams.seed_for("data"),
                "files": fingerprint(config.data_root) if config.dataset != "synthetic" else None,
                "stream": {"on_error": config.stream_on_error} if config.stream else None,
            },
            DATA_CODE,
        )

    @functools.cached_property
    def data_key(self) -> str:
        """Key of the faces that are used: recognisers, which train on the disk, do not depend on what memory holds."""
        if not self.config.stream:
            return self.faces_key
        return make_key({"faces": self.faces_key, "hold": self.config.stream_images}, ())

    @functools.cached_property
    def source(self) -> Source | StreamedSource:
        """The decoded faces. Rendered ones are stored; files on disk are quick to decode again, or stay there."""
        if self.config.stream:
            return replace(self.opened, faces=self.do(self.scan_job()).applied_to(self.opened.faces))
        if self.config.dataset != "synthetic":
            with self.timed("data"), self.bars.task("decode faces") as report:
                return self.load_source(report)
        return self.do(Job("data", self.data_key, "render faces", self._make_source, _read_source))

    def load_source(self, report: Report) -> Source:
        return load(self.config.dataset, **self._wanted(report))

    def _wanted(self, report: Report) -> dict[str, Any]:
        return {
            "data_root": self.config.data_root,
            "image_size": self.config.image_size,
            "seed": self.streams.seed_for("data"),
            "options": self.config.dataset_options,
            "report": report,
        }

    @functools.cached_property
    def opened(self) -> StreamedSource:
        """The faces on disk, before anything is known of their pixels."""
        with self.timed("data"), self.bars.task("open faces") as report:
            return open_stream(self.config.dataset, **self._wanted(report))

    def scan_job(self) -> Job[Scan]:
        """The stage that looks through all faces on disk for copies and for what cannot be decoded."""

        def make(folder: Path, report: Report) -> None:
            scan(self.opened.faces, self.config.stream_on_error, report).save(folder)

        return Job("scan", self.faces_key, "look through all faces for copies", make, Scan.read)

    def _make_source(self, folder: Path, report: Report) -> None:
        _write_source(folder, self.load_source(report))

    @functools.cached_property
    def splits(self) -> Splits:
        """Identity-disjoint provider, public, evaluator and victim faces."""
        shares = self.config.shares.model_dump()
        if self.config.evaluator is not None:
            # Nothing is trained to judge: the others share out that part in proportion.
            spare = shares.pop("evaluator")
            shares = {name: share / (1 - spare) for name, share in shares.items()} | {"evaluator": 0.0}
        source, generator = self.source, self.streams.generator("split")
        if not self.config.stream:
            return split(source, **shares, generator=generator)
        with self.timed("data"), self.bars.task("decode faces") as report:
            return split(source, **shares, generator=generator, hold=self.config.stream_images, report=report)

    # -- how stages are kept ---------------------------------------------------------------------

    def platform(self) -> dict[str, str]:
        """What else decides the figures of a stage that computes with torch."""
        return {"torch": torch.__version__, "device": self.fabric.device.type}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Charge the block to ``stage``, without the stages that it asks for."""
        started = time.perf_counter()
        nested = sum(self.seconds.values())
        try:
            yield
        finally:
            # Verifying, for one, is not charged for training the recogniser.
            inner = sum(self.seconds.values()) - nested
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started - inner

    def assume(self, job: Job[T], value: T) -> None:
        """Take ``value`` for the result of a stage, in this run only; nothing is stored."""
        self._results[job.stage, job.key] = value

    def do(self, job: Job[T]) -> T:
        """Make the stage unless it is there, and read it back.

        It is read back in either case, so that a fresh result and a cached one cannot differ. Asked for again in the
        same run, it is the same object: not read twice, and not counted as reused.
        """
        if (job.stage, job.key) not in self._results:
            with self.timed(job.stage), self.cache.entry(job.stage, job.key) as entry:
                if entry.complete:
                    self.cached.append(job.stage)
                    self.log("cached", stage=job.stage, key=job.key)
                else:
                    self.log("stage", stage=job.stage, key=job.key)
                    with self.bars.task(job.what) as report:
                        job.make(entry.partial, report)
            self._results[job.stage, job.key] = job.read(entry.path)
        result: T = self._results[job.stage, job.key]
        return result


def fingerprint(root: Path | None) -> str | None:
    """A digest of name, size and modification time of every file that ``root`` means, cheap however many there are.

    Raises:
        MissingError: a tar shard is not there.
    """
    if root is None:
        return None
    digest = hashlib.sha256()
    for file in _files(root):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    if root.is_dir():
        for folder, within, names in os.walk(root):
            within.sort()
            yield from (file for name in sorted(names) if (file := Path(folder, name)).is_file())
    elif root.suffix == ".tar":
        yield from find_shards(root)
    elif root.is_file():
        yield root


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_source(folder: Path, source: Source) -> None:
    if source.victims is not None or source.pairs is not None:
        raise TypeError("only a source without a verification set of its own is stored")
    save_tensors({"images": source.faces.images, "labels": source.faces.labels}, folder / "faces.safetensors")
    head = {
        "name": source.name,
        "names": source.faces.names,
        "synthetic": source.synthetic,
        "details": source.details,
    }
    write_text(folder / "faces.json", json.dumps(head))


def _read_source(folder: Path) -> Source:
    tensors = load_file(folder / "faces.safetensors")
    head = json.loads((folder / "faces.json").read_text(encoding="utf-8"))
    faces = FaceSet(tensors["images"], tensors["labels"], tuple(head["names"]))
    return Source(head["name"], faces, synthetic=head["synthetic"], details=head["details"])
