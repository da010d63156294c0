"""Small pictures behind linear defences, and an adversary with traffic to listen to."""

from __future__ import annotations

import torch
from pictures import smooth
from torch import Tensor

from attacks.base import Observation
from bench.plugins import make_defense

SIZE = 24


def defense_of(name, **options):
    return make_defense(name, options, "cpu", SIZE)


def faces_of(count, seed):
    return smooth(count, SIZE, seed)


def adversary_of(make_adversary, defense, knowledge, seed=0):
    victims = faces_of(240, seed=77).float() / 255

    def traffic(count):
        generator = torch.Generator().manual_seed(5)
        for index in (torch.arange(count) % len(victims)).split(32):
            yield defense.protect(victims[index], generator).representation

    return make_adversary(defense, knowledge, faces=faces_of(240, seed=1), seed=seed, traffic=traffic)


def observe(defense, count=16, k=1, *, states=True, seed=3):
    faces = faces_of(count, seed=50).float() / 255
    generator = torch.Generator().manual_seed(seed)
    sent = [defense.protect(faces, generator) for _ in range(k)]
    drawn = None if sent[0].state is None or not states else torch.stack([one.state for one in sent], 1)
    return faces, Observation(torch.stack([one.representation for one in sent], 1), drawn)


def error(recovered: Tensor, faces: Tensor) -> float:
    return float((recovered - faces).square().mean().sqrt())
