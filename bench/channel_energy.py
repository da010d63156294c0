"""How much energy public faces have in each frequency of the block DCT: what a frequency defence prunes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import plugins
from bench.data.faceset import to_float

_FACES = 256
_BATCH = 16


@torch.no_grad()
def channel_energy(described: dict[str, Any], faces: Tensor) -> dict[str, list[float]]:
    """Mean magnitude of each channel (Mi et al., ICCV 2023, section 3.2: energy = mean abs(x)), summed over colours.

    Args:
        described: what a defence says of itself.
        faces: uint8 (M, 3, H, H), public faces; the first 256 are measured.

    Returns:
        ``channel_energy``: 64 values, channel 8 u + v; nothing where the defence names no frequencies that it keeps.
    """
    if "kept_channels" not in described:
        return {}
    everything = plugins.make_defense("arcface-fd", {}, "cpu", faces.shape[-1])
    sample = faces[:_FACES]
    total = torch.zeros(everything.channels)
    for part in sample.split(_BATCH):
        sent = everything.protect(to_float(part), torch.Generator().manual_seed(0)).representation
        total += sent.abs().mean(dim=(2, 3)).sum(dim=0)
    per_channel: Tensor = (total / len(sample)).view(3, -1).sum(dim=0)
    return {"channel_energy": per_channel.tolist()}
