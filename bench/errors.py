"""Errors that end a command: one clear line for the person, one exit code for the shell.

The command line prints ``str(error)`` and exits with ``error.exit_code``. Code outside the harness
(``defenses``, ``attacks``) raises :class:`ValueError` and friends; the harness translates them.
"""

from __future__ import annotations

from typing import ClassVar


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
