"""Margin softmax whose classes lie on several processes: cosines to some centres, and their cross-entropy over all.

Both functions keep and return as few (N, n) matrices as they can: with a million centres each is half a gigabyte.
Their backward passes reuse those matrices, so they run once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench.recognition.processes import Processes

#: As in torch.nn.functional.normalize: shorter centres count as this long.
SHORTEST = 1e-12


class Centres(Protocol):
    """Rows that take part in a step, and the place for their gradient."""

    active: Tensor

    def gradient_buffer(self) -> Tensor:
        """Memory like ``active`` for the backward pass to fill."""


class Cosines(torch.autograd.Function):
    """cos t of unit embeddings (N, D) to the n active centres, and once more for each embedding's own one.

    ``apply(unit, centres, rows, columns, dtype)``: int64 ``rows`` and ``columns`` (P,) say which embeddings have their
    centre here, and which it is. Gives float32 (N, n) and (P,).

    The centres are not normalised one by one: with w_j = |w_j| u_j, the products <x, w_j> are divided by |w_j|, and

        dL/dw_j = (sum_i g_ij x_i - (sum_i g_ij cos_ij) u_j) / |w_j|,   g_ij = dL/dcos_ij,

    which saves three passes over n x D values. It goes to ``centres.gradient_buffer()``, not to autograd: the rows are
    a step's loan, not a parameter. ``dtype`` is that of the large products; own cosines are always float32, because the
    margin works on them and half precision rounds a cosine by up to 0.002 (bfloat16), 0.1 of a logit.
    """

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, centres: Centres, rows: Tensor, columns: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(unit.device.type, enabled=False):
            active = centres.active
            inverse = torch.linalg.vector_norm(active, dim=1).clamp_min_(SHORTEST).reciprocal_()
            narrow = active.to(dtype)
            cosine = (unit.to(dtype) @ narrow.T).float().mul_(inverse)
            own = (unit[rows] * active[columns]).sum(1) * inverse[columns]
            cosine[rows, columns] = own
        ctx.save_for_backward(unit, cosine, inverse, narrow, rows, columns)
        ctx.centres = centres
        return cosine, own

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor, own: Tensor) -> tuple[Tensor, None, None, None, None]:
        unit, cosine, inverse, narrow, rows, columns = ctx.saved_tensors
        with torch.autocast(unit.device.type, enabled=False):
            gradient[rows, columns] += own  # the softmax hands its gradient over: nobody else holds it
            along = cosine.mul_(gradient).sum(0).mul_(inverse).mul_(inverse)
            scaled = gradient.mul_(inverse).to(narrow.dtype)
            to_unit = (scaled @ narrow).float()
            active, to_centres = ctx.centres.active, ctx.centres.gradient_buffer()
            if narrow.dtype == torch.float32:
                torch.mm(scaled.T, unit, out=to_centres)
            else:
                to_centres.copy_(scaled.T @ unit.to(narrow.dtype))
            to_centres.addcmul_(active, along.unsqueeze(1), value=-1)
        return to_unit, None, None, None, None


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of N samples over the classes of all processes, from each one's cosines.

    ``apply(cosine, target, rows, columns, scale, filter, processes)``: the logits are ``scale`` times ``cosine``,
    (N, n), with ``target`` (P,) in its place at ``rows`` and ``columns``. Every sample's own class lies on exactly one
    process. Other classes whose cosine exceeds ``filter`` are left out of the softmax (None keeps all).

    Gives the same float32 scalar on every process. The exponentials are summed over all processes after subtracting the
    maximum over all (An et al., CVPR 2022, section 3.1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        cosine: Tensor,
        target: Tensor,
        rows: Tensor,
        columns: Tensor,
        scale: float,
        filter: float | None,
        processes: Processes,
    ) -> Tensor:
        logits = cosine * scale
        if filter is not None:
            logits.masked_fill_(cosine > filter, -torch.inf)
        logits[rows, columns] = target * scale
        peak = processes.maximum(logits.amax(1))
        shares = logits.sub_(peak.unsqueeze(1)).exp_()
        sums = torch.stack([shares.sum(1), torch.zeros_like(peak).index_copy_(0, rows, target * scale)])
        total, own = processes.sum(sums)
        ctx.save_for_backward(shares.div_(total.unsqueeze(1)), rows, columns)
        ctx.factor = scale / len(cosine)
        loss: Tensor = (total.log() + peak - own).mean()
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        shares, rows, columns = ctx.saved_tensors
        gradient = shares.mul_(outer * ctx.factor)
        to_target = gradient[rows, columns] - outer * ctx.factor
        gradient[rows, columns] = 0.0
        return gradient, to_target, None, None, None, None, None
