"""Numbers for every value of a representation: what a defence that adds noise draws.

They come from the generator a defence is given, and are drawn where they are used: a GPU is not made to wait for
millions of numbers of a CPU generator. There they start from one draw of it, so that they are other numbers than on a
CPU, as reproducible. States and keys, which are few, are the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.randomness import drawn_seed


def _near(generator: torch.Generator, device: torch.device) -> torch.Generator:
    if generator.device.type == device.type:
        return generator
    return torch.Generator(device).manual_seed(drawn_seed(generator))


def uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent float32 draws from [0, 1) on ``device``."""
    return torch.rand(tuple(shape), generator=_near(generator, device), device=device)


def gaussian(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent float32 draws of mean 0 and variance 1 on ``device``."""
    return torch.randn(tuple(shape), generator=_near(generator, device), device=device)


def laplace(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent float32 draws of density exp(-abs(x)) / 2, of variance 2, on ``device``; within +-16.7.

    Dwork et al., *Calibrating Noise to Sensitivity in Private Data Analysis*, TCC 2006, add them for differential
    privacy.
    """
    # Inverse CDF; u in (-1/2, 1/2], kept off the end where log1p is infinite. In place, as with 189 maps a face it is
    # memory traffic that takes the time.
    u = uniform(shape, generator, device).neg_().add_(0.5)
    u.clamp_(-0.5 + 2**-25, 0.5 - 2**-25)
    return u.abs().mul_(-2).log1p_().neg_().copysign_(u)
