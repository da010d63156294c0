"""One U-Net per state of the defence, of whose answers the most consistent one is kept: the 'enhanced' attacker."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, Capability
from attacks.parts.encoder import channel_statistics
from attacks.parts.exposure import Exposure
from attacks.parts.inputs import RAW
from attacks.parts.inversion import TWO_CORES, ViewingAttack, ViewingOptions, no_pictures
from attacks.parts.training import Trainer
from attacks.parts.unet_network import UNetNetwork
from bench.randomness import derived
from defenses.base import Defense, Protected
from defenses.layout import row_numbers

_STATISTICS_FACES = 64


class UNetEnsembleOptions(ViewingOptions):
    """Options of :class:`UNetEnsemble`; ``images`` are shared out among the members."""

    most: int = Field(
        default=64, ge=1, le=4096, description="States beyond which the attack refuses: each one costs a network."
    )


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


class UNetEnsemble(ViewingAttack):
    """One :class:`~attacks.parts.unet_network.UNetNetwork` per state, each trained on faces protected under it alone.

    ``oracle`` asks the member of the true state. ``whitebox`` asks every member, protects each answer again under that
    member's state and keeps the answer that comes nearest to what was intercepted: the original is not needed to tell
    the best one. Of k > 1 interceptions the kept answers are averaged.
    """

    name = "unet-ensemble"
    summary = "one U-Net per state; keeps the answer that protects to what was intercepted"
    cost = "fit: minutes (trains a network per state); recover: tens of faces/s"
    reference = "PartialFace (enhanced attacker), ICCV 2023"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.SECRET})
    opens = frozenset({"affine", "mixture"})
    Options = UNetEnsembleOptions
    presets: ClassVar = {
        "quick": {**TWO_CORES, "widths": (8, 16, 32), "images": 2_000},
        "cpu": {**TWO_CORES, "widths": (16, 32, 64), "images": 60_000},
        "gpu": {"loss": "l1+ssim", "images": 2_000_000, "early_stop": True},
        "paper": {"images": 6_000_000, "early_stop": True, "bypass": 0, "input": RAW},
    }
    options: UNetEnsembleOptions

    network: _Members

    def inapplicable(self, defense: Defense) -> str | None:
        """It needs pictures, and a network per state: too many where there are more than ``most``."""
        states = defense.states()
        if states is not None and len(states) > self.options.most:
            return f"{defense.name} has {len(states)} states, more than most={self.options.most} networks"
        return no_pictures(defense)

    def build(self, adversary: Adversary) -> None:
        """Build a network per state."""
        if reason := self.inapplicable(self.mechanism):
            raise ValueError(reason)
        self._build_network(self.mechanism.channels)
        self._build_range()

    def _build_network(self, channels: int) -> None:
        states = self.mechanism.states()
        count = 1 if states is None else len(states)
        network = _Members(count, channels, self.adversary.faces.shape[-1], self.options)
        self.network = network.to(memory_format=torch.channels_last)

    @property
    def _members(self) -> list[UNetNetwork]:
        return [member for member in self.network.members if isinstance(member, UNetNetwork)]

    def _state(self, row: int, count: int) -> Tensor | None:
        """The state of that number for ``count`` faces, int64 (count, D)."""
        states = self.mechanism.states()
        return None if states is None else states[row].expand(count, -1)

    def _pinned(self, count: int) -> Tensor | None:
        """No member sees more than one state; what one of them is shown suits the others."""
        return self._state(0, count)

    def _protect(self, target: Tensor, exposure: Exposure, step: int) -> Protected:
        """The members take turns, each with a whole batch of its own state."""
        state = self._state(step % len(self._members), len(target))
        return exposure.protect(target, "protect", step, state=state)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        listed = self.mechanism.states()
        if states is None or listed is None:
            return representations, torch.zeros(len(representations), dtype=torch.int64, device=self.device)
        return representations, row_numbers(states.cpu(), listed.cpu()).to(self.device)

    def _measure(self, trainer: Trainer, exposure: Exposure) -> None:
        target = trainer.floats(trainer.sample(_STATISTICS_FACES, "statistics"))
        mean_face = target.mean(dim=0)
        if self.options.flip:
            mean_face = (mean_face + mean_face.flip(-1)) / 2
        for row, member in enumerate(self._members):
            sent = exposure.protect(target, "statistics", row, state=self._state(row, len(target))).representation
            sent = self._view(sent)
            self._widen_range(sent)
            mean, std = channel_statistics([(sent, None)], len(member.mean))
            member.mean.copy_(mean)
            member.std.copy_(std)
            member.mean_face.copy_(mean_face)

    def _recover(self, representations: Tensor, states: Tensor | None) -> Tensor:
        """Faces (M, 3, H, W): by the member of the true state or, of all members', the most consistent ones."""
        if states is not None:
            return super()._recover(representations, states)
        # Channels differ in energy by orders of magnitude: each counts by its own.
        energy = representations.square().mean(dim=(2, 3)).clamp(min=1e-12)
        least = torch.full((len(representations),), torch.inf, device=representations.device)
        faces, shown = torch.empty(0), self._view(representations)
        for row, member in enumerate(self._members):
            answer: Tensor = member(shown)
            state = self._state(row, len(representations))
            again = self.mechanism.protect(answer.clamp(0, 1), derived(0, "again"), state=state).representation
            difference = ((again - representations).square().mean(dim=(2, 3)) / energy).mean(dim=1)
            faces = torch.where((difference < least)[:, None, None, None], answer, faces) if row else answer
            least = torch.minimum(least, difference)
        return faces
