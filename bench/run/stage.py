"""The stage cache: what was computed once under the same options, inputs and code is not computed again."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from bench.progress import Report

KEY_LENGTH = 16


@functools.cache
def code_version(module: str) -> str:
    """SHA-256 over the source of a module, or of every module of a package.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(origin.parent)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_key(inputs: Mapping[str, Any], modules: Sequence[str]) -> str:
    """Key of a stage: resolved options, keys of its inputs, and the code that made it."""
    document = {"inputs": inputs, "code": {module: code_version(module) for module in sorted(modules)}}
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage's place in the cache.

    Attributes:
        path: the finished folder.
        partial: the folder to work in; what a killed run left there is for resuming.
        complete: whether ``path`` was there already.
    """

    path: Path
    partial: Path
    complete: bool


class StageCache:
    """Folders ``<root>/<stage>-<key>``, made under a lock and renamed into place when finished.

    Args:
        root: the cache folder.
        resume: whether finished and partial stages of earlier runs may be used.
    """

    def __init__(self, root: Path, *, resume: bool = True) -> None:
        self.root = root
        self.resume = resume
        self._made: set[Path] = set()

    def path(self, stage: str, key: str) -> Path:
        """Where a finished stage lies."""
        return self.root / f"{stage}-{key}"

    def holds(self, stage: str, key: str) -> bool:
        """Whether a finished result is there and may be used."""
        path = self.path(stage, key)
        return path.is_dir() and (self.resume or path in self._made)

    @contextmanager
    def entry(self, stage: str, key: str) -> Iterator[Entry]:
        """Work on a stage. If the block ends well, ``partial`` becomes ``path``.

        If it fails, ``partial`` stays for the next run to resume from.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.path(stage, key)
        partial = self.root / f"{stage}-{key}.partial"
        with FileLock(self.root / f"{stage}-{key}.lock"):
            if self.holds(stage, key):
                yield Entry(path, partial, complete=True)
                return
            if not self.resume:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            yield Entry(path, partial, complete=False)
            if self.resume and path.is_dir():
                # Made by a machine whose files this one saw late (network file systems do that): somebody may be
                # reading them, and they are as good.
                shutil.rmtree(partial)
                return
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            self._made.add(path)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One stage: how it is called and keyed, how it is made in a folder and read back from it."""

    stage: str
    key: str
    what: str
    make: Callable[[Path, Report], None]
    read: Callable[[Path], T]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
