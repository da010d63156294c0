"""The run store: one folder a run, written beside and renamed, never half a file.

``manifest.json`` says what was asked for and on what machine, ``metrics.json`` what came out,
``per_image.parquet`` and ``scores.parquet`` the raw values (no faces), ``events.jsonl`` what happened when,
``samples/`` the pictures, ``checkpoints/`` the weights.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from bench import __version__
from bench.errors import UsageError
from bench.files import drop_beside, replacing, sha256, write_text
from bench.results import PROTOCOL_VERSION, SCHEMA_VERSION, RunResult
from bench.run.config import RunConfig
from bench.run.launch import Launch

if TYPE_CHECKING:
    import pandas as pd

#: Packages whose versions may change a figure.
PACKAGES = ("torch", "torchvision", "lightning-fabric", "numpy", "scipy", "lpips", "onnxruntime")


def run_id(config: RunConfig) -> str:
    """Readable and unique to the configuration, so that the same command continues the same run."""
    digest = hashlib.sha256(json.dumps(config.identifying(), sort_keys=True, default=str).encode()).hexdigest()
    attacks = "+".join(name.strip() for name in config.attack.split(",")).replace(":", "-")
    parts = (
        config.defense,
        attacks,
        config.knowledge,
        config.data_of(config.home).dataset,
        f"seed{config.seed}",
        digest[:8],
    )
    return "-".join(parts)


@contextmanager
def alone(config: RunConfig, waiting: Callable[[], None]) -> Iterator[None]:
    """Within, no other process writes the folder of this run; ``waiting`` is called where one does, and awaited.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        (config.out / "cache").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.out / "cache"):  # else found out after the first training
            pass
        lock = FileLock(config.out / "cache" / f"{run_id(config)}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            waiting()
            held = lock.acquire()
    except OSError as error:
        raise _unwritable(config.out, error) from None
    with held:
        yield


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {out} cannot be written ({error.strerror}): choose another folder")


class RunStore:
    """Writes the folder of one run.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run_id = run_id(config)
        self.directory = config.out / self.run_id
        try:
            (self.directory / "samples").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise _unwritable(config.out, error) from None
        drop_beside(self.directory)
        # A result of an earlier try must not stand beside the events of this one.
        (self.directory / "metrics.json").unlink(missing_ok=True)
        (self.directory / "events.jsonl").unlink(missing_ok=True)
        self._last = self._started = datetime.now(UTC)

    def _now(self) -> datetime:
        """The time, never before what was written last: a clock that is set back makes nothing end before it began."""
        self._last = max(self._last, datetime.now(UTC))
        return self._last

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to ``events.jsonl``."""
        line = json.dumps({"time": self._now().isoformat(timespec="milliseconds"), "event": event, **fields})
        with (self.directory / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_manifest(self, status: str, device: str, precision: str, **more: Any) -> None:
        """Write ``manifest.json``; once at the start, once at the end with the artefacts' hashes, and ``more``."""
        import torch  # who only looks for runs does without

        artefacts = {
            str(path.relative_to(self.directory)): sha256(path)
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "events.jsonl")
        }
        document = {
            "schema": SCHEMA_VERSION,
            "protocol": PROTOCOL_VERSION,
            "run_id": self.run_id,
            "status": status,
            "started": self._started.isoformat(timespec="seconds"),
            "updated": self._now().isoformat(timespec="seconds"),
            "version": __version__,
            "git_commit": _git_commit(),
            "config": self.config.model_dump(mode="json"),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": torch.__version__},
            "device": device,
            "device_name": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
            "precision": precision,
            "processes": Launch.here().size,
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "artefacts": artefacts,
            **more,
        }
        write_text(self.directory / "manifest.json", json.dumps(document, indent=2) + "\n")

    def write_result(self, result: RunResult) -> None:
        """Write ``metrics.json``."""
        write_text(self.directory / "metrics.json", result.to_json())

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table of raw values as Parquet."""
        with replacing(self.directory / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)

    def keep_checkpoint(self, source: Path, name: str) -> None:
        """Keep a finished file of the cache as ``checkpoints/<name>``: linked where the disk can, else copied."""
        target = self.directory / "checkpoints" / name
        with replacing(target) as temporary:
            temporary.unlink()
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copy2(source, temporary)


@functools.cache
def _git_commit() -> str | None:
    """Commit of the checkout that the code runs from, '+' if it was changed; None outside one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
