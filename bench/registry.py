"""One small generic registry: names to lazily imported objects, with 'did you mean'."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from bench.errors import UsageError

T = TypeVar("T")


def pick(kind: str, name: str, choices: Mapping[str, T]) -> T:
    """The choice called ``name``.

    Raises:
        UsageError: there is none; the message lists what exists and the nearest match.
    """
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown {kind} {name!r}: {hint}available: {', '.join(sorted(choices))}")
    return choices[name]


def target(name: str) -> Callable[[], Any]:
    """A loader of ``package.module:Name``, for :meth:`Registry.add`; nothing is imported before it runs."""
    module, _, attribute = name.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)


class Registry(Generic[T]):
    """Maps names to loaders; a loader runs (and imports what it needs) on first use only.

    >>> heads = Registry[int]("head")
    >>> heads.add("arcface", lambda: 1)
    >>> heads.get("arcface")
    1
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._loaders: dict[str, Callable[[], T]] = {}
        self._loaded: dict[str, T] = {}

    def add(self, name: str, loader: Callable[[], T]) -> None:
        """Register ``name``; a name can be taken once.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._loaders:
            raise ValueError(f"two {self.kind}s are called {name!r}")
        self._loaders[name] = loader

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaders))

    def __contains__(self, name: object) -> bool:
        return name in self._loaders

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its object."""
        return ((name, self.get(name)) for name in self)

    def get(self, name: str) -> T:
        """The object called ``name``.

        Raises:
            UsageError: there is none; the message lists what exists and the nearest match.
        """
        loader = pick(self.kind, name, self._loaders)
        if name not in self._loaded:
            self._loaded[name] = loader()
        return self._loaded[name]
