"""Defences made ready for use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional

from bench.nets.heads import CosFace
from defenses.base import Defense, DefenseTraining
from defenses.template import Misfit, TemplateDefense

#: D of the recognisers that defences are given here.
EMBEDDING = 24


def training(identities: int = 4, size: int = 24, folder: Path | None = None, seed: int = 0) -> DefenseTraining:
    """Eight random faces of each identity around a colour of its own, and recognisers of one layer."""
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(8)
    colours = torch.rand(identities, 3, 1, 1, generator=drawn)[labels]
    faces = 0.5 * colours + 0.5 * torch.rand(len(labels), 3, size, size, generator=drawn)

    def make_recogniser(shape):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * shape[0], EMBEDDING))
        return network, CosFace(EMBEDDING, identities, scale=16.0, margin=0.0)

    return DefenseTraining(
        batches=lambda batch_size, generator: (
            (faces[index], labels[index])
            for index in torch.randperm(len(labels), generator=generator).split(batch_size)
        ),
        images=len(labels),
        identities=identities,
        generator=torch.Generator().manual_seed(seed),
        fabric=Fabric(accelerator="cpu", devices=1),
        make_recogniser=make_recogniser,
        folder=folder,
    )


@pytest.fixture(scope="session")
def make_training() -> Callable[..., DefenseTraining]:
    return training


@pytest.fixture(scope="session")
def ready() -> Callable[[Defense], Defense]:
    """Does what the harness does with a defence before it is used: attaches a recogniser, fits, freezes."""

    def make_ready(defense: Defense) -> Defense:
        if isinstance(defense, TemplateDefense):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(108, EMBEDDING, bias=False))
            defense.attach(network.requires_grad_(False), EMBEDDING)
        if defense.trainable:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                defense.fit(training(size=defense.image_size))
        return defense.requires_grad_(False).eval()

    return make_ready


@pytest.fixture(scope="session")
def descended() -> Callable[..., Tensor]:
    """Unit rows of least misfit that are found by gradients from ``start`` (N, D)."""

    def descend(misfit: Misfit, start: Tensor, steps: int = 150) -> Tensor:
        found = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([found], lr=0.03)
        for _ in range(steps):
            optimiser.zero_grad()
            misfit(functional.normalize(found, dim=1)[:, None]).sum().backward()
            assert found.grad is not None
            assert torch.isfinite(found.grad).all()
            optimiser.step()
        return functional.normalize(found.detach(), dim=1)

    return descend


@pytest.fixture(scope="session")
def units() -> Callable[..., Tensor]:
    """Random unit rows (count, size)."""

    def draw(count: int, size: int = EMBEDDING, seed: int = 0) -> Tensor:
        return functional.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)

    return draw
