"""Which channel of a representation means what, once the state is known or inferred."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defenses.base import Defense

_PROBE_SIDE = 2
#: States probed at once.
_PROBED = 16


class ChannelLayout(nn.Module):
    """Where each channel of a representation belongs, per state.

    :meth:`Defense.canonical` of a defence that picks and permutes channels spreads C channels over C' canonical ones
    and fills the others with zeros; channels that are sent several times are averaged. A network that starts with a
    linear map per channel needs no zeros: it takes the weights that belong to the canonical channels. This class finds
    these by probing.

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

    Channel c of the probe holds the constant c + 1, so that a map of the result tells where it came from. Where the
    marks of channels that are sent several times have been averaged, each channel is marked by itself. ``states``,
    int64 (K, D), are all; None for a defence that draws none, which has one layout and a state of no numbers.
    """
    drawn = states is not None
    if states is None:
        states = torch.zeros(1, 0, dtype=torch.int64)
    device = next((buffer.device for buffer in mechanism.buffers()), torch.device("cpu"))
    marks = torch.arange(1.0, mechanism.channels + 1, device=device)

    def spread(state: Tensor, constants: Tensor) -> Tensor | None:
        """Where constants (n, C) end up, (n, C'); None where they are constants no more."""
        # Small maps do: a layout is about channels, and a black box probes many guesses.
        blank = constants[:, :, None, None].expand(-1, -1, _PROBE_SIDE, _PROBE_SIDE).contiguous()
        maps = mechanism.canonical(blank, state if drawn else None)
        values = maps[:, :, :1, :1]
        return values[..., 0, 0] if maps.ndim == 4 and torch.equal(maps, values.expand_as(maps)) else None

    rows, width = [], 0
    for state in states.split(_PROBED):
        found = spread(state, marks.expand(len(state), -1))
        if found is None:
            return None
        placed = found[:, :, None] == marks  # (n, C', C)
        if not ((placed.sum(dim=1) == 1).all() and (placed.any(dim=2) | (found == 0)).all()):
            each = [spread(one.expand(len(marks), -1), torch.eye(len(marks), device=device)) for one in state]
            shares = [None if share is None else share.T for share in each]  # (C', C)
            if any(share is None or not _averages(share, one, marks) for share, one in zip(shares, found, strict=True)):
                return None
            placed = torch.stack([share > 0 for share in shares if share is not None])
        rows.append(placed.int().argmax(dim=1))
        width = found.shape[1]
    return ChannelLayout(states.to(device), torch.cat(rows), width)


def _averages(shares: Tensor, found: Tensor, marks: Tensor) -> bool:
    """Whether each channel stands in one place, (C', C), and each place (C',) is the mean of the channels in it."""
    here = shares > 0
    mean = here / here.sum(dim=1, keepdim=True).clamp(min=1)
    close = torch.allclose(shares, mean) and torch.allclose(found, mean @ marks)
    return close and bool((here.sum(dim=0) == 1).all())
