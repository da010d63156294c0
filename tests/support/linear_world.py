"""Small pictures behind linear defences, and an adversary with traffic to listen to."""

from __future__ import annotations

import torch
from interception import observe as intercept
from pictures import smooth
from torch import Tensor

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
    faces = faces_of(count, seed=50)
    return faces.float() / 255, intercept(defense, faces, k, states=states, seed=seed)


def error(recovered: Tensor, faces: Tensor) -> float:
    return float((recovered - faces).square().mean().sqrt())
