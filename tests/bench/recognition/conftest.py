"""Tiny faces, a tiny random defence and a Fabric for the recognition tests."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from bench.data.faces import FaceSet
from defenses.base import Defense, DefenseOptions

SIZE = 16


class Permuted(Defense):
    """A random defence with countable states: it rotates the colour channels, scales them and adds an offset."""

    name = "permuted"
    summary = "for tests"

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = SIZE, views: int = 1) -> None:
        super().__init__(options, image_size=image_size)
        self._views = views
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.labels: list[Tensor | None] = []

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    @property
    def views(self) -> int:
        return self._views

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        self.labels.append(labels)
        return torch.randint(0, 3, (count, 1), generator=generator)

    def states(self) -> Tensor:
        return torch.arange(3).unsqueeze(1)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        assert state is not None
        self.calls.append((faces.clone(), state.clone()))
        channels = (torch.arange(3).unsqueeze(0) + state) % 3
        rotated = faces.gather(1, channels.to(faces.device).view(-1, 3, 1, 1).expand_as(faces))
        return 700 * rotated - 350


@pytest.fixture
def make_defense() -> type[Permuted]:
    return Permuted


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


@pytest.fixture
def faces() -> FaceSet:
    """Four identities of six noisy variations each, as far apart as colours can be."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (4, 1, 3, SIZE, SIZE), generator=generator)
    noise = torch.randint(-20, 21, (4, 6, 3, SIZE, SIZE), generator=generator)
    images = (prototypes + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    return FaceSet(images, torch.arange(4).repeat_interleave(6), ("a", "b", "c", "d"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads change the order of sums; these nets are too small to gain from them anyway."""
    torch.set_num_threads(1)
