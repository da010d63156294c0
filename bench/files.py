"""Writes files beside their place and renames them, so that nobody ever sees half a file; where a cache is kept.

What people wrote is read in the encodings that their editors choose.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The project's name in package indexes, and of its cache folder.
DISTRIBUTION = "ppfr-bench"


#: Names of files that are being written, as :func:`replacing` makes them.
_BESIDE = re.compile(r"\..+\.beside(\.\w+)?")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    On any error the temporary file is removed and ``path`` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".beside{path.suffix}")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_beside(folder: Path) -> None:
    """Remove what :func:`replacing` left below a folder in processes that were killed; nobody else may write there."""
    for file in folder.rglob(".*.*"):
        if _BESIDE.fullmatch(file.name) and file.is_file():
            file.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it when the block ends well, and is removed on any error.

    Nothing may be at ``path`` yet.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's is private
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


#: Marks at the start of a text that say how it is encoded; without one it is UTF-8.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decode_text(data: bytes) -> str:
    """A text that somebody wrote: UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is no such text.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding)


def parse_json(document: bytes | str) -> Any:
    """A JSON document that may come from strangers.

    Raises:
        ValueError: it is none, or lists lie in lists deeper than any document needs.
    """
    try:
        return json.loads(document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def keep(path: Path, content: Any) -> Any:
    """Write a JSON value, what it is no type for as text, for :func:`kept`; the value as it will be read."""
    content = json.loads(json.dumps(content, default=str))
    write_text(path, json.dumps({"sha256": _seal(content), "content": content}, indent=2))
    return content


def kept(path: Path) -> Any:
    """What :func:`keep` wrote, of which everything can be done without; None where it is not there, or not whole."""
    try:
        stored = parse_json(path.read_bytes())
        return stored["content"] if stored["sha256"] == _seal(stored["content"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where downloads and lists are kept: ``BENCH_CACHE``, else the user's cache folder."""
    import platformdirs  # `bench doctor` has to start where it is missing

    named = os.environ.get("BENCH_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path(DISTRIBUTION)
