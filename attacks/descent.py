"""How every attack that trains a network trains it: one schedule, averaged weights, one plateau rule, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from attacks import checkpoint
from attacks.base import Report
from attacks.plateau import Plateau
from attacks.schedule import WarmHoldDecay
from attacks.seeds import derived

#: Weights are averaged over about the last 1/16 of the steps so far.
_AVERAGING = 16
_SECONDS_BETWEEN_CHECKPOINTS = 60.0


class SeenStates:
    """The states that a training has met.

    Attributes:
        states: int64 (K, D), each once, on the CPU; None where none was noted.
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def add(self, states: Tensor | None) -> None:
        """Note states, int64 (n, D)."""
        if states is not None:
            known = states.cpu() if self.states is None else torch.cat((self.states, states.cpu()))
            self.states = torch.unique(known, dim=0)


class EpochBatches:
    """Which faces a step is trained on: each epoch is a permutation of its own, its remainder left out.

    Args:
        training: int64 (T,), the faces to train on.
        batch_size: B; T where there are fewer.
        seed: of the attack.
        name: of the draws, where one attack trains several networks.

    Attributes:
        size: faces per step.
    """

    def __init__(self, training: Tensor, batch_size: int, seed: int, *name: str | int) -> None:
        self.size = min(batch_size, len(training))
        self._training, self._seed, self._name = training, seed, name

    def __call__(self, step: int) -> Tensor:
        """int64 (:attr:`size`,), the faces of that step (from 0)."""
        epoch, position = divmod(step, len(self._training) // self.size)
        order = torch.randperm(len(self._training), generator=derived(self._seed, *self._name, "epoch", epoch))
        return self._training[order[position * self.size : (position + 1) * self.size]]


@dataclass(frozen=True)
class Player:
    """A module under training, its optimiser, and what it minimises: the loss of step s is ``loss(s)``."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        steps: it took.
        curve: validation loss as (images seen, loss), at the full learning rate and, last, after its decay.
        saturated: whether the last doubling at the full learning rate gained next to nothing.
        gain: what that doubling gained, where it is known.
        batch_size: images per step.
        floor: validation loss of what has learnt nothing.
    """

    steps: int
    curve: tuple[tuple[int, float], ...]
    saturated: bool
    gain: float | None
    batch_size: int
    floor: float

    def details(self) -> dict[str, Any]:
        """What a fit's report tells of its training."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "images_seen": self.steps * self.batch_size,
            "validation_loss": self.curve[-1][1],
            "floor_loss": self.floor,
            "gain_of_last_doubling": self.gain,
        }


@dataclass
class _Progress:
    """Where a training stands; with the tensors it is all that a checkpoint holds."""

    step: int = 0
    decay_start: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """One training.

    Attributes:
        what: is trained, as messages call it.
        players: take their steps in turn; the averaged weights are those of the last one's module.
        batch_size: images per step.
        learning_rate: of every player, at its peak.
        schedule: how long, and how the rate rises and falls.
        rule: when the training counts as saturated.
        validate: the loss of a module like the last player's on held-out identities.
        floor: what ``validate`` returns of one that has learnt nothing.
        least_steps: at the full learning rate, before which a flat loss is no plateau: training has hardly begun.
        early_stop: start the decay as soon as the validation loss has plateaued.
        average_buffers: average buffers too; else they are the latest (those of batch norm are averages already,
            which lag behind if averaged once more).
        fabric: device and precision.
        report: called as ``report(done, total, loss=, images_per_second=)``, counting images.
        folder: of a checkpoint, which is resumed; None for none.
        stored: modules that a checkpoint holds, by name.
        fit: JSON values that tell this training from others; a checkpoint of another one is refused.
        seen: the states met.
    """

    what: str
    players: Sequence[Player]
    batch_size: int
    learning_rate: float
    schedule: WarmHoldDecay
    rule: Plateau
    validate: Callable[[nn.Module], float]
    floor: float
    least_steps: int
    early_stop: bool = False
    average_buffers: bool = True
    fabric: Fabric
    report: Report
    folder: Path | None = None
    stored: Mapping[str, nn.Module]
    fit: Mapping[str, Any]
    seen: SeenStates

    def run(self) -> Outcome:
        """Train in place; the last player's module ends with its averaged weights, in evaluation mode.

        Raises:
            ValueError: a checkpoint of another training.
            FloatingPointError: the loss is not finite.
        """
        schedule, rule = self.schedule, self.rule
        checks, network = schedule.checks(), self.players[-1].module
        average = copy.deepcopy(network).requires_grad_(False).eval()
        progress = _Progress()
        if self.folder is not None:
            self._resume(self.folder, average, progress)
        steppers = [
            cast("torch.optim.Optimizer", self.fabric.setup_optimizers(player.optimizer)) for player in self.players
        ]
        report_every = 1 if self.fabric.device.type == "cpu" else 25
        first, saved, started = progress.step, time.monotonic(), time.monotonic()
        while progress.step < schedule.end(progress.decay_start):
            step = progress.step
            rate = self.learning_rate * schedule.factor(step, progress.decay_start)
            network.train()
            for player, stepper in zip(self.players, steppers, strict=True):
                for group in player.optimizer.param_groups:
                    group["lr"] = rate
                with self._alone(player):
                    loss = player.loss(step)
                stepper.zero_grad()
                self.fabric.backward(loss)
                stepper.step()
            progress.step = done = step + 1
            self._update(average, network, done)

            if done % report_every == 0 or done == 1:
                value = self._finite(float(loss.detach()), "loss", done)
                speed = (done - first) * self.batch_size / max(1e-9, time.monotonic() - started)
                total = schedule.end(progress.decay_start) * self.batch_size
                self.report(done * self.batch_size, total, loss=value, images_per_second=speed)
            if progress.decay_start is None and done in checks:
                progress.curve.append((done * self.batch_size, self.validate(average)))
                # The loss also rests at the floor before it starts to fall: never stop in the first quarter.
                late = done >= max(self.least_steps, schedule.hold_end // 4)
                plateaued = self.early_stop and late and rule.reached(progress.curve, self.floor)
                if done == schedule.hold_end or plateaued:
                    progress.decay_start = done
            if self.folder is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._save(self.folder, average, progress)
                saved = time.monotonic()
        if self.folder is not None and progress.step > first:
            self._save(self.folder, average, progress)

        held = tuple(progress.curve)
        final = self._finite(self.validate(average), "validation loss", progress.step)
        network.load_state_dict(average.state_dict())
        network.eval()
        begun = progress.decay_start is not None and progress.decay_start >= self.least_steps
        return Outcome(
            steps=progress.step,
            curve=(*held, (progress.step * self.batch_size, final)),
            saturated=begun and rule.reached(held, self.floor),
            gain=rule.gain(held),
            batch_size=self.batch_size,
            floor=self.floor,
        )

    def _finite(self, value: float, name: str, step: int) -> float:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.what}'s {name} became {value} at step {step}; try a lower learning rate for it "
                f"(learning_rate, now {self.learning_rate:g}) or full precision"
            )
        return value

    @contextmanager
    def _alone(self, player: Player) -> Iterator[None]:
        """Gradients for one player's weights alone."""
        others = [other.module for other in self.players if other is not player]
        for other in others:
            other.requires_grad_(False)
        try:
            yield
        finally:
            for other in others:
                other.requires_grad_(True)

    @torch.no_grad()
    def _update(self, average: nn.Module, network: nn.Module, step: int) -> None:
        """Move ``average`` towards ``network``; the window grows with training, a fixed share of it."""
        weight = min(1.0, _AVERAGING / (step + _AVERAGING - 1))
        for mean, value in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(value, weight)
        for kept, latest in zip(average.buffers(), network.buffers(), strict=True):
            if self.average_buffers and kept.is_floating_point():
                kept.lerp_(latest, weight)
            else:
                kept.copy_(latest)

    # -- resuming -----------------------------------------------------------------------------------

    def _save(self, folder: Path, average: nn.Module, progress: _Progress) -> None:
        groups = {name: module.state_dict() for name, module in self.stored.items()}
        groups["average"] = average.state_dict()
        for number, player in enumerate(self.players):
            groups[f"optimizer{number}"] = checkpoint.flatten_optimizer(player.optimizer.state_dict())
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        if self.seen.states is not None:
            tensors["seen"] = self.seen.states
        checkpoint.save(folder, tensors, {"fit": dict(self.fit), "progress": asdict(progress)})

    def _resume(self, folder: Path, average: nn.Module, progress: _Progress) -> None:
        """Load the checkpoint in ``folder``, if there is one."""
        stored = checkpoint.load(folder)
        if stored is None:
            return
        tensors, meta = stored
        if meta["fit"] != self.fit:
            raise ValueError(f"{folder} holds the checkpoint of another fit: delete it, or name another folder")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        for name, module in {**self.stored, "average": average}.items():
            module.load_state_dict(under(f"{name}/"))
        for number, player in enumerate(self.players):
            checkpoint.restore_optimizer(player.optimizer, under(f"optimizer{number}/"))
        self.seen.states = tensors.get("seen")
        progress.step, progress.decay_start = meta["progress"]["step"], meta["progress"]["decay_start"]
        progress.curve = [(int(images), float(loss)) for images, loss in meta["progress"]["curve"]]
