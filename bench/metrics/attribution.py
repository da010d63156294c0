"""Which channels of a representation a function relies on: occlusion, and energy of gradients, per group of channels.

After Huber and Damer (Beyond Spatial Explanations: Explainable Face Recognition in the Frequency Domain, 2024), who
take frequencies out of a face and look at how the recogniser's score changes; here a group is a frequency of one
colour, and the function is a recogniser or an attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
"""Maps representations (N, ..., C, h, w) to outputs (N, ...), each face by itself."""


def _sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums of ``values`` (N, ..., C) over the members of each group: (``count``,); group -1 is left out."""
    inside = groups >= 0
    return values.new_zeros(count).index_add(0, groups[inside], values[inside])


def members(groups: Tensor, count: int) -> Tensor:
    """How many faces have a channel of each group: int64 (``count``,) of ``groups`` int64 (N, ..., C)."""
    own = torch.zeros(len(groups), count + 1, dtype=torch.int64, device=groups.device)
    own.scatter_(1, groups.flatten(1) % (count + 1), 1)  # -1 goes to the place that is cut off
    return own[:, :count].sum(dim=0)


def gradient_energy(
    batches: Iterable[tuple[Function, Tensor, Tensor]], count: int, *, directions: int, generator: torch.Generator
) -> Tensor:
    """Squared Frobenius norm of the Jacobian, by group: the mean over the faces that have it.

    The Jacobian is looked at along orthonormal random directions of the output, scaled so that the estimate is without
    bias (Hutchinson); as many as the output has dimensions give it exactly.

    Args:
        batches: a differentiable function, its inputs, float (N, ..., C, h, w), and the group of each of their
            channels, int64 (N, ..., C), -1 for none; one after another, as memory has to hold what each computes.
        count: how many groups there are.
        directions: of the output at most.
        generator: draws them, on the CPU.

    Returns:
        float32 (``count``,) on the CPU, NaN where no face has the group.

    Raises:
        RuntimeError: a function is not differentiable.
    """
    energy, having = torch.zeros(count), torch.zeros(count, dtype=torch.int64)
    for function, inputs, groups in batches:
        with torch.enable_grad():
            inputs = inputs.detach().clone().requires_grad_()
            outputs = function(inputs).flatten(1)
        size = outputs.shape[1]
        used = min(directions, size)
        drawn = torch.randn(size, used, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.T.to(outputs)
        for number, direction in enumerate(basis):
            # Outputs of one face do not depend on another: one pass backwards serves all of them.
            [gradient] = torch.autograd.grad((outputs @ direction).sum(), inputs, retain_graph=number + 1 < used)
            energy += size / used * _sums(gradient.square().sum(dim=(-2, -1)), groups, count).cpu()
        having += members(groups, count).cpu()
    return energy / having


@torch.no_grad()
def occlusion(
    function: Function,
    inputs: Tensor,
    groups: Tensor,
    count: int,
    *,
    distance: Callable[[Tensor, Tensor], Tensor],
    within: Callable[[], bool] = lambda: True,
) -> Tensor | None:
    """How far the outputs move when the channels of a group are set to the mean of what they hold, by group.

    Args:
        function: need not be differentiable.
        inputs: float (N, ..., C, h, w).
        groups: int64 (N, ..., C), the group of each channel; -1 for none.
        count: how many groups there are.
        distance: of two outputs of N faces: (N,).
        within: asked before each group; once it denies, the answer is None.

    Returns:
        float32 (``count``,), the mean over the faces that have the group, NaN where none has.
    """
    before, pixels = function(inputs), math.prod(inputs.shape[-2:])
    channels = torch.bincount(groups[groups >= 0], minlength=count)
    means = _sums(inputs.sum(dim=(-2, -1)), groups, count) / (pixels * channels)
    moved = torch.full((count,), math.nan, device=inputs.device)
    for group in channels.nonzero().flatten().tolist():
        if not within():
            return None
        taken = groups == group
        faces = taken.flatten(1).any(dim=1)
        occluded = torch.where(taken[..., None, None], means[group], inputs)
        moved[group] = distance(before, function(occluded))[faces].float().mean()
    return moved
