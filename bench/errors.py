"""Errors that end a command: one clear line for the person, one exit code for the shell.

The command line prints ``str(error)`` and exits with ``error.exit_code``. Code outside the harness
(``defenses``, ``attacks``) raises :class:`ValueError` and friends; the harness translates them.
"""

from __future__ import annotations

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
