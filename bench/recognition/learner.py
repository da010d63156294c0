"""One step of training: how recogniser and head are spread over the processes and updated together."""

from __future__ import annotations

import functools
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.graphs import Replayed
from bench.memory import Parts
from bench.muon import Muon
from bench.nets.heads import MarginHead
from bench.nets.recogniser import Recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.partial_fc import PartialFC, load_centres, save_centres

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")


class Learner(ABC):
    """A recogniser and a head in training: a module and its optimiser, the same on every process, and perhaps more.

    Args:
        module: what is the same on every process.
        options: of the optimiser.
        fabric: precision and processes.

    Attributes:
        parts: what cuts the passes of the recogniser; None for passes of whole batches.
    """

    def __init__(self, module: nn.Module, options: TrainingOptions, fabric: Fabric) -> None:
        self.module, self.options, self.fabric = module, options, fabric
        # Fused: one kernel for all parameters. Not on a CPU, where it rounds differently, and not with scaled
        # gradients, which it unscales by itself, too late for clipping.
        fused = fabric.device.type == "cuda" and options.precision != "16-mixed"
        rates: Any = {"momentum": options.momentum, "weight_decay": options.weight_decay}
        sgd: Callable[..., torch.optim.Optimizer] = functools.partial(torch.optim.SGD, fused=fused or None, **rates)
        self.optimiser: torch.optim.Optimizer
        if options.optimiser == "muon":
            self.optimiser = Muon(module, sgd, lr=options.learning_rate)
        else:
            self.optimiser = sgd([p for p in module.parameters() if p.requires_grad], lr=options.learning_rate)
        self.model, self.stepper = fabric.setup(module, self.optimiser)
        self.parts: Parts | None = None

    def attempt(self, forward_and_backward: Callable[[], T]) -> T:
        """A step's passes, in parts of the batch where memory is full and :attr:`parts` knows how to cut them."""
        return forward_and_backward() if self.parts is None else self.parts.step(forward_and_backward)

    @abstractmethod
    def step(
        self, representation: Tensor, labels: Tensor, targets: Tensor | None = None, *, rate: float, total: int
    ) -> tuple[Tensor, Tensor]:
        """Train on this process's part of a batch of ``total``; its mean loss, a scalar, and hits, bool (N,).

        ``targets`` are a teacher's embeddings of these faces, float (N, D), where there is one.
        """

    def set_rate(self, rate: float) -> None:
        """Change the learning rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, but for what :meth:`save_shard` writes itself."""
        tensors = {f"model/{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            if entry.get("momentum_buffer") is not None:  # none without momentum
                tensors[f"momentum/{index}"] = entry["momentum_buffer"]
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.module.load_state_dict(below("model/"))
        parameters, momentum = [p for group in self.optimiser.param_groups for p in group["params"]], {}
        for index, tensor in below("momentum/").items():
            # In the order of the parameter in memory (channels last), which a fused optimiser insists on.
            like = torch.empty_like(parameters[int(index)], requires_grad=False)
            momentum[int(index)] = {"momentum_buffer": like.copy_(tensor)}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": momentum})

    # What is spread over the processes, if anything is; every process calls the first two, one the third.

    def save_shard(self, folder: Path, tag: str) -> None:  # noqa: B027 - most learners have none
        """Write this process's part of what is too large for one file, under a tag."""

    def load_shard(self, folder: Path, tag: str) -> None:  # noqa: B027
        """The inverse of :meth:`save_shard`."""

    def drop_shards(self, folder: Path, *, but: str) -> None:  # noqa: B027
        """Delete what :meth:`save_shard` wrote under other tags."""


def disagreement(embeddings: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine of embeddings and a teacher's, both (N, D) of any scale: (N,) in [0, 2]."""
    return 1 - F.cosine_similarity(embeddings, targets.to(embeddings.dtype), dim=1)


class Classifier(nn.Module):
    """Recogniser and margin head as one module, which is what data-parallel training wraps."""

    def __init__(self, recogniser: Recogniser, head: MarginHead, options: TrainingOptions) -> None:
        super().__init__()
        self.recogniser = recogniser
        self.head = head
        self.options = options

    def forward(self, representation: Tensor, labels: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and hits, bool (N,)."""
        embeddings = self.recogniser(representation)
        loss, hits = self.head(embeddings, labels)
        loss = self.options.classification * loss
        if targets is not None:
            loss = loss + self.options.distillation * disagreement(embeddings, targets).mean()
        return loss, hits


class WholeLearner(Learner):
    """Every process has the whole head.

    Attributes:
        replayed: forward and backward passes, replayed on a CUDA device; of several processes, which exchange gradients
            amid a pass, never.
    """

    def __init__(self, recogniser: Recogniser, head: MarginHead, options: TrainingOptions, fabric: Fabric) -> None:
        super().__init__(Classifier(recogniser.train(), head.train(), options), options, fabric)
        self.head = head
        self.replayed = Replayed(
            self.passes,
            self.module.parameters(),
            fabric.device if fabric.world_size == 1 else torch.device("cpu"),
            whole=lambda: self.parts is None or not self.parts.cuts,
            compiled=recogniser if options.compile else None,
        )

    def passes(
        self, representation: Tensor, labels: Tensor, targets: Tensor | None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward: loss and hits, as of :meth:`step`, and gradients of ``weight`` times the loss."""
        loss, hits = self.model(representation, labels, targets)
        self.stepper.zero_grad()
        self.fabric.backward(loss if weight == 1 else loss * weight)
        return loss.detach(), hits

    def step(
        self, representation: Tensor, labels: Tensor, targets: Tensor | None = None, *, rate: float, total: int
    ) -> tuple[Tensor, Tensor]:
        self.set_rate(rate)
        inputs: tuple[Any, ...] = (representation, labels, targets)
        if (processes := self.fabric.world_size) > 1:
            # Gradients are averaged over the processes, whose parts of a batch may differ by one image.
            inputs += (len(labels) * processes / total,)
        loss, hits = self.attempt(lambda: self.replayed(*inputs, constants=self.head.constants))
        if self.options.clip_gradient_norm is not None:
            # A gradient that is not finite is reported with its loss, at the next look.
            self.fabric.clip_gradients(
                self.model, self.stepper, max_norm=self.options.clip_gradient_norm, error_if_nonfinite=False
            )
        self.stepper.step()
        return loss, hits


class ShardedLearner(Learner):
    """Every process has the whole recogniser and a part of the head."""

    def __init__(self, recogniser: Recogniser, head: PartialFC, options: TrainingOptions, fabric: Fabric) -> None:
        super().__init__(recogniser.train(), options, fabric)
        self.head = head.train().to(fabric.device)

    def step(
        self, representation: Tensor, labels: Tensor, targets: Tensor | None = None, *, rate: float, total: int
    ) -> tuple[Tensor, Tensor]:
        self.set_rate(rate)
        options, processes = self.options, self.fabric.world_size

        def passes() -> tuple[Tensor, Tensor]:
            embeddings = self.model(representation)
            if processes > 1:
                # The head hands back the gradient of one loss over all processes, whose sum the wrapper turns to a
                # mean.
                embeddings.register_hook(lambda gradient: gradient * processes)
            with self.fabric.autocast():
                loss, hits = self.head(embeddings, labels)
            loss = options.classification * loss
            reported = loss.detach()
            if targets is not None:
                apart = options.distillation * disagreement(embeddings, targets)
                # The head's loss is of the whole batch, and so is its gradient: this process's share of the other
                # one's.
                loss = loss + apart.sum() / total
                reported = reported + apart.detach().mean()
            self.stepper.zero_grad()
            self.fabric.backward(loss)
            return reported, hits

        reported, hits = self.attempt(passes)
        if options.clip_gradient_norm is not None:
            self._clip(options.clip_gradient_norm)
        self.stepper.step()
        self.head.update(learning_rate=rate, momentum=options.momentum, weight_decay=options.weight_decay)
        return reported, hits

    def save_shard(self, folder: Path, tag: str) -> None:
        save_centres(self.head, folder / f"centres-{tag}")

    def load_shard(self, folder: Path, tag: str) -> None:
        load_centres(self.head, folder / f"centres-{tag}")

    def drop_shards(self, folder: Path, *, but: str) -> None:
        for other in folder.glob("centres-*"):
            if other.name != f"centres-{but}":
                shutil.rmtree(other, ignore_errors=True)

    def _clip(self, largest: float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_`` over the recogniser and the centres of all processes."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        assert self.head.gradient is not None
        centres = self.head.processes.sum(self.head.gradient.square().sum())
        norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).square().sum().add(centres).sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for gradient in (*gradients, self.head.gradient):
            gradient.mul_(factor)


def make_learner(
    recogniser: Recogniser, head: MarginHead | PartialFC, options: TrainingOptions, fabric: Fabric
) -> Learner:
    """The learner for this kind of head."""
    if isinstance(head, PartialFC):
        return ShardedLearner(recogniser, head, options, fabric)
    return WholeLearner(recogniser, head, options, fabric)
