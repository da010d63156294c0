"""Generators derived per step from one seed, so that a resumed fit draws what an unbroken one draws."""

from __future__ import annotations

import hashlib

import torch


def base_seed(generator: torch.Generator) -> int:
    """A seed in [0, 2**62) that ``generator`` would draw next; the generator itself is left as it was.

    Peeking instead of drawing makes ``prepare`` and ``fit`` independent of the order they are called in.
    """
    peek = torch.Generator(device=generator.device)
    peek.set_state(generator.get_state())
    return int(torch.randint(2**62, (1,), generator=peek, device=generator.device))


def derived(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for the stream called ``name``, independent of every other stream of ``seed``.

    >>> a, b = derived(0, "step", 7), derived(0, "step", 7)
    >>> bool((torch.rand(2, generator=a) == torch.rand(2, generator=b)).all())
    True
    """
    text = "/".join(str(part) for part in (seed, *name))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
