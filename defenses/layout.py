"""Which channel of a representation means what, once the state is known or inferred."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defenses.base import Defense

_PROBE_SIDE = 2


class ChannelLayout(nn.Module):
    """Where each channel of a representation belongs, per state.

    :meth:`Defense.canonical` of a defence that picks and permutes channels spreads C channels over
    C' >= C canonical ones and fills the others with zeros. A network that starts with a linear map per channel needs
    no zeros: it takes the weights that belong to the canonical channels. This class finds these by probing.

    Row k of ``canonical``, int64 (K, C), says which of the ``width`` (C') canonical channels each channel is under row
    k of ``states``, int64 (K, D).
    """

    states: Tensor
    canonical: Tensor

    def __init__(self, states: Tensor, canonical: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("states", states.clone())
        self.register_buffer("canonical", canonical.clone())

    @property
    def varies(self) -> bool:
        """Whether the state changes anything: else there is nothing to undo."""
        return bool((self.canonical != self.canonical[:1]).any())

    def row_of(self, states: Tensor) -> Tensor:
        """:func:`row_numbers` of ``states`` among all of them."""
        return row_numbers(states.to(self.states.device), self.states)


def row_numbers(states: Tensor, listed: Tensor) -> Tensor:
    """int64 (N,): the row of ``listed`` (K, D) that each of ``states`` (N, D) equals.

    Raises:
        ValueError: one of them is not listed.
    """
    equal = (states[:, None, :] == listed).all(dim=2)
    if not equal.any(dim=1).all():
        raise ValueError("a state was given that the defence's states() does not list")
    return equal.int().argmax(dim=1)


@torch.no_grad()
def probe(mechanism: Defense, states: Tensor | None) -> ChannelLayout | None:
    """The layout of ``mechanism`` if its :meth:`Defense.canonical` places channels, else None.

    Channel c of the probe holds the constant c + 1, so that a map of the result tells where it came from. ``states``,
    int64 (K, D), are all; None for a defence that draws none, which has one layout and a state of no numbers.
    """
    drawn = states is not None
    if states is None:
        states = torch.zeros(1, 0, dtype=torch.int64)
    channels = mechanism.channels
    device = next((buffer.device for buffer in mechanism.buffers()), torch.device("cpu"))
    marks = torch.arange(1.0, channels + 1, device=device)
    rows = []
    for start in range(0, len(states), 16):
        state = states[start : start + 16]
        # Small maps do: a layout is about channels, and a black box probes many guesses.
        blank = torch.empty(len(state), channels, _PROBE_SIDE, _PROBE_SIDE, device=device)
        spread = mechanism.canonical(blank.copy_(marks[:, None, None]), state if drawn else None)
        values = spread[:, :, :1, :1]
        if spread.ndim != 4 or not torch.equal(spread, values.expand_as(spread)):
            return None
        rows.append(values[..., 0, 0])
    spread = torch.cat(rows)  # (K, C'), the mark found in each place
    placed = spread[:, :, None] == marks  # (K, C', C)
    once = (placed.sum(dim=1) == 1).all() and (placed.any(dim=2) | (spread == 0)).all()
    return ChannelLayout(states.to(device), placed.int().argmax(dim=1), spread.shape[1]) if once else None
