"""What a machine must have in common with the one that started a sweep; checked before it is trusted with a cell."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bench.cache import code_version
from bench.sweep.journal import LOCK

#: What decides a cell's figures and cache keys.
_CODE = ("attacks", "bench", "defenses")


def _code() -> tuple[str, ...]:
    return tuple(code_version(package) for package in _CODE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sweep was started.

    Attributes:
        folder: the current folder there; paths on the command line are relative to it.
        journal: the sweep's directory, absolute; its lock is held there.
        code: versions of the code there.
    """

    folder: Path
    journal: Path
    code: tuple[str, ...]

    @classmethod
    def here(cls, journal: Path) -> Place:
        """This machine, which holds the lock of the sweep in ``journal``."""
        return cls(Path.cwd(), journal.resolve(), _code())

    def problem(self) -> str | None:
        """Why the process that calls this must not run a cell, in one line; None where it may.

        It has to see the sweep's files, and its lock: without locks across machines two cells would make the same
        stage in the same folder.
        """
        host = platform.node()
        if not self.folder.is_dir():
            return f"{host} has no folder {self.folder}: start the sweep in a folder that all machines share"
        lock = self.journal / LOCK
        if not lock.exists():
            return f"{host} does not see {self.journal}: --out must lie on a file system that all machines share"
        try:
            with FileLock(lock, timeout=0):
                return (
                    f"{host} is not kept out by the lock on {lock}: --out needs a file system with locks (NFS 4, say)"
                )
        except Timeout:
            pass  # as it should be: whoever started the sweep holds it
        if self.code != _code():
            return (
                f"{host} runs other code than the sweep was started with: install one version, and leave it meanwhile"
            )
        return None

    def enter(self) -> None:
        """Make the paths of the command line mean what they meant there."""
        os.chdir(self.folder)
