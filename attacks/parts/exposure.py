"""Public faces as the defence would show them to an adversary on a given rung."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attacks.base import Adversary, Knowledge
from attacks.parts.plaintext import helps
from bench.memory import in_halves
from bench.randomness import derived
from defenses.base import Defense, Protected
from defenses.layout import ChannelLayout, probe

#: Under a black box a batch mixes this many guesses, so that no step follows one guess alone.
_GUESSES_PER_BATCH = 8


#: How many times the median of all faces a face has to exceed to say nothing of the others.
_WILD = 100.0


def tamed(energies: Tensor) -> Tensor:
    """Mean squares of N faces, float (N,), in which the median stands for what is more than a hundred times as much.

    A defence that sends one face in hundreds at ten thousand times its scale says nothing of the others by it; where
    scales merely vary nothing is changed.

    Example:
        >>> import torch
        >>> tamed(torch.tensor([1.0, 2.0, 3.0, 1e8]))
        tensor([1., 2., 3., 2.])
    """
    if not len(energies):
        return energies
    usual = energies.median()
    return torch.where(energies > _WILD * usual, usual, energies)


class Exposure:
    """Protects public faces afresh, with the mechanism in use or, under a black box, with guesses of it or the client.

    Every draw, but those of the client, comes from a generator derived from a name, so that any batch can be drawn
    again.
    """

    def __init__(
        self,
        adversary: Adversary,
        seed: int,
        *,
        guesses: int = 0,
        mechanism: Defense | None = None,
        client: bool = False,
    ) -> None:
        """Draws derive from the attack's ``seed``.

        ``mechanism`` is what the adversary has found out the defence to be, and is used alone. Under a black box there
        is a fixed pool of so many ``guesses`` of the secret; 0 makes fresh ones every time; with ``client`` the client
        protects instead, where the adversary has one that shows the secret at work.
        """
        self._adversary, self._seed = adversary, seed
        self._device = adversary.fabric.device
        asked = client and mechanism is None and helps(adversary, self._mechanism("mechanism"))
        self._client = adversary.client if asked else None
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
        return self._client is None and mechanism.states() is not None

    def _mechanism(self, *name: str | int) -> Defense:
        return self._adversary.mechanism(derived(self._seed, *name)).to(self._device)

    def _parts(self, faces: Tensor, *name: str | int) -> Iterator[tuple[Defense, Tensor, torch.Generator]]:
        """Which mechanism, with which draws, protects which part of a batch."""
        generator = derived(self._seed, *name)
        if self._fixed is not None and len(self._fixed) == 1:
            yield self._fixed[0], faces, generator
            return
        for number, part in enumerate(faces.chunk(_GUESSES_PER_BATCH)):
            if self._fixed is None:
                yield self._mechanism("guess", *name, number), part, generator
            else:
                yield self._fixed[int(torch.randint(len(self._fixed), (1,), generator=generator))], part, generator

    def protect(self, faces: Tensor, *name: str | int, state: Tensor | None = None) -> Protected:
        """Protect faces, float (N, 3, H, W) in [0, 1], with the draws called ``name``.

        Where one mechanism is in use, its states can be pinned to ``state``, int64 (N, D). What the client draws is
        not known.
        """
        if self._client is not None:
            return Protected(self._client(faces.to(self._device)), None)
        parts = [mechanism.protect(part, draws, state=state) for mechanism, part, draws in self._parts(faces, *name)]
        if len(parts) == 1:
            return parts[0]
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

        ``layout`` is that of the one mechanism in use, None where every guess has one of its own.

        Raises:
            ValueError: a guess has no layout.
        """
        for mechanism, part, draws in self._parts(faces, *name):
            drawn = layout or probe(mechanism, mechanism.states())
            if drawn is None:
                raise ValueError(f"{mechanism.name} has no channel layout to learn")
            yield mechanism.protect(part, draws), drawn


def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, size: int = 64) -> Tensor:
    """``function`` of ``inputs`` (N, ...), so many at a time: outside training nothing is gained by the batch."""
    parts = in_halves(lambda rows: function(inputs[rows]), len(inputs), size, "learning what is sent")
    return torch.cat(list(parts))


def split_identities(identities: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices (training, held out), both ascending, with about ``share`` of the identities held out.

    At least one identity, of int64 (M,), is held out, and at least one is not.

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
