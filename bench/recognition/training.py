"""The recogniser's training loop, from faces and a defence to a network that recognises protected faces."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import workers
from bench.data.encoded import RecordSource
from bench.data.faces import FaceSet
from bench.data.stream.loader import StreamLoader
from bench.data.stream.sampler import EpochOrder
from bench.errors import DataError, UsageError
from bench.graphs import Beside
from bench.images import to_float
from bench.memory import Parts
from bench.nets.augmentation import augment
from bench.nets.heads import MarginHead
from bench.nets.recogniser import Recogniser
from bench.progress import Report, no_report
from bench.randomness import Streams
from bench.recognition.learner import make_learner
from bench.recognition.options import HEADS, TrainingOptions
from bench.recognition.partial_fc import PartialFC
from bench.recognition.processes import Processes, alone, noticing_lost_processes, processes_of, shared_statistics
from bench.recognition.state import History, TrainingState, digest
from defenses.base import Defense

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Batches(ABC):
    """Every image so many times an epoch, in an order of the epoch's own.

    Attributes:
        resumable: whether a training can go on behind any batch, and not only behind a whole epoch.
    """

    resumable: ClassVar[bool] = False

    @abstractmethod
    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        """Of each batch its number, this process's part (indices int64 (n,) and uint8 (n, 3, H, W)), the whole's size.

        The epoch that :meth:`resume` names starts where that says.
        """

    def reached(self) -> dict[str, Any]:
        """What to :meth:`resume` from: JSON, empty unless resumable."""
        return {}

    def resume(self, reached: Mapping[str, Any]) -> None:
        """Go on behind the batch after which :meth:`reached` was called.

        Raises:
            DataError: that was another order, or these batches are not resumable.
        """
        raise DataError("faces in memory are trained on by whole epochs, the checkpoint was left within one")


def epoch_order(images: int, views: int, steps: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Batches of one epoch: every image ``views`` times, fully shuffled, split evenly.

    An even split leaves no small last batch, whose statistics would be noise to batch norm, and drops no image.

    Returns:
        ``steps`` int64 tensors of indices into the images, whose sizes differ by at most one.
    """
    return torch.tensor_split(torch.randperm(images * views, generator=generator) % images, steps)


class MemoryBatches(Batches):
    """Of faces in memory, on the device: batching is one gather, and no loader to feed."""

    def __init__(self, faces: FaceSet, views: int, steps: int, streams: Streams, processes: Processes) -> None:
        self._faces, self._views, self._steps = faces, views, steps
        self._streams, self._processes = streams, processes

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        generator, images = self._streams.generator(f"training/order/{epoch}"), self._faces.images
        for step, batch in enumerate(epoch_order(len(images), self._views, self._steps, generator)):
            chosen = batch[self._processes.rank :: self._processes.size]
            yield step, chosen, images[chosen.to(images.device)], len(batch)


class StreamBatches(Batches):
    """Of faces on disk, read ahead by threads."""

    resumable = True

    def __init__(
        self,
        faces: RecordSource,
        views: int,
        batch_size: int,
        streams: Streams,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._device, self._processes = device, processes
        self._order = EpochOrder(
            images=len(faces),
            batch_size=batch_size,
            seed=streams.seed_for("training/order"),
            views=views,
            rank=processes.rank,
            size=processes.size,
        )
        self._loader = StreamLoader(faces, self._order, workers=workers(), pin_memory=device.type == "cuda")

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        """As :meth:`Batches.epoch`.

        Raises:
            DataError: what cannot be read; an image that cannot be decoded, where several processes share a batch.
        """
        loader = self._loader
        if loader.epoch != epoch:
            loader.epoch, loader.position = epoch, 0
        for step, read in enumerate(loader, loader.position):
            if read.skipped and self._processes.size > 1:
                bad = read.skipped[0]
                raise DataError(f"{bad.where}: {bad.reason}; several processes cannot skip images (on_error=refuse)")
            total = self._order.batch_total(step) - len(read.skipped)
            yield step, read.rows, read.images.to(self._device, non_blocking=True), total

    def reached(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def resume(self, reached: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(reached)


def flip_labels(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """A copy of int64 ``labels`` (N,) with ``round(share * N)`` of them replaced by another identity's.

    Which ones and by what is uniform (symmetric label noise), and the same for the same generator.
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    # A shift by 1..C-1 never comes back to where it started.
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + shift) % classes
    return flipped


#: Steps between two looks at the loss: each look makes a GPU wait.
LOOK_EVERY = 10


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a training says of itself.

    Attributes:
        losses: mean training loss of each epoch.
        accuracies: share of training images of each epoch nearest to their own identity's centre, in [0, 1]; with head
            ``partial-fc``, among the sampled centres.
        images_per_second: images trained on, each view counted, over the time spent training them.
        seconds: time spent training, summed over resumed parts.
        parameters: learned values of the recogniser.
        views: copies of each image per epoch.
        identities: classes of the head.
        processes: that trained together.
        flipped_labels: training images that were given another identity's label on purpose.
        overfull_steps: steps, counted by each process, in which a process had more positive centres than its quota and
            took no negatives (head ``partial-fc``).
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    images_per_second: float
    seconds: float
    parameters: int
    views: int
    identities: int
    processes: int = 1
    flipped_labels: int = 0
    overfull_steps: int = 0

    @property
    def accuracy(self) -> float:
        """Training accuracy of the last epoch, in [0, 1]."""
        return self.accuracies[-1]


def build_head(
    options: TrainingOptions, identities: int, *, seed: int = 0, processes: Processes | None = None
) -> MarginHead | PartialFC:
    """The margin head that ``options`` name; torch's global generator is left as it was.

    Args:
        processes: among which the centres of ``partial-fc`` are shared out; the other heads are whole on each.

    Raises:
        UsageError: an unknown head, or a scale or margin out of its range.
    """
    kind: Any = HEADS.get(options.head)
    more: dict[str, Any] = {"seed": seed, "processes": processes} if issubclass(kind, PartialFC) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head: MarginHead | PartialFC = kind(options.embedding_size, identities, **options.head_options, **more)
    return head


@torch.no_grad()
def start_at(recogniser: Recogniser, head: MarginHead | PartialFC, embeddings: Tensor, labels: Tensor) -> None:
    """Let the output of a fresh recogniser, and each identity's centre, start where a teacher has the faces.

    The batch norm of embeddings gives all dimensions one deviation, and those of a teacher may differ by a hundred
    times: it takes over their means and deviations. Centres stay about as long as fresh ones: with them the share of
    hits says something where the head itself learns nothing (``classification=0``).

    Args:
        recogniser: whose backbone may or may not end in a batch norm ``embedding_norm``.
        head: over the K identities that ``labels``, int64 (N,), name.
        embeddings: the teacher's, unit rows, float32 (N, D).
    """
    for name, norm in recogniser.named_modules():
        if name.endswith("embedding_norm"):
            # Of a length at which each dimension has about one unit of variance, as in a fresh one.
            length = math.sqrt(embeddings.shape[1])
            norm.bias.copy_(length * embeddings.mean(dim=0))
            norm.weight.copy_(length * embeddings.std(dim=0, correction=0))
    known = head.classes if isinstance(head, PartialFC) else len(head.weight)
    means = torch.zeros(known, embeddings.shape[1]).index_add_(0, labels, embeddings)
    means = 0.01 * math.sqrt(means.shape[1]) * F.normalize(means)
    owned = head.owned if isinstance(head, PartialFC) else range(known)
    head.weight.copy_(means[owned.start : owned.stop])


def learning_rate(options: TrainingOptions, epochs_done: float) -> float:
    """The learning rate after a (fractional) number of epochs: linear warm-up, then the schedule."""
    peak = options.learning_rate
    if epochs_done < options.warmup_epochs:
        return peak * epochs_done / options.warmup_epochs
    if options.schedule == "step":
        return peak * 0.1 ** sum(epochs_done >= milestone for milestone in options.milestones)
    decaying = options.epochs - options.warmup_epochs
    progress = (epochs_done - options.warmup_epochs) / decaying if decaying else 1.0
    return peak * (1 - progress if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def margins(options: TrainingOptions, epochs_done: float) -> dict[str, float]:
    """The head's margins after a (fractional) number of epochs: they grow linearly from none, then stay."""

    def grown(full: float) -> float:
        if epochs_done >= options.margin_warmup_epochs:
            return full
        return full * epochs_done / options.margin_warmup_epochs

    now = {"margin": grown(options.margin)}
    if "angle_factor" in options.head_options:
        now |= {"angle_factor": 1 + grown(options.angle_factor - 1), "cosine_margin": grown(options.cosine_margin)}
    return now


def train(
    recogniser: Recogniser,
    faces: FaceSet | RecordSource,
    defense: Defense,
    options: TrainingOptions,
    *,
    fabric: Fabric,
    seed: int,
    head: MarginHead | PartialFC | None = None,
    teacher: Tensor | None = None,
    checkpoint: Path | None = None,
    report: Report = no_report,
) -> TrainingReport:
    """Train ``recogniser`` in place on protected faces.

    Every epoch shows each image ``views`` times; each copy is flipped and augmented as a camera would see it and then
    protected under a state of its own. All randomness of an epoch derives from ``seed`` and its number, so
    a training that was killed goes on from its last finished epoch as if nothing had happened. Of streamed faces, whose
    epochs are long, all randomness of a step derives from its number too, and a training goes on within an epoch.

    Several processes share each batch; the images of a batch, the learning rate and, with ``sync_batch_norm``, the
    statistics are those of one process, so losses agree with one process's but for the order of sums, whose rounding
    training amplifies (in float32 to some per mille of the first epoch's loss over a dozen steps). What is drawn per
    image (augmentation, states, dropout) comes from each process's own stream: equal in distribution, not in value.

    Where an accelerator's memory is full, a step goes on in parts of its batch (:class:`bench.memory.Parts`). Several
    processes find out before the first step how many parts all of them need; what fills up later ends the training.

    Under a ``teacher`` the recogniser learns to agree with the embedding that a strong recogniser has of the same plain
    face, as it was before it was flipped and augmented: ``distillation`` times the mean of 1 - cosine is added to
    ``classification`` times the margin head's loss, whose centres start where the teacher has each identity.

    Args:
        recogniser: built for ``defense.representation_shape``.
        faces: the provider's training faces, labels 0..K-1, in memory or streamed from disk.
        defense: fitted, frozen; it is moved to Fabric's device.
        options: the hyper-parameters.
        fabric: device, precision and processes, launched.
        seed: of the head's centres, shuffling, augmentation, states and dropout.
        head: over all K identities; None for the one that ``options`` name.
        teacher: its embeddings of ``faces``, in their order: unit rows, float32 (N, D), D being the recogniser's.
        checkpoint: a folder for the training's state after each epoch, and of streamed faces about every minute
            (:data:`bench.recognition.state.SAVE_SECONDS`), the same for all processes; an unfinished training
            found there is resumed, by any number of processes, a finished one only loaded. None to keep nothing.
        report: called as ``report(done, total, epoch=, loss=, accuracy=, learning_rate=, images_per_second=)``,
            counting images, a few times a second at most.

    Raises:
        BenchError: the loss is no longer finite, the checkpoint cannot be written, or another process was lost.
        DataError: too few faces, or a checkpoint that is damaged or of another training.
        UsageError: more processes than a batch has room for.
    """
    processes = processes_of(fabric)
    device = fabric.device
    with (
        noticing_lost_processes(processes),
        shared_statistics(recogniser, processes if options.sync_batch_norm else Processes()),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),  # dropout's
        Parts([recogniser], f"the training of the recogniser behind {defense.name}") as parts,
    ):
        labels = faces.labels if isinstance(faces, FaceSet) else torch.from_numpy(faces.labels.astype("int64"))
        identities = len(faces.names) if isinstance(faces, FaceSet) else faces.identities
        if (people := len(torch.unique(labels))) < 2:
            raise DataError(f"training needs faces of at least 2 identities, got {len(faces)} faces of {people}")
        streams = Streams(seed)
        size = recogniser.spec.embedding_size
        if teacher is not None and teacher.shape != (len(faces), size):
            raise ValueError(f"the teacher's embeddings must be ({len(faces)}, {size}), got {tuple(teacher.shape)}")
        if teacher is None and not options.classification:
            raise UsageError("training.classification=0 leaves nothing to learn from without a teacher: give --teacher")
        if head is None:
            options = options.model_copy(update={"embedding_size": size})
            head = build_head(options, identities, seed=streams.seed_for("training/head"), processes=processes)
        known = head.classes if isinstance(head, PartialFC) else len(head.weight)
        if known != identities:
            raise ValueError(f"the head tells {known} identities apart, the faces have {identities}")
        views = defense.views if options.views is None else options.views
        per_epoch = len(faces) * views
        steps = max(1, round(per_epoch / options.batch_size))
        if processes.size > 1 and per_epoch // steps < 2 * processes.size:
            raise UsageError(
                f"{processes.size} processes cannot share batches of {per_epoch // steps}: start fewer, or raise "
                f"training.batch_size to {2 * processes.size} or more"
            )
        targets = flip_labels(labels, identities, options.label_noise, streams.generator("training/label-noise"))

        if teacher is not None:
            start_at(recogniser, head, teacher, targets)
            teacher = teacher.to(device)

        defense = defense.to(device)
        batches: Batches
        if isinstance(faces, FaceSet):
            faces = faces.to(device)  # uint8, all of them
            batches = MemoryBatches(faces, views, steps, streams, processes)
        else:
            batches = StreamBatches(faces, views, options.batch_size, streams, processes, device)
        if processes.size > 1:
            shared = per_epoch // steps  # by the smallest batch; the largest has one image more
            _rehearse(recogniser, head, (shared // processes.size, shared // processes.size + 1), parts, fabric)
        learner = make_learner(recogniser, head, options, fabric)
        if processes.size == 1:  # of several, one would repeat what the others have exchanged with it already
            learner.parts = parts
        history = History(per_epoch * options.epochs, report if fabric.is_global_zero else no_report, processes)
        state = None
        if checkpoint is not None:
            identity = _identity(options, seed, faces, defense, recogniser, teacher)
            state = TrainingState(checkpoint, identity, learner, fabric)
            if (reached := state.resume(history)) is not None:
                batches.resume(reached)

        generator, beside = torch.Generator(), Beside(device)

        def reseed(when: str) -> None:
            generator.manual_seed(streams.seed_for(f"training/faces/{when}/{processes.rank}"))
            torch.manual_seed(streams.seed_for(f"training/dropout/{when}/{processes.rank}"))
            if isinstance(head, PartialFC):
                head.reseed(streams.seed_for(f"training/centres/{when}"))

        @torch.no_grad()
        def examples(epoch: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
            """Of each step its number, the size of the whole batch, and what is learnt from."""
            for step, chosen, pixels, total in batches.epoch(epoch):
                if batches.resumable:
                    reseed(f"{epoch}/{step}")
                given = targets[chosen]
                seen = augment(to_float(pixels), options.augmentation, generator)
                protected = defense.protect(seen, generator, labels=given).representation
                aims = None if teacher is None else teacher[chosen.to(device)]
                yield step, total, protected, given.to(device), aims

        for epoch in range(len(history.losses), options.epochs):
            history.start_epoch(epoch)
            reseed(f"{epoch}")
            shown: Iterator[tuple[Any, ...]] = examples(epoch)
            while example := beside(functools.partial(next, shown, ())):
                step, total, *batch = example
                rate = learning_rate(options, epoch + (step + 1) / steps)
                for name, value in margins(options, epoch + step / steps).items():
                    setattr(head, name, value)
                loss, hits = learner.step(*batch, rate=rate, total=total)
                del example, batch  # or there would be two batches while the next one is made
                history.add(loss, hits, total)
                last = step + 1 == steps
                if (step + 1) % LOOK_EVERY == 0 or last:
                    history.look(step, steps, rate)
                    if state is not None and batches.resumable and not last and state.due():
                        state.save(history, batches.reached())
            history.finish_epoch()
            if state is not None:
                state.save(history)
        recogniser.eval()
        head.eval()
        return TrainingReport(
            losses=tuple(history.losses),
            accuracies=tuple(history.accuracies),
            images_per_second=per_epoch * options.epochs / max(history.seconds, 1e-9),
            seconds=history.seconds,
            parameters=recogniser.parameter_count,
            views=views,
            identities=identities,
            processes=processes.size,
            flipped_labels=int((targets != labels).sum()),
            overfull_steps=head.overfull_everywhere() if isinstance(head, PartialFC) else 0,
        )


def _rehearse(
    recogniser: Recogniser, head: MarginHead | PartialFC, rows: tuple[int, int], parts: Parts, fabric: Fabric
) -> None:
    """Let several processes find out into how many parts each has to cut its passes, of ``rows`` at least and at most.

    With what a step takes besides the pass set aside: momentum and the buckets that gradients are exchanged in, and
    of the head its centres, their gradient and momentum, and scores, their softmax and gradient.
    """
    processes, device = processes_of(fabric), fabric.device
    recogniser.to(device).train()
    of_head = 3 * head.weight.numel() + 3 * rows[1] * len(head.weight)
    kept = torch.empty(2 * recogniser.parameter_count + of_head, device=device)
    faces = torch.rand(rows[1], *recogniser.spec.representation_shape, device=device)

    def attempt() -> None:
        recogniser.zero_grad()
        with fabric.autocast():
            embeddings = recogniser(faces)
        embeddings.float().square().mean().backward()

    def largest(count: int) -> int:
        return int(processes.maximum(torch.tensor(count, device=device)))

    with alone(recogniser):
        parts.settle(attempt, rows[0], largest)
    recogniser.zero_grad()
    del kept


def _identity(
    options: TrainingOptions,
    seed: int,
    faces: FaceSet | RecordSource,
    defense: Defense,
    recogniser: Recogniser,
    teacher: Tensor | None,
) -> str:
    """A digest of everything that decides the course of a training, weights of the start apart."""
    labels = faces.labels.numpy() if isinstance(faces, FaceSet) else faces.labels
    shape = (len(faces), 3, *(2 * [faces.size if isinstance(faces, FaceSet) else faces.image_size]))
    # Streamed pixels are too many to be summed; each image's own label is checked when it is read.
    pixels = int(faces.images.sum(dtype=torch.int64)) if isinstance(faces, FaceSet) else str(faces.path)
    content: dict[str, Any] = {
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "images": shape,
        "pixels": pixels,
        "defense": defense.describe(),
        "defense_state": digest(defense.state_dict()),
        "recogniser": recogniser.spec.model_dump(mode="json"),
        "teacher": None if teacher is None else digest({"embeddings": teacher}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
