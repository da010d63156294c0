"""Recogniser training in one process or several, on faces and a defence without randomness per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn

from bench.data.faces import FaceSet
from bench.errors import BenchError
from bench.nets.options import AugmentationOptions
from bench.nets.recogniser import InputNormalisation, Recogniser, build_recogniser
from bench.randomness import Streams
from bench.recognition.options import TrainingOptions
from bench.recognition.processes import Processes
from bench.recognition.training import build_head, train
from defenses.none import Unprotected

SIZE = 16
OPTIONS = TrainingOptions(
    epochs=3,
    batch_size=7,
    learning_rate=0.05,
    warmup_epochs=0.5,
    embedding_size=16,
    scale=16.0,
    margin=0.1,
    clip_gradient_norm=5.0,
    augmentation=AugmentationOptions(flip=0.0),
)


def faces() -> FaceSet:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (5, 1, 3, SIZE, SIZE), generator=generator)
    noise = torch.randint(-20, 21, (5, 5, 3, SIZE, SIZE), generator=generator)
    images = (prototypes + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    return FaceSet(images, torch.arange(5).repeat_interleave(5), tuple("abcde"))


def taught_embeddings() -> Tensor:
    """What a teacher might say of the 25 faces."""
    return F.normalize(torch.randn(25, 16, generator=torch.Generator().manual_seed(3)))


class _TrainingProcesses(TorchElasticEnvironment):
    """The processes that are connected already."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def world_size(self) -> int:
        return self._processes.size

    def global_rank(self) -> int:
        return self._processes.rank

    def local_rank(self) -> int:
        return self._processes.rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        assert num_devices == self._processes.size


def fabric_for(processes: Processes) -> Fabric:
    if processes.size == 1:
        return Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric = Fabric(
        accelerator="cpu",
        devices=processes.size,
        strategy=DDPStrategy(cluster_environment=_TrainingProcesses(processes)),
        precision="32-true",
    )
    fabric.launch()
    return fabric


def learn(
    processes: Processes,
    changes: list[dict[str, Any]],
    checkpoint: Path | None = None,
    poisoned_epoch: int | None = None,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """Losses, accuracies and weights for each change of the options; or the error of a loss that became infinite.

    With ``taught`` among the changes there is a teacher, whose embeddings of the faces are random. With ``most`` the
    last process has memory for so many rows at once; with ``normed=False`` no network takes statistics over rows.

    Args:
        exact: in float64.
    """
    torch.set_num_threads(1)
    with in_float64() if exact else nullcontext():
        return [_learn(processes, change, checkpoint, poisoned_epoch) for change in changes]


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks and heads that are made within compute in float64.

    Trainings that differ by rounding alone, as in the order of sums, then agree to many digits on every processor,
    although training amplifies rounding.
    """
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _learn(
    processes: Processes, change: dict[str, Any], checkpoint: Path | None, poisoned_epoch: int | None
) -> dict[str, Any]:
    change = dict(change)
    taught, most, normed = change.pop("taught", False), change.pop("most", None), change.pop("normed", True)
    options = TrainingOptions.model_validate(OPTIONS.model_dump() | change)
    defense = Unprotected(image_size=SIZE)
    recogniser = build_recogniser("ir-tiny", defense.representation_shape, 16, seed=1)
    calls = 0

    def poison(module: torch.nn.Module, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        last = processes.rank == processes.size - 1
        rehearsed = processes.size > 1  # which is a pass of its own
        return (inputs[0] * torch.nan,) if last and calls == (poisoned_epoch or 0) * 4 + 2 + rehearsed else None

    if poisoned_epoch is not None:
        recogniser.backbone.register_forward_pre_hook(poison)
    if not normed:
        _take_no_statistics(recogniser)
    if most is not None and processes.rank == processes.size - 1:
        _cramp(recogniser, most)
    streams = Streams(0)
    head = build_head(options, 5, seed=streams.seed_for("training/head"), processes=processes)
    try:
        report = train(
            recogniser,
            faces(),
            defense,
            options,
            fabric=fabric_for(processes),
            seed=0,
            head=head,
            teacher=taught_embeddings() if taught else None,
            checkpoint=checkpoint,
        )
    except (BenchError, torch.OutOfMemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "losses": report.losses,
        "accuracies": report.accuracies,
        "report": report,
        "weights": {name: value.clone() for name, value in recogniser.state_dict().items()},
        "head": head.weight.detach().clone(),
        "kinds": sorted({type(layer).__name__ for layer in recogniser.modules()}),
    }


def _take_no_statistics(recogniser: Recogniser) -> None:
    """Replace what computes over rows, so that parts of a batch give what the whole gives."""
    for module in list(recogniser.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, layer.num_features))
            elif isinstance(layer, InputNormalisation):
                layer.batches.fill_(layer.measured)


def _cramp(recogniser: Recogniser, most: int) -> None:
    """Memory is full where a convolution is given more than ``most`` rows."""

    def look(module: nn.Module, rows: Any, *_: Any) -> None:
        if module.training and len(rows[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    *_, last = (module for module in recogniser.modules() if isinstance(module, nn.Conv2d))
    last.register_forward_pre_hook(look)
