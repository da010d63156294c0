"""The trivial recoveries that every attack has to beat, for the victims of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.attack_stages import AttackStages
from bench.metrics.floors import grey, mean_face, nearest, noise
from defenses.base import Defense

#: Interceptions looked up at once by the floor ``nearest``, which protects all public faces for each such batch.
NEAREST_BATCH = 1024


def floor_recoveries(attacks: AttackStages, defense: Defense, probes: Tensor) -> dict[str, Tensor]:
    """Floor -> float32 (V, 3, H, W) in [0, 1]; see :mod:`bench.metrics.floors`."""
    streams, public = attacks.streams, attacks.stages.splits.public.images
    count, size = len(probes), attacks.config.image_size
    return {
        "mean_face": mean_face(public, count),
        "grey": grey(count, size),
        "noise": noise(count, size, streams.generator("floors")),
        "nearest": _nearest(attacks, defense, probes),
    }


def _nearest(attacks: AttackStages, defense: Defense, probes: Tensor) -> Tensor:
    """The public face whose representation is nearest to the intercepted one, with the adversary's knowledge."""
    generator = attacks.streams.generator("floors")
    mechanism = attacks.mechanism(defense)(generator)
    public = attacks.stages.splits.public.images.to(attacks.fabric.device)

    def protect(faces: Tensor) -> Tensor:
        return mechanism.protect(faces, generator).representation

    found = [
        nearest(representations[:, 0], public, protect, batch_size=attacks.config.batch_size).cpu()
        for _, representations, _ in attacks.interceptions(defense, probes, 1, batch_size=NEAREST_BATCH)
    ]
    return torch.cat(found)
