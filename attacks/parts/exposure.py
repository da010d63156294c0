"""Public faces as the defence would show them to an adversary on a given rung."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attacks.base import Adversary, Knowledge
from bench.randomness import derived
from defenses.base import Defense, Protected
from defenses.layout import ChannelLayout, probe

#: Under a black box a batch mixes this many guesses, so that no step follows one guess alone.
_GUESSES_PER_BATCH = 8


class Exposure:
    """Protects public faces afresh, with the mechanism in use or, under a black box, with guesses of it.

    Every draw comes from a generator derived from a name, so that any batch can be drawn again.
    """

    def __init__(self, adversary: Adversary, seed: int, *, guesses: int = 0, mechanism: Defense | None = None) -> None:
        """
        Args:
            adversary: whose mechanism and knowledge to use.
            seed: the attack's own.
            mechanism: what the adversary has found out the mechanism to be; used alone.
            guesses: size of the fixed pool of guessed secrets under a black box; 0 for fresh ones every time.
        """
        self._adversary, self._seed = adversary, seed
        self._device = adversary.fabric.device
        self._fixed: list[Defense] | None = None
        if mechanism is not None:
            self._fixed = [mechanism.to(self._device)]
        elif adversary.knowledge is not Knowledge.BLACKBOX:
            self._fixed = [self._mechanism("mechanism")]
        elif guesses:
            self._fixed = [self._mechanism("guess", number) for number in range(guesses)]

    @property
    def countable(self) -> bool:
        """Whether the states that are drawn can be counted."""
        mechanism = self._fixed[0] if self._fixed else self._mechanism("mechanism")
        return mechanism.states() is not None

    def _mechanism(self, *name: str | int) -> Defense:
        return self._adversary.mechanism(derived(self._seed, *name)).to(self._device)

    def protect(self, faces: Tensor, *name: str | int, state: Tensor | None = None) -> Protected:
        """Protect a batch with the draws called ``name``.

        Args:
            faces: float (N, 3, H, W) in [0, 1].
            name: names the draws; the same name draws the same.
            state: int64 (N, D) to pin the states where one mechanism is in use.
        """
        generator = derived(self._seed, *name)
        if self._fixed is not None and len(self._fixed) == 1:
            return self._fixed[0].protect(faces, generator, state=state)
        parts = []
        for number, chunk in enumerate(faces.chunk(_GUESSES_PER_BATCH)):
            if self._fixed is None:
                mechanism = self._mechanism("guess", *name, number)
            else:
                mechanism = self._fixed[int(torch.randint(len(self._fixed), (1,), generator=generator))]
            parts.append(mechanism.protect(chunk, generator))
        states = [part.state for part in parts if part.state is not None]
        keys = [part.keys for part in parts if part.keys is not None]
        return Protected(
            torch.cat([part.representation for part in parts]),
            torch.cat(states) if states else None,
            torch.cat(keys) if keys else None,
        )

    def protect_with_layouts(
        self, faces: Tensor, layout: ChannelLayout | None, *name: str | int
    ) -> Iterator[tuple[Protected, ChannelLayout]]:
        """Protect a batch, part by part, each part with the layout of the mechanism that protected it.

        Args:
            faces: float (N, 3, H, W) in [0, 1].
            layout: of the one mechanism in use; None where every guess has a layout of its own.
            name: names the draws.

        Raises:
            ValueError: a guess has no layout.
        """
        if layout is not None:
            yield self.protect(faces, *name), layout
            return
        generator = derived(self._seed, *name)
        for number, chunk in enumerate(faces.chunk(_GUESSES_PER_BATCH)):
            guess = self._mechanism("guess", *name, number)
            states = guess.states()
            drawn = None if states is None else probe(guess, states)
            if drawn is None:
                raise ValueError(f"{guess.name} has no channel layout to learn")
            yield guess.protect(chunk, generator), drawn


def split_identities(identities: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices (training, held out), both ascending, with about ``share`` of the identities held out.

    At least one identity is held out, and at least one is not.

    Args:
        identities: int64 (M,).
        share: in (0, 1).
        generator: picks the identities.

    Raises:
        ValueError: fewer than two identities.
    """
    names = torch.unique(identities)
    if len(names) < 2:
        raise ValueError(
            f"the attacker's public faces show {len(names)} identities: at least 2 are needed, one of them to validate"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held_out = names[torch.randperm(len(names), generator=generator)[:count]]
    mask = torch.isin(identities, held_out)
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()
