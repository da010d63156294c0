"""One small generic registry: names to lazily imported objects, with 'did you mean'."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from bench.errors import UsageError

T = TypeVar("T")


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

    def get(self, name: str) -> T:
        """The object called ``name``.

        Raises:
            UsageError: there is none; the message lists what exists and the nearest match.
        """
        if name not in self._loaders:
            near = difflib.get_close_matches(name, self._loaders, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"unknown {self.kind} {name!r}: {hint}available: {', '.join(self)}")
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]
