"""Laplace noise from a generator, for the defences that claim differential privacy with it.

Dwork et al., *Calibrating Noise to Sensitivity in Private Data Analysis*, TCC 2006.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def laplace(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent draws of density exp(-abs(x)) / 2, float32, on the generator's device; within +-16.7."""
    # Inverse CDF; u in (-1/2, 1/2], kept off the end where log1p is infinite. In place, as with 189 maps a face it is
    # memory traffic that takes the time.
    u = torch.rand(tuple(shape), generator=generator, device=generator.device).neg_().add_(0.5)
    u.clamp_(-0.5 + 2**-25, 0.5 - 2**-25)
    return u.abs().mul_(-2).log1p_().neg_().copysign_(u)
