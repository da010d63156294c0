"""Errors that end a command: one clear line for the person, one exit code for the shell.

The command line prints ``str(error)`` and exits with ``error.exit_code``. Code outside the harness
(``defenses``, ``attacks``) raises :class:`ValueError` and friends; the harness translates them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

#: Characters of a message that are shown: a hostile file's text could fill a terminal.
LONGEST_LINE = 2000


def shown(text: object) -> str:
    """``text`` for a one-line message: line breaks, control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(message: str) -> str:
    """A message on one line that a terminal can be given, at most :data:`LONGEST_LINE` characters of it."""
    line = shown(" ".join(message.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class BenchError(Exception):
    """A run that failed for a reason the person can act on (exit code 3)."""

    exit_code: ClassVar[int] = 3


class UsageError(BenchError):
    """A wrong name, option or combination of options (exit code 2)."""

    exit_code: ClassVar[int] = 2


class NotApplicableError(UsageError):
    """An attack, by its name, that cannot work on a defence, and why, before anything is computed (exit code 2)."""

    def __init__(self, message: str, attack: str) -> None:
        super().__init__(message)
        self.attack = attack


class DataError(BenchError):
    """Data that is there but cannot be used: corrupt, hostile, of the wrong shape (exit code 3)."""


class DefenseError(BenchError, ValueError):
    """A defence that made what nobody may send: of another shape than it declares, or not finite (exit code 3).

    Whoever asked for it, attack or recogniser, is not to blame.
    """


class MissingError(BenchError):
    """Data or weights that are not there (exit code 5)."""

    exit_code: ClassVar[int] = 5


def memory_is_full(error: BaseException) -> bool:
    """Whether torch says that an accelerator's memory is full: by name and words, as torch is not imported here."""
    # cuBLAS and cuDNN, and MPS, say so in an ordinary RuntimeError.
    words = ("out of memory", "ALLOC_FAILED")
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def in_words(error: BaseException) -> str:
    """What went wrong and what to do, whoever raised it; the one place where foreign errors are put into words."""
    if isinstance(error, BenchError):
        return str(error)
    if isinstance(error, SystemExit):  # the suite's own commands end with it, and nothing within them
        return f"a plug-in or a library wanted to end the process (SystemExit: {error.code})"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk{where}: free some or choose another folder with --out"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{where}: choose another folder with --out, or change the file's permissions"
        return f"{error.strerror or error}{where}"
    if memory_is_full(error):
        return (
            "the accelerator's memory is full, of however few faces at once: stop what else runs on it, take smaller "
            "networks or faces (--image-size, --backbone), give it fewer faces at once (--batch-size 16, "
            f"--set training.batch_size=32, -a batch_size=16), or use --device cpu; finished stages are kept: {error}"
        )
    return f"{type(error).__name__}: {error}"


@contextmanager
def failing_as(what: str, kind: type[BenchError] = BenchError, *more: type[Exception]) -> Iterator[None]:
    """Name the plug-in in the one line that the person sees when it gives up, or wants to end the process.

    Plug-ins know nothing of the harness: they say what is wrong with ``ValueError`` (input, options) and
    ``ArithmeticError`` (a loss that is not finite). A defence that is to blame is named already.

    Raises:
        BenchError: of this ``kind``, in place of these errors and of ``more``.
    """
    try:
        yield
    except BenchError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise kind(f"{what}: {error}") from error
    except BaseException as error:
        if memory_is_full(error) or not isinstance(error, (SystemExit, *more)):
            raise
        raise kind(f"{what}: {in_words(error)}") from error
