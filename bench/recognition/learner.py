"""One step of training: how recogniser and head are spread over the processes and updated together."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import BenchError, DataError
from bench.files import replacing
from bench.nets.heads import MarginHead
from bench.nets.recogniser import Recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.partial_fc import PartialFC

#: Rows of a file: 2^16 centres of 512 values and their momentum are a quarter of a gigabyte.
BLOCK_ROWS = 2**16

_NAME = re.compile(r"rows-(\d+)-(\d+)\.safetensors")


def save_centres(head: PartialFC, folder: Path) -> None:
    """Write this process's centres and momentum; all processes write into the same folder.

    Raises:
        BenchError: a file cannot be written.
    """
    owned = head.owned
    try:
        for first in range(owned.start, owned.stop, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, owned.stop)
            rows = slice(first - owned.start, stop - owned.start)
            block = {
                "weight": head.weight[rows].cpu().contiguous(),
                "momentum": head.momentum[rows].cpu().contiguous(),
            }
            with replacing(folder / f"rows-{first:010d}-{stop:010d}.safetensors") as temporary:
                save_file(block, temporary)
    except (OSError, SafetensorError) as error:
        raise BenchError(
            f"cannot write centres to {folder}: {error}; free some space or choose another --out"
        ) from error


@torch.no_grad()
def load_centres(head: PartialFC, folder: Path) -> None:
    """Read this process's centres and momentum, however many processes wrote them.

    Raises:
        DataError: a file is damaged, or some rows are in none.
    """
    owned, filled = head.owned, 0
    for file in sorted(folder.glob("rows-*.safetensors")):
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        first, stop = max(int(match[1]), owned.start), min(int(match[2]), owned.stop)
        if first >= stop:
            continue
        try:
            with safe_open(file, framework="pt") as content:
                for name, target in (("weight", head.weight), ("momentum", head.momentum)):
                    rows = content.get_slice(name)[first - int(match[1]) : stop - int(match[1])]
                    target[first - owned.start : stop - owned.start] = rows.to(target.device)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise DataError(f"cannot read centres {file}: {error}; delete {folder.parent} to start again") from error
        filled += stop - first
    if filled != len(owned):
        raise DataError(
            f"{folder} holds {filled} of the {len(owned)} centres {owned.start} to {owned.stop - 1}: it is incomplete "
            f"or not on a disk that all processes share; delete {folder.parent} to start again"
        )


def drop_centres(folder: Path, *, but: str) -> None:
    """Delete the centres of other epochs beside the folder called ``but``."""
    for old in folder.glob("centres-*"):
        if old.name != but:
            shutil.rmtree(old, ignore_errors=True)


class Learner(Protocol):
    """A recogniser and a head in training."""

    def step(self, representation: Tensor, labels: Tensor, *, rate: float, total: int) -> tuple[Tensor, Tensor]:
        """Train on this process's part of a batch of ``total``; its mean loss, a scalar, and hits, bool (N,)."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, but for what :meth:`save_more` writes itself."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""

    def save_more(self, folder: Path, tag: str) -> None:
        """Write this process's part of what is too large for one file, under a tag; called by every process."""

    def load_more(self, folder: Path, tag: str) -> None:
        """The inverse of :meth:`save_more`."""

    def forget_more(self, folder: Path, tag: str) -> None:
        """Delete what :meth:`save_more` wrote under other tags; called by one process."""


class Classifier(nn.Module):
    """Recogniser and margin head as one module, which is what data-parallel training wraps."""

    def __init__(self, recogniser: Recogniser, head: MarginHead) -> None:
        super().__init__()
        self.recogniser = recogniser
        self.head = head

    def forward(self, representation: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and hits, bool (N,)."""
        loss, hits = self.head(self.recogniser(representation), labels)
        return loss, hits


def _sgd(module: nn.Module, options: TrainingOptions) -> torch.optim.SGD:
    return torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad],
        lr=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )


class _Dense:
    """What both kinds of learner have: a module trained by SGD, replicated on every process."""

    def __init__(self, module: nn.Module, options: TrainingOptions, fabric: Fabric) -> None:
        self.module, self.options, self.fabric = module, options, fabric
        self.optimiser = _sgd(module, options)
        self.model, self.stepper = fabric.setup(module, self.optimiser)

    def set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, entry in self.optimiser.state_dict()["state"].items():
            if entry.get("momentum_buffer") is not None:  # none without momentum
                tensors[f"momentum/{index}"] = entry["momentum_buffer"]
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(
            {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        )
        momentum = {
            int(name.removeprefix("momentum/")): {"momentum_buffer": t}
            for name, t in tensors.items()
            if name.startswith("momentum/")
        }
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": momentum})


class WholeLearner(_Dense):
    """Every process has the whole head."""

    def __init__(self, recogniser: Recogniser, head: MarginHead, options: TrainingOptions, fabric: Fabric) -> None:
        super().__init__(Classifier(recogniser.train(), head.train()), options, fabric)

    def step(self, representation: Tensor, labels: Tensor, *, rate: float, total: int) -> tuple[Tensor, Tensor]:
        self.set_rate(rate)
        loss, hits = self.model(representation, labels)
        self.stepper.zero_grad()
        processes = self.fabric.world_size
        # Gradients are averaged over the processes, whose parts of a batch may differ by one image.
        self.fabric.backward(loss if processes == 1 else loss * (len(labels) * processes / total))
        if self.options.clip_gradient_norm is not None:
            # A gradient that is not finite is reported with its loss, at the next look.
            self.fabric.clip_gradients(
                self.model, self.stepper, max_norm=self.options.clip_gradient_norm, error_if_nonfinite=False
            )
        self.stepper.step()
        return loss.detach(), hits

    def save_more(self, folder: Path, tag: str) -> None:
        """Nothing: one file holds it all."""

    def load_more(self, folder: Path, tag: str) -> None:
        """Nothing: one file holds it all."""

    def forget_more(self, folder: Path, tag: str) -> None:
        """Nothing: one file holds it all."""


class ShardedLearner(_Dense):
    """Every process has the whole recogniser and a part of the head."""

    def __init__(self, recogniser: Recogniser, head: PartialFC, options: TrainingOptions, fabric: Fabric) -> None:
        super().__init__(recogniser.train(), options, fabric)
        self.head = head.train().to(fabric.device)

    def step(self, representation: Tensor, labels: Tensor, *, rate: float, total: int) -> tuple[Tensor, Tensor]:
        self.set_rate(rate)
        options, processes = self.options, self.fabric.world_size
        embeddings = self.model(representation)
        if processes > 1:
            # The head hands back the gradient of one loss over all processes, whose sum the wrapper turns to a mean.
            embeddings.register_hook(lambda gradient: gradient * processes)
        with self.fabric.autocast():
            loss, hits = self.head(embeddings, labels)
        self.stepper.zero_grad()
        self.fabric.backward(loss)
        if options.clip_gradient_norm is not None:
            self._clip(options.clip_gradient_norm)
        self.stepper.step()
        self.head.update(learning_rate=rate, momentum=options.momentum, weight_decay=options.weight_decay)
        return loss.detach(), hits

    def save_more(self, folder: Path, tag: str) -> None:
        save_centres(self.head, folder / f"centres-{tag}")

    def load_more(self, folder: Path, tag: str) -> None:
        load_centres(self.head, folder / f"centres-{tag}")

    def forget_more(self, folder: Path, tag: str) -> None:
        drop_centres(folder, but=f"centres-{tag}")

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
