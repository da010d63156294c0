"""The contract of an attack: what it is handed, what it needs, what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from defenses.base import Defense

#: Called as ``report(done, total, **fields)``; the harness turns it into a progress bar and a log.
Report = Callable[..., None]


def no_report(done: int, total: int, **fields: float) -> None:
    """A :data:`Report` for callers that want none."""


class Knowledge(StrEnum):
    """The rung of the ladder that an adversary stands on.

    * ``blackbox``: the mechanism is known, the secret (PartialFace: the table of ranks) is guessed.
    * ``whitebox``: the secret is known too, what was drawn for each face is not.
    * ``oracle``: the state of each intercepted face is known as well.
    """

    BLACKBOX = "blackbox"
    WHITEBOX = "whitebox"
    ORACLE = "oracle"


class Capability(StrEnum):
    """What an attack may ask for."""

    PUBLIC_FACES = "public faces"
    MECHANISM = "mechanism"
    SECRET = "secret"
    STATE = "known state"
    RECOGNISER = "recogniser weights"


#: What each rung grants. The recogniser is distributed to clients, so weights come with the secret.
GRANTS: dict[Knowledge, frozenset[Capability]] = {
    Knowledge.BLACKBOX: frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM}),
    Knowledge.WHITEBOX: frozenset(Capability) - {Capability.STATE},
    Knowledge.ORACLE: frozenset(Capability),
}


class AttackOptions(BaseModel):
    """Options of an attack: frozen, keyword-only, validated; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Observation:
    """Intercepted representations of victims: the only way an attack reaches them.

    Attributes:
        representations: float32 (N, k, C, h, w): k interceptions of each of N faces, fresh states each.
        states: int64 (N, k, D) at ``oracle`` where the defence draws states, else None.
    """

    representations: Tensor
    states: Tensor | None = None

    def __post_init__(self) -> None:
        if self.representations.ndim != 5:
            raise ValueError(f"representations must be (N, k, C, h, w), got {tuple(self.representations.shape)}")
        if self.states is not None and self.states.shape[:2] != self.representations.shape[:2]:
            raise ValueError("states must be (N, k, D) with the N and k of the representations")

    def __len__(self) -> int:
        return len(self.representations)


@dataclass(frozen=True)
class Adversary:
    """What an attack is handed: public faces, knowledge, and nothing else.

    Attributes:
        faces: uint8 (M, 3, H, W), public faces whose identities are disjoint from provider and victims.
        identities: int64 (M,), their labels.
        knowledge: the rung.
        mechanism: gives a defence to train against. At ``whitebox`` and ``oracle`` it is the one in
            use, every time; at ``blackbox`` each call returns the mechanism with a freshly guessed secret.
        generator: the attack's own randomness.
        fabric: device and precision.
        recogniser: the provider's embedding network (representation -> embedding) where granted.
        checkpoint: a folder for resuming a killed fit, or None.
        report: progress.
    """

    faces: Tensor
    identities: Tensor
    knowledge: Knowledge
    mechanism: Callable[[torch.Generator], Defense]
    generator: torch.Generator
    fabric: Fabric
    recogniser: nn.Module | None = None
    checkpoint: Path | None = None
    report: Report = no_report


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit says of itself, for the honesty checks and the result.

    Attributes:
        saturated: whether more training would hardly have helped; None where nothing is trained.
        states_seen: the states trained on, int64 (K, D), or None where there are none to cover.
        curve: validation loss along the training, as (images seen, loss).
        details: anything else worth keeping (steps, parameters, final losses).
    """

    saturated: bool | None = None
    states_seen: Tensor | None = None
    curve: tuple[tuple[int, float], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Attack(nn.Module, ABC):
    """A recovery attack: intercepted representations in, faces out.

    Attributes:
        name: as typed on the command line; the file is called the same (dashes as underscores).
        summary: one line for ``bench list``.
        reference: paper, venue and year.
        needs: the capabilities without which it cannot work, checked before any compute.
        Options: the option model.
        presets: options that a preset of the harness (``quick``, ``cpu``, ``gpu``, ``paper``) sets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    needs: ClassVar[frozenset[Capability]] = frozenset()
    Options: ClassVar[type[AttackOptions]] = AttackOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__()
        if options is None:
            options = self.Options()
        if not isinstance(options, self.Options):
            raise TypeError(f"{self.name} takes {self.Options.__name__}, got {type(options).__name__}")
        self.options = options

    @abstractmethod
    def fit(self, adversary: Adversary) -> FitReport:
        """Learn from public faces. Weights live in parameters and buffers, so that a fit can be stored."""

    @abstractmethod
    def prepare(self, adversary: Adversary) -> None:
        """Build the modules for this adversary without training, so that stored weights can be loaded."""

    @abstractmethod
    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W) for the observed representations; values outside [0, 1] are clipped."""

    def recover(self, observation: Observation) -> Tensor:
        """Recovered faces, float32 (N, 3, H, W) in [0, 1].

        Raises:
            ValueError: the attack returned another shape or values that are not finite.
        """
        with torch.no_grad() if not self.needs_gradients else torch.enable_grad():
            faces = self.run(observation).detach().to(torch.float32)
        if faces.ndim != 4 or faces.shape[0] != len(observation) or faces.shape[1] != 3:
            raise ValueError(
                f"{self.name} returned {tuple(faces.shape)} for {len(observation)} faces, expected (N, 3, H, W)"
            )
        if not torch.isfinite(faces).all():
            raise ValueError(f"{self.name} recovered values that are not finite")
        return faces.clamp(0, 1)

    #: Set by attacks that optimise per victim.
    needs_gradients: ClassVar[bool] = False
