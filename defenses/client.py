"""Networks that run at the client: their features, the noise on these, and their training with a recogniser behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bench.errors import DefenseError
from bench.memory import Parts
from defenses.base import Defense, DefenseTraining
from defenses.draws import gaussian


class ClientDefense(Defense):
    """Sends features of a network ``client``, which a subclass builds, trained jointly with a recogniser.

    The network is public, as it lies on every client.
    """

    level = "feature"
    trainable = True
    client: nn.Module

    def features(self, faces: Tensor) -> Tensor:
        """Of the frozen network, in its own precision; in the type of the faces."""
        with torch.autocast(faces.device.type, enabled=False):
            features: Tensor = self.client(faces.to(next(self.client.parameters()).dtype))
        return features.to(faces.dtype)


def with_noise(features: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Features under independent Gaussian noise of this standard deviation, drawn in float32; none where it is 0."""
    if not deviation:
        return features
    return features + deviation * gaussian(features.shape, generator, features.device).to(features)


def train_jointly(
    training: DefenseTraining,
    networks: Mapping[str, nn.Module],
    optimise: Callable[[list[nn.Parameter]], Sequence[Optimizer]],
    loss: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    *,
    epochs: int,
    batch_size: int,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    limit: int | None = None,
) -> None:
    """Train ``networks``, by name, to minimise ``loss(faces, labels, generator)`` over the provider's faces.

    ``optimise`` makes the optimisers of their parameters, and ``schedule`` what changes the learning rate of each with
    every step. At most ``limit`` steps are made. A training that was killed goes on from its last epoch.

    Raises:
        DefenseError: the training diverged.
    """
    optimisers = optimise([weight for network in networks.values() for weight in network.parameters()])
    schedulers = [] if schedule is None else [schedule(optimiser) for optimiser in optimisers]
    kept: dict[str, Any] = {**networks}
    for kind, parts in (("optimiser", optimisers), ("schedule", schedulers)):
        kept |= {f"{kind}{number}": part for number, part in enumerate(parts)}
    steps = training.steps(epochs, batch_size, kept)
    updates = [cast("Optimizer", training.fabric.setup_optimizers(optimiser)) for optimiser in optimisers]
    cut = Parts(networks.values(), "the training of the defence")

    def passes(faces: Tensor, labels: Tensor, generator: torch.Generator, drawn: Tensor) -> None:
        generator.set_state(drawn)
        for optimiser in optimisers:
            optimiser.zero_grad()
        with training.fabric.autocast():
            value = loss(faces, labels, generator)
        if not math.isfinite(float(value.detach())):
            raise DefenseError("the loss of a defence in training is no longer finite: try a lower learning_rate (-o)")
        training.fabric.backward(value)

    for faces, labels, generator in islice(steps, limit):
        with cut:
            cut.step(partial(passes, faces, labels, generator, generator.get_state()))
        for update in updates:
            update.step()
        for scheduler in schedulers:
            scheduler.step()


def sgd(learning_rate: float) -> Callable[[list[nn.Parameter]], list[Optimizer]]:
    """The optimiser of the ArcFace recipe, at this learning rate: SGD, momentum 0.9, weight decay 5e-4."""
    return lambda weights: [torch.optim.SGD(weights, lr=learning_rate, momentum=0.9, weight_decay=5e-4)]


def step_decay(
    training: DefenseTraining, batch_size: int, epochs: int, milestones: tuple[float, ...], factor: float
) -> Callable[[Optimizer], LRScheduler]:
    """A schedule that multiplies the learning rate by ``factor`` at each of ``milestones``, shares of all steps."""
    steps = epochs * -(-training.images // batch_size)
    at = [round(share * steps) for share in milestones]
    return lambda optimiser: torch.optim.lr_scheduler.MultiStepLR(optimiser, at, gamma=factor)
