"""What an adversary intercepts of faces."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.base import Observation


def observe(defense, faces: Tensor, k: int = 1, *, states: bool = False, seed: int = 9, **more) -> Observation:
    """``k`` interceptions of each of ``faces``, uint8 (N, 3, H, W), with the states if asked, and whatever ``more``."""
    generator = torch.Generator().manual_seed(seed)
    sent = [defense.protect(faces.float() / 255, generator) for _ in range(k)]
    known = torch.stack([part.state for part in sent], dim=1) if states and sent[0].state is not None else None
    return Observation(torch.stack([part.representation for part in sent], dim=1), known, **more)
