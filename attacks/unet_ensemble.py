"""One U-Net per state of the defence, of whose answers the most consistent one is kept: the 'enhanced' attacker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, AttackOptions, Capability, Knowledge, Observation
from attacks.parts.exposure import Exposure, chunks
from attacks.parts.inversion import TWO_CORES, InversionAttack, InversionOptions, pick
from attacks.parts.unet_network import UNetNetwork
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense, Protected
from defenses.layout import row_numbers

_STATISTICS_FACES = 64
_CHUNK = 64


class UNetEnsembleOptions(InversionOptions):
    """Options of :class:`UNetEnsemble`; ``images`` are shared out among the members.

    Attributes:
        most: states beyond which the attack refuses: each one costs a network.
    """

    most: int = Field(default=64, ge=1, le=4096)


class _Members(nn.Module):
    """A network per state; a batch is sent through the member of each of its rows."""

    def __init__(self, count: int, channels: int, image_size: int, options: UNetEnsembleOptions) -> None:
        super().__init__()
        self.members = nn.ModuleList(UNetNetwork(channels, image_size, options) for _ in range(count))

    def forward(self, representations: Tensor, rows: Tensor) -> Tensor:
        """(N, C, h, w) and int64 (N,) to faces (N, 3, H, W)."""
        kinds = torch.unique(rows).tolist()
        if len(kinds) == 1:
            faces: Tensor = self.members[kinds[0]](representations)
            return faces
        parts = [(rows == kind).nonzero().flatten() for kind in kinds]
        answers = [self.members[kind](representations[at]) for kind, at in zip(kinds, parts, strict=True)]
        return torch.cat(answers)[torch.cat(parts).argsort()]


class UNetEnsemble(InversionAttack):
    """One :class:`~attacks.parts.unet_network.UNetNetwork` per state, each trained on faces protected under it alone.

    ``oracle`` asks the member of the true state. ``whitebox`` asks every member, protects each answer again under that
    member's state and keeps the answer that comes nearest to what was intercepted: the original is not needed to tell
    the best one. Of k > 1 interceptions the kept answers are averaged.
    """

    name: ClassVar[str] = "unet-ensemble"
    summary: ClassVar[str] = "one U-Net per state; keeps the answer that protects to what was intercepted"
    cost: ClassVar[str] = "fit: minutes (trains a network per state); recover: tens of faces/s"
    reference: ClassVar[str] = "PartialFace (enhanced attacker), ICCV 2023"
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.SECRET}
    )
    Options: ClassVar[type[AttackOptions]] = UNetEnsembleOptions
    budgets: ClassVar[Mapping[str, str]] = {"steps": "steps"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {**TWO_CORES, "widths": (8, 16, 32), "images": 2_000},
        "cpu": {**TWO_CORES, "widths": (16, 32, 64), "images": 60_000},
        "gpu": {"loss": "l1+ssim", "images": 2_000_000, "early_stop": True},
        "paper": {"images": 6_000_000, "early_stop": True, "bypass": 0},
    }
    options: UNetEnsembleOptions

    def inapplicable(self, defense: Defense) -> str | None:
        """A network per state is too many where there are more than ``most``."""
        states = defense.states()
        if states is not None and len(states) > self.options.most:
            return f"{defense.name} has {len(states)} states, more than most={self.options.most} networks"
        return None

    def build(self, adversary: Adversary) -> None:
        """Build a network per state.

        Raises:
            ValueError: the defence has more states than ``most``.
        """
        mechanism = self.mechanism
        if reason := self.inapplicable(mechanism):
            raise ValueError(reason)
        states = mechanism.states()
        count = 1 if states is None else len(states)
        network = _Members(count, mechanism.channels, adversary.faces.shape[-1], self.options)
        self.network = network.to(memory_format=torch.channels_last)
        self._build_range(mechanism.channels)

    @property
    def _members(self) -> list[UNetNetwork]:
        network = self.network
        assert isinstance(network, _Members)
        return [member for member in network.members if isinstance(member, UNetNetwork)]

    def _state(self, row: int, count: int) -> Tensor | None:
        """The state of that number for ``count`` faces, int64 (count, D)."""
        states = self.mechanism.states()
        return None if states is None else states[row].expand(count, -1)

    def _rows(self, states: Tensor | None, count: int) -> Tensor:
        listed = self.mechanism.states()
        if states is None or listed is None:
            return torch.zeros(count, dtype=torch.int64, device=self.low.device)
        return row_numbers(states.cpu(), listed.cpu()).to(self.low.device)

    # -- training -----------------------------------------------------------------------------------

    def _exposure(self, adversary: Adversary, seed: int) -> Exposure:
        return Exposure(adversary, seed)

    def _protect(self, target: Tensor, exposure: Exposure, step: int) -> Protected:
        """The members take turns, each with a whole batch of its own state."""
        state = self._state(step % len(self._members), len(target))
        return exposure.protect(target, "protect", step, state=state)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        return representations, self._rows(states, len(representations))

    def _measure(self, faces: Tensor, training: Tensor, exposure: Exposure, seed: int) -> None:
        sample = pick(faces, training, _STATISTICS_FACES, derived(seed, "statistics"))
        target = to_float(sample.to(self.low.device))
        mean_face = target.mean(dim=0)
        if self.options.flip:
            mean_face = (mean_face + mean_face.flip(-1)) / 2
        for row, member in enumerate(self._members):
            sent = exposure.protect(target, "statistics", row, state=self._state(row, len(target))).representation
            self._widen_range(sent)
            std = sent.std(dim=(0, 2, 3))
            member.mean.copy_(sent.mean(dim=(0, 2, 3)))
            member.std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
            member.mean_face.copy_(mean_face)

    # -- recovering -----------------------------------------------------------------------------------

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped.

        Raises:
            ValueError: representations outside the range of training, or no states at ``oracle``.
        """
        mechanism, representations = self.mechanism, observation.representations
        knows = self.adversary.knowledge is Knowledge.ORACLE
        if knows and mechanism.states() is not None and observation.states is None:
            raise ValueError(f"{self.name} at oracle needs the states of the intercepted faces")
        self._check_range(representations)
        n, k = representations.shape[:2]
        flat = representations.flatten(0, 1)
        states = None if observation.states is None else observation.states.flatten(0, 1)
        faces = []
        for index, chunk in enumerate(chunks(flat, _CHUNK)):
            sent = chunk.to(self.low.device)
            if states is not None:
                own = states[index * _CHUNK : index * _CHUNK + len(chunk)]
                faces.append(self.network(sent, self._rows(own, len(sent))))
            else:
                faces.append(self._most_consistent(sent, mechanism))
        recovered = torch.cat(faces)
        return recovered.view(n, k, *recovered.shape[1:]).mean(dim=1)

    def _most_consistent(self, sent: Tensor, mechanism: Defense) -> Tensor:
        """Of all members' answers to (M, C, h, w) the one that is protected to most nearly the same: (M, 3, H, W)."""
        best = torch.full((len(sent),), torch.inf, device=sent.device)
        kept: Tensor | None = None
        for row, member in enumerate(self._members):
            answer: Tensor = member(sent)
            again = mechanism.protect(
                answer.clamp(0, 1), derived(0, "again"), state=self._state(row, len(sent))
            ).representation
            # Channels differ in energy by orders of magnitude: each counts by its own.
            energy = sent.square().mean(dim=(2, 3)).clamp(min=1e-12)
            off = ((again - sent).square().mean(dim=(2, 3)) / energy).mean(dim=1)
            better = off < best
            kept = answer if kept is None else torch.where(better[:, None, None, None], answer, kept)
            best = torch.where(better, off, best)
        assert kept is not None  # there is at least one member
        return kept
