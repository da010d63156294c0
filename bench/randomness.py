"""Named, independent random streams derived from one seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


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

        CPU generators are used on every device, so that a run draws the same numbers everywhere.
        """
        return torch.Generator().manual_seed(self.seed_for(name))
