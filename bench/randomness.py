"""Named, independent random streams derived from one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def base_seed(generator: torch.Generator) -> int:
    """A seed in [0, 2**62) that ``generator`` would draw next; the generator itself is left as it was.

    Peeking instead of drawing makes ``prepare`` and ``fit`` independent of the order they are called in.
    """
    peek = torch.Generator(device=generator.device)
    peek.set_state(generator.get_state())
    return int(torch.randint(2**62, (1,), generator=peek, device=generator.device))


def drawn_seed(generator: torch.Generator) -> int:
    """A seed in [0, 2**53), which JSON keeps, drawn from ``generator``."""
    return int(torch.randint(2**53, (1,), generator=generator, device=generator.device))


def derived(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for the stream called ``name``, independent of every other stream of ``seed``.

    >>> a, b = derived(0, "step", 7), derived(0, "step", 7)
    >>> bool((torch.rand(2, generator=a) == torch.rand(2, generator=b)).all())
    True
    """
    text = "/".join(str(part) for part in (seed, *name))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """The global CPU generator starts at the stream called ``name``, and is put back: for initial weights.

    >>> with seeded(0, "weights"):
    ...     first = torch.nn.Linear(2, 2).weight
    >>> with seeded(0, "weights"):
    ...     second = torch.nn.Linear(2, 2).weight
    >>> bool((first == second).all())
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived(seed, *name).initial_seed())
        yield


@dataclass(frozen=True, slots=True)
class Streams:
    """Derives a :class:`torch.Generator` per name, so that stages cannot disturb each other.

    The seed of a stream is the first 63 bits of SHA-256 over ``"<seed>/<name>"``: drawing more
    numbers in one stream, or adding a stream, leaves every other stream as it was.

    >>> streams = Streams(0)
    >>> a = torch.rand(2, generator=streams.generator("attack"))
    >>> b = torch.rand(2, generator=streams.generator("attack"))
    >>> bool((a == b).all())
    True
    """

    seed: int

    def seed_for(self, name: str) -> int:
        """Seed of the stream ``name``, in [0, 2**63)."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, name: str) -> torch.Generator:
        """A fresh CPU generator at the start of the stream ``name``.

        CPU generators are used on every device, so that a run draws the same numbers everywhere, but for the noise of
        a defence, which is drawn where it is added (:mod:`defenses.draws`).
        """
        return torch.Generator().manual_seed(self.seed_for(name))

    def numbered(self, name: str) -> Callable[[int], torch.Generator]:
        """A stream for every number: what is drawn for one thing does not depend on what came before it."""
        return lambda number: self.generator(f"{name}/{number}")
