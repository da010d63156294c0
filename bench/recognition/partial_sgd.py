"""Stochastic gradient descent that touches only the rows that took part in a step."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes of momentum brought together at once: small enough to stay in a processor's cache.
BLOCK_BYTES = 4 * 2**20


@torch.no_grad()
def update_rows(
    weight: Tensor,
    velocity: Tensor,
    rows: Tensor,
    values: Tensor,
    gradient: Tensor,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD, as :class:`torch.optim.SGD` takes it, on some rows of a matrix and of its momentum.

    Rows that were not sampled keep weight and momentum: neither decays while they wait (An et al., CVPR 2022).

    Args:
        weight: (C, D), changed in place.
        velocity: momentum of every row: (C, D), zero at first, changed in place.
        rows: int64 (n,), no row twice.
        values: ``weight[rows]``, or ``weight`` itself where all rows are updated in order; changed in place.
        gradient: (n, D); changed in place.
        learning_rate: of this step.
        momentum: share of the velocity that is kept.
        weight_decay: times the weights, added to the gradient.
    """
    per_block = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
    whole = values.data_ptr() == weight.data_ptr()
    gathered = velocity.new_empty(0 if whole else min(per_block, len(rows)), weight.shape[1])
    # Block by block, every value is brought from memory once and not once for each of the operations on it.
    for at in range(0, len(rows), per_block):
        block = slice(at, at + per_block)
        chosen, value, step = rows[block], values[block], gradient[block]
        step.add_(value, alpha=weight_decay)
        if whole:
            value.sub_(velocity[block].mul_(momentum).add_(step), alpha=learning_rate)
            continue
        moving = torch.index_select(velocity, 0, chosen, out=gathered[: len(chosen)]).mul_(momentum).add_(step)
        velocity.index_copy_(0, chosen, moving)
        weight.index_copy_(0, chosen, value.sub_(moving, alpha=learning_rate))
