"""The data sets of a run: which there are, their faces, and the keys of what is made of these."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from safetensors.torch import load_file

from bench.data.base import Faces
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.loaders import DATASETS, MAIN, load, parse_options
from bench.data.sources.webdataset import find_shards
from bench.data.stream.scan import Scan, scan
from bench.files import write_text
from bench.progress import Report
from bench.randomness import Streams
from bench.recognition.state import write_tensors
from bench.run.config import RunConfig
from bench.run.stage import CODE, Job, StageRunner, make_key


class DataSet:
    """One data set of a run: what was asked for, and its faces.

    Args:
        runner: makes its stages.
        config: the resolved configuration.
        streams: of the run.
        role: the setting that names it.
        part: what is wanted of it.
    """

    def __init__(self, runner: StageRunner, config: RunConfig, streams: Streams, role: str) -> None:
        self.runner, self.config, self.role = runner, config, role
        self.named, self.given = config.data_of(role), config.options_of(role)
        self.seed = streams.seed_for("data" if role == MAIN else f"data/{role}")
        self.made = DATASETS.get(self.named.dataset).open is None
        self.stream = config.stream and role != "victims" and not self.made

    @functools.cached_property
    def options(self) -> BaseModel:
        """Its options, as they are resolved."""
        return parse_options(self.named.dataset, self.given, image_size=self.config.image_size, seed=self.seed)

    @property
    def limit(self) -> int | None:
        """How many of its faces are used at most; victims of their own stay whole."""
        return None if self.role == "victims" else self.config.limit

    def asked_for(self) -> dict[str, Any]:
        """What decides which faces it has, but for the files."""
        return {
            "dataset": self.named.dataset,
            "options": dict(self.given),
            "image_size": self.config.image_size,
            "seed": self.seed,
            **({} if self.limit is None else {"limit": self.limit}),  # no other key changes
        }

    def on_disk(self) -> dict[str, Any]:
        """What a data set on disk is called by where nothing of it is read; the seed then decides nothing."""
        if self.made:
            return self.asked_for()
        files = {"files": fingerprint(self.named.root, self.config.out), "on_error": self.config.stream_on_error}
        return {**self.asked_for(), **files, "options": self.options.model_dump(), "seed": None, "stream": self.stream}

    @functools.cached_property
    def made_key(self) -> str:
        """Key of faces that are made, not read."""
        return make_key(self.asked_for(), CODE["rendered faces"])

    @functools.cached_property
    def source(self) -> Source:
        """The decoded faces. Rendered ones are stored; files on disk are quick to decode again, or stay there."""
        if self.stream:
            return replace(self.opened, faces=self.runner.do(self.scan_job()).applied_to(self.opened.on_disk))
        if not self.made:
            with self.runner.timed("data"), self.runner.bars.task(f"decode {self._what}") as report:
                return self.load(report)
        return self.runner.do(self.rendering_job())

    @property
    def _what(self) -> str:
        return "faces" if self.role == MAIN else f"{self.role.replace('_', ' ')}"

    def rendering_job(self) -> Job[Source]:
        """The stage that renders synthetic faces."""

        def make(folder: Path, report: Report) -> None:
            _write_source(folder, self.load(report))

        return Job("data", self.made_key, f"render {self._what}", make, _read_source)

    def load(self, report: Report, *, stream: bool = False) -> Source:
        """The data set, which stays on disk where it is to ``stream``."""
        home = self.role == "victims" or (self.role == MAIN and "victims" not in self.config.roles)
        return load(
            self.named.dataset,
            data_root=self.named.root,
            image_size=self.config.image_size,
            seed=self.seed,
            options=self.given,
            limit=self.limit,
            part="victims" if self.role == "victims" else "everything" if home else "faces",
            report=report,
            stream=stream,
        )

    @functools.cached_property
    def opened(self) -> Source:
        """The faces on disk, before anything is known of their pixels."""
        with self.runner.timed("data"), self.runner.bars.task(f"open {self._what}") as report:
            return self.load(report, stream=True)

    def scan_job(self) -> Job[Scan]:
        """The stage that looks through all faces on disk for copies and for what cannot be decoded."""

        def make(folder: Path, report: Report) -> None:
            scan(self.opened.on_disk, self.config.stream_on_error, report).save(folder)

        key = make_key(self.on_disk(), CODE["faces on disk"])
        return Job("scan", key, f"look through all {self._what} for copies", make, Scan.read)

    def found(self) -> dict[str, Any]:
        """What was decoded: digests of the faces, and of victims of its own, and how many images these are."""
        source, victims = self.source, self.source.victims
        return {
            "faces": digest(source.faces) if victims is None or self.role != "victims" else None,
            "victims": None if victims is None else digest(victims, source.pairs),
            "images": [len(source.faces), None if victims is None else len(victims)],
        }

    def sizes(self, found: dict[str, Any]) -> tuple[int, int | None] | None:
        """How many images to share out there are, and victims of its own; None where nobody knows yet."""
        if self.made:
            options = self.options.model_dump()
            return options["identities"] * options["images_per_identity"], None
        images, victims = found.get("images") or (None, None)
        return None if images is None else (images, victims)


def digest(faces: Faces, pairs: PairProtocol | None = None) -> str:
    """SHA-256 of all that is decoded: pixels (of streamed faces, their digests), labels, names and pairs.

    Files that are replaced under their old names, sizes and times are thus other data, and files that are moved, or
    come beside them, are not.
    """
    found = hashlib.sha256()
    content: np.ndarray[Any, Any] = faces.images.numpy() if isinstance(faces, FaceSet) else faces.digests()
    for array in (content, np.asarray(faces.labels)):
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    found.update("\0".join(map(faces.name, range(faces.identities))).encode(errors="surrogateescape"))
    if pairs is not None:
        for column in (pairs.first, pairs.second, pairs.same, pairs.fold):
            found.update(column.numpy().tobytes())
    return found.hexdigest()


def fingerprint(root: Path | None, out: Path | None = None) -> str | None:
    """A digest of name, size and times of every file that ``root`` means, cheap however many there are.

    Times are of the last change of the content, which an archive sets as it likes, and of the file's record, which it
    cannot set. Hidden files do not count, nor does what lies in the folder ``out`` of the runs.

    Raises:
        MissingError: a tar shard is not there.
    """
    if root is None:
        return None
    found = hashlib.sha256()
    for file in _files(root, None if out is None else out.resolve()):
        stat = file.stat()
        found.update(
            f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode(errors="surrogateescape")
        )
    return found.hexdigest()


def _files(root: Path, out: Path | None) -> Iterator[Path]:
    if root.is_dir():
        for folder, within, names in os.walk(root):
            within[:] = sorted(name for name in within if name[0] != "." and Path(folder, name).resolve() != out)
            yield from (file for name in sorted(names) if name[0] != "." and (file := Path(folder, name)).is_file())
    elif root.suffix == ".tar":
        yield from find_shards(root)
    elif root.is_file():
        yield root


def _write_source(folder: Path, source: Source) -> None:
    if source.victims is not None or source.pairs is not None:
        raise TypeError("only a source without a verification set of its own is stored")
    faces = source.in_memory
    write_tensors(folder / "faces.safetensors", {"images": faces.images, "labels": faces.labels})
    head = {"name": source.name, "names": faces.names, "synthetic": source.synthetic, "details": source.details}
    write_text(folder / "faces.json", json.dumps(head))


def _read_source(folder: Path) -> Source:
    tensors = load_file(folder / "faces.safetensors")
    head = json.loads((folder / "faces.json").read_text(encoding="utf-8"))
    faces = FaceSet(tensors["images"], tensors["labels"], tuple(head["names"]))
    return Source(head["name"], faces, synthetic=head["synthetic"], details=head["details"])
