"""The recogniser's training loop, from faces and a defence to a network that recognises protected faces."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bench.data.faceset import FaceSet, to_float
from bench.errors import BenchError, DataError
from bench.randomness import Streams
from bench.recognition.augmentation import augment
from bench.recognition.checkpoint import load_tensors, save_tensors
from bench.recognition.heads import HEADS, MarginHead
from bench.recognition.options import TrainingOptions
from bench.recognition.recogniser import Recogniser
from defenses.base import Defense

#: Called as ``report(done, total, **fields)`` in images; the harness turns it into a progress bar and a log.
Report = Callable[..., None]

#: Steps between two looks at the loss: each look makes a GPU wait.
LOOK_EVERY = 10


def no_report(done: int, total: int, **fields: float) -> None:
    """A :data:`Report` for callers that want none."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a training says of itself.

    Attributes:
        losses: mean training loss of each epoch.
        accuracies: share of training images of each epoch nearest to their own identity's centre, in [0, 1].
        images_per_second: images trained on, each view counted, over the time spent training them.
        seconds: time spent training, summed over resumed parts.
        parameters: learned values of the recogniser.
        views: copies of each image per epoch.
        identities: classes of the head.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    images_per_second: float
    seconds: float
    parameters: int
    views: int
    identities: int

    @property
    def accuracy(self) -> float:
        """Training accuracy of the last epoch, in [0, 1]."""
        return self.accuracies[-1]


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


def build_head(options: TrainingOptions, identities: int, *, seed: int = 0) -> MarginHead:
    """The margin head that ``options`` name; torch's global generator is left as it was.

    Raises:
        UsageError: an unknown head, or a scale or margin out of its range.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS.get(options.head)(
            options.embedding_size,
            identities,
            scale=options.scale,
            margin=options.margin,
            label_smoothing=options.label_smoothing,
        )


def learning_rate(options: TrainingOptions, epochs_done: float) -> float:
    """The learning rate after a (fractional) number of epochs: linear warm-up, then the schedule."""
    peak = options.learning_rate
    if epochs_done < options.warmup_epochs:
        return peak * epochs_done / options.warmup_epochs
    if options.schedule == "step":
        return peak * 0.1 ** sum(epochs_done >= milestone for milestone in options.milestones)
    decaying = options.epochs - options.warmup_epochs
    progress = (epochs_done - options.warmup_epochs) / decaying if decaying else 1.0
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def margin(options: TrainingOptions, epochs_done: float) -> float:
    """The margin after a (fractional) number of epochs: grows linearly from zero to the full one, then stays."""
    if epochs_done >= options.margin_warmup_epochs:
        return options.margin
    return options.margin * epochs_done / options.margin_warmup_epochs


def epoch_order(images: int, views: int, steps: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Batches of one epoch: every image ``views`` times, fully shuffled, split evenly.

    An even split leaves no small last batch, whose statistics would be noise to batch norm, and drops no image.

    Returns:
        ``steps`` int64 tensors of indices into the images, whose sizes differ by at most one.
    """
    return torch.tensor_split(torch.randperm(images * views, generator=generator) % images, steps)


def train(
    recogniser: Recogniser,
    faces: FaceSet,
    defense: Defense,
    options: TrainingOptions,
    *,
    fabric: Fabric,
    seed: int,
    head: MarginHead | None = None,
    checkpoint: Path | None = None,
    report: Report = no_report,
) -> TrainingReport:
    """Train ``recogniser`` in place on protected faces.

    Every epoch shows each image ``views`` times; each copy is flipped and augmented as a camera would see it and then
    protected under a state of its own. All randomness of an epoch derives from ``seed`` and its number, so
    a training that was killed goes on from its last finished epoch as if nothing had happened.

    Args:
        recogniser: built for ``defense.representation_shape``.
        faces: the provider's training faces, labels 0..K-1.
        defense: fitted, frozen; it is moved to Fabric's device.
        options: the hyper-parameters.
        fabric: device, precision and processes, launched.
        seed: of the head's centres, shuffling, augmentation, states and dropout.
        head: over all ``len(faces.names)`` identities; None for the one that ``options`` name.
        checkpoint: a folder for the training's state after each epoch; an unfinished training found there is
            resumed, a finished one only loaded. None to keep nothing.
        report: called as ``report(done, total, epoch=, loss=, accuracy=, learning_rate=, images_per_second=)``,
            counting images, a few times a second at most.

    Raises:
        BenchError: the loss is no longer finite, or the checkpoint cannot be written.
        DataError: too few faces, or a checkpoint that is damaged or of another training.
    """
    if len(faces.used_names) < 2:
        raise DataError(
            f"training needs faces of at least 2 identities, got {len(faces)} faces of {len(faces.used_names)}"
        )
    if head is None:
        head = build_head(options, len(faces.names), seed=Streams(seed).seed_for("training/head"))
    if len(head.weight) != len(faces.names):
        raise ValueError(f"the head tells {len(head.weight)} identities apart, the faces have {len(faces.names)}")
    views = defense.views if options.views is None else options.views
    per_epoch = len(faces) * views
    steps = max(1, round(per_epoch / (options.batch_size * fabric.world_size)))
    streams = Streams(seed)

    device = fabric.device
    defense = defense.to(device)
    images = faces.images.to(device)  # uint8, all of them: batching is one gather, and no loader to feed
    classifier = Classifier(recogniser.train(), head.train())
    optimiser = torch.optim.SGD(
        [p for p in classifier.parameters() if p.requires_grad],
        lr=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    model, stepper = fabric.setup(classifier, optimiser)
    progress = _Progress(per_epoch * options.epochs, report if fabric.is_global_zero else no_report)
    state = _State(classifier, optimiser, fabric, progress)
    file = None if checkpoint is None else checkpoint / "training.safetensors"
    identity = _identity(options, seed, faces, defense, recogniser)
    if file is not None and file.is_file():
        state.load(file, identity)

    for epoch in range(len(progress.losses), options.epochs):
        order = epoch_order(len(faces), views, steps, streams.generator(f"training/order/{epoch}"))
        generator = streams.generator(f"training/faces/{epoch}/{fabric.global_rank}")
        progress.start_epoch(epoch)
        with _seeded(streams.seed_for(f"training/dropout/{epoch}/{fabric.global_rank}"), device):
            for step, batch in enumerate(order):
                rate = learning_rate(options, epoch + (step + 1) / steps)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                head.margin = margin(options, epoch + step / steps)
                chosen = batch[fabric.global_rank :: fabric.world_size]
                labels = faces.labels[chosen]
                with torch.no_grad():
                    seen = augment(to_float(images[chosen.to(device)]), options.augmentation, generator)
                    protected = defense.protect(seen, generator, labels=labels).representation

                loss, hits = model(protected, labels.to(device))
                stepper.zero_grad()
                fabric.backward(loss)
                if options.clip_gradient_norm is not None:
                    fabric.clip_gradients(model, stepper, max_norm=options.clip_gradient_norm)
                stepper.step()

                progress.add(loss.detach(), hits, len(batch))
                if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                    progress.look(step, steps, rate)
        progress.finish_epoch()
        if file is not None and fabric.is_global_zero:
            state.save(file, identity)
    recogniser.eval()
    head.eval()
    return TrainingReport(
        losses=tuple(progress.losses),
        accuracies=tuple(progress.accuracies),
        images_per_second=per_epoch * options.epochs / max(progress.seconds, 1e-9),
        seconds=progress.seconds,
        parameters=recogniser.parameter_count,
        views=views,
        identities=len(faces.names),
    )


class _Progress:
    """Sums of the epoch under way, its finiteness check, and the history of those behind it."""

    def __init__(self, total: int, report: Report) -> None:
        self.total = total
        self.report = report
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.seconds = 0.0
        self.done = 0
        self._reported = -math.inf

    def start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._loss = self._hits = 0.0
        self._count = 0
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._started = time.perf_counter()

    def add(self, loss: Tensor, hits: Tensor, count: int) -> None:
        """Note one step; both tensors stay on the device until the next look."""
        self._pending.append((loss * len(hits), hits.sum()))
        self._count += len(hits)
        self.done += count

    def look(self, step: int, steps: int, rate: float) -> None:
        """Fetch the losses noted since the last look, check and report them.

        Raises:
            BenchError: one of them is not finite.
        """
        losses = torch.stack([loss for loss, _ in self._pending]).double().cpu()
        finite = torch.isfinite(losses)
        if not finite.all():
            culprit = step - len(losses) + 1 + int((~finite).int().argmax())
            raise BenchError(
                f"training diverged: the loss is not finite at epoch {self._epoch + 1}, step {culprit + 1} of {steps} "
                f"(learning rate {rate:.3g}); try a lower learning_rate, a longer warmup_epochs, "
                "clip_gradient_norm=5 or precision=32-true"
            )
        self._loss += float(losses.sum())
        self._hits += float(torch.stack([hits for _, hits in self._pending]).sum())
        self._pending.clear()
        now = time.perf_counter()
        if now - self._reported >= 0.25 or step + 1 == steps:
            self._reported = now
            self.report(
                self.done,
                self.total,
                epoch=self._epoch + 1,
                loss=self._loss / self._count,
                accuracy=self._hits / self._count,
                learning_rate=rate,
                images_per_second=self.done / max(self.seconds + now - self._started, 1e-9),
            )

    def finish_epoch(self) -> None:
        self.losses.append(self._loss / self._count)
        self.accuracies.append(self._hits / self._count)
        self.seconds += time.perf_counter() - self._started


class _State:
    """All that the next epoch depends on: weights, momentum, loss scale and history."""

    def __init__(
        self, classifier: Classifier, optimiser: torch.optim.Optimizer, fabric: Fabric, progress: _Progress
    ) -> None:
        self._classifier = classifier
        self._optimiser = optimiser
        self._precision = fabric.strategy.precision
        self._progress = progress

    def save(self, file: Path, identity: str) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in self._classifier.state_dict().items()}
        for index, entry in self._optimiser.state_dict()["state"].items():
            if entry.get("momentum_buffer") is not None:  # none without momentum
                tensors[f"momentum/{index}"] = entry["momentum_buffer"]
        details = {
            "training": identity,
            "losses": self._progress.losses,
            "accuracies": self._progress.accuracies,
            "seconds": self._progress.seconds,
            "done": self._progress.done,
            "loss_scale": self._precision.state_dict(),
        }
        save_tensors(file, tensors, details)

    def load(self, file: Path, identity: str) -> None:
        tensors, details = load_tensors(file)
        if details.get("training") != identity:
            raise DataError(
                f"{file} belongs to a training with other options, data or seed; delete it or choose another folder"
            )
        try:
            self._classifier.load_state_dict(
                {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
            )
            momentum = {
                int(name.removeprefix("momentum/")): {"momentum_buffer": t}
                for name, t in tensors.items()
                if name.startswith("momentum/")
            }
            self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": momentum})
            if details["loss_scale"]:
                self._precision.load_state_dict(details["loss_scale"])
            self._progress.losses = [float(value) for value in details["losses"]]
            self._progress.accuracies = [float(value) for value in details["accuracies"]]
            self._progress.seconds = float(details["seconds"])
            self._progress.done = int(details["done"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"checkpoint {file} is damaged: {error}; delete it to start again") from error


def _identity(options: TrainingOptions, seed: int, faces: FaceSet, defense: Defense, recogniser: Recogniser) -> str:
    """A digest of everything that decides the course of a training, weights of the start apart."""
    content: dict[str, Any] = {
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "labels": hashlib.sha256(faces.labels.numpy().tobytes()).hexdigest(),
        "images": list(faces.images.shape),
        "pixels": int(faces.images.sum(dtype=torch.int64)),
        "defense": defense.describe(),
        "defense_state": _digest(defense.state_dict()),
        "recogniser": asdict(recogniser.spec),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators, which dropout draws from, start at ``seed`` within and are restored after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
