"""Small defences and adversaries that the tests of attacks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional

from attacks.base import Adversary, Knowledge, ProtectionQuery, Traffic
from defenses.base import Defense

SIZE = 16


class Plain(Defense):
    """Sends the face itself."""

    name = "plain"
    summary = "for tests"

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return faces


class Pick(Defense):
    """Sends 2 of 6 maps (each colour twice, all at different scales): those in a row of a secret table."""

    name = "pick"
    summary = "for tests"
    ratio = 4.0

    def __init__(self, *, image_size: int = SIZE, table: Tensor | None = None) -> None:
        super().__init__(image_size=image_size)
        self.table = torch.tensor([[0, 4], [5, 1], [2, 3]]) if table is None else table

    @property
    def representation_shape(self) -> tuple[int, int, int]:
        return (2, self.image_size, self.image_size)

    @property
    def secret(self) -> Mapping[str, Tensor]:
        return {"table": self.table}

    def guess(self, generator: torch.Generator) -> Self:
        return type(self)(image_size=self.image_size, table=torch.randperm(6, generator=generator).view(3, 2))

    def with_layouts(self, layouts: Tensor) -> Self:
        return type(self)(image_size=self.image_size, table=layouts)

    def states(self) -> Tensor:
        return torch.arange(len(self.table))[:, None]

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor:
        return torch.randint(len(self.table), (count, 1), generator=generator)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        assert state is not None
        scales = self.ratio ** torch.arange(6, device=faces.device).view(-1, 1, 1)
        maps = torch.cat((faces, faces), dim=1) * scales
        return maps.gather(1, self.table[state[:, 0]][:, :, None, None].expand(-1, -1, *faces.shape[2:]))

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        if state is None:
            return representation
        places = self.table[state[:, 0]][:, :, None, None].expand_as(representation)
        return representation.new_zeros(len(state), 6, *representation.shape[2:]).scatter(1, places, representation)


def smooth_faces(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """uint8 (count, 3, size, size): random smooth pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


@pytest.fixture(scope="session")
def pick() -> type[Pick]:
    """The class of a defence with three states and a secret."""
    return Pick


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    """The class of a defence that does nothing."""
    return Plain


@pytest.fixture(scope="session")
def make_faces() -> Callable[..., Tensor]:
    """Makes random smooth pictures: ``make_faces(count, size=16, seed=0)``."""
    return smooth_faces


AdversaryFactory = Callable[..., Adversary]


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture(scope="session")
def make_adversary(fabric: Fabric) -> AdversaryFactory:
    """Builds an adversary of ``defense``; a black box gets guesses of it."""

    def make(
        defense: Defense,
        knowledge: str = "whitebox",
        *,
        faces: Tensor | None = None,
        seed: int = 0,
        checkpoint: Path | None = None,
        report: Callable[..., None] = lambda done, total, **fields: None,
        traffic: Traffic | None = None,
        client: ProtectionQuery | None = None,
    ) -> Adversary:
        faces = smooth_faces(60, defense.image_size) if faces is None else faces
        rung = Knowledge(knowledge)
        return Adversary(
            faces=faces,
            identities=torch.arange(len(faces)) // 3,
            knowledge=rung,
            mechanism=defense.guess if rung is Knowledge.BLACKBOX else lambda generator: defense,
            generator=torch.Generator().manual_seed(seed),
            fabric=fabric,
            traffic=traffic,
            client=client,
            checkpoint=checkpoint,
            report=report,
        )

    return make
