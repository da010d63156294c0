"""How often an attack names what the defence had drawn: its inferred channel places against the true ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.layout import probe
from bench.judge import LEAKAGE, Judge
from bench.results import StateInference
from defenses.base import Defense


def places_right(inferred: Tensor, states: Tensor, defense: Defense) -> Tensor | None:
    """Which channels were put in their place.

    Args:
        inferred: int64 (N, k, C), where the attack believes each channel belongs.
        states: int64 (N, k, D), what the defence drew.
        defense: the one in use.

    Returns:
        bool (N, k, C) on the CPU; None where a state of this defence does not place channels.

    Raises:
        ValueError: ``inferred`` has another shape or type.
    """
    expected = (*states.shape[:2], defense.channels)
    if tuple(inferred.shape) != expected or inferred.dtype != torch.int64:
        raise ValueError(
            f"inferred places must be int64 {expected}, got {str(inferred.dtype).removeprefix('torch.')} "
            f"{tuple(inferred.shape)}"
        )
    drawn = states.flatten(0, 1)
    # Only what was drawn is probed: a defence may have more states than can be listed.
    layout = probe(defense, torch.unique(drawn, dim=0))
    if layout is None:
        return None
    true = layout.places[layout.row_of(drawn)].unflatten(0, states.shape[:2])
    return torch.eq(inferred.cpu(), true.cpu())


def named_states(inferred: Tensor, states: Tensor, defense: Defense) -> Tensor | None:
    """Which state was drawn and which the attack named, as rows of :meth:`Defense.states`.

    Args:
        inferred: int64 (N, k, C), where the attack believes each channel belongs.
        states: int64 (N, k, D), what the defence drew.
        defense: the one in use.

    Returns:
        int64 (N, k, 2) on the CPU, (drawn, named), -1 where the layout named is that of no state; None where states
        cannot be listed or do not place channels.
    """
    listed = defense.states()
    layout = None if listed is None else probe(defense, listed)
    if layout is None:
        return None
    drawn = layout.row_of(states.flatten(0, 1))
    same = (inferred.flatten(0, 1)[:, None].to(layout.places.device) == layout.places).all(dim=2)
    named = torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)
    pairs: Tensor = torch.stack((drawn, named), dim=1).unflatten(0, states.shape[:2])
    return pairs.cpu()


def state_inference(right: Sequence[Tensor], defense: Defense, judge: Judge) -> StateInference | None:
    """Hit rates over the attacked images, with intervals over identities.

    Args:
        right: bool (V, k, C) of each attack that inferred places, images in the order of the probes; of several, each
            image counts as under the one that did best on it.
        defense: the one in use.
        judge: knows whose images they are.

    Returns:
        The rates, or None where no attack inferred anything.
    """
    if not right:
        return None
    faces = torch.stack([one.all(dim=2).double().mean(dim=1) for one in right]).amax(dim=0)
    channels = torch.stack([one.double().mean(dim=(1, 2)) for one in right]).amax(dim=0)
    states = defense.states()
    return StateInference(
        faces=judge.measure(faces, LEAKAGE),
        channels=judge.measure(channels, LEAKAGE),
        chance=None if states is None else 1 / len(states),
    )
