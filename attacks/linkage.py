"""Linkage by distillation: an encoder of representations that answers as a face recogniser does for the plain face."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, Capability, FitReport, Knowledge, LinkageAttack, Widths
from attacks.parts.encoder import Encoder
from attacks.parts.exposure import Exposure, in_chunks
from attacks.parts.states import ReaderOptions, StateReader
from attacks.parts.training import Trainer, Training, TrainingOptions
from bench.images import to_float
from bench.nets.augmentation import augment
from bench.nets.heads import CosFace
from bench.nets.onnx import OnnxEncoder
from bench.nets.options import AugmentationOptions
from bench.randomness import derived, seeded

#: Faces that give the statistics of an encoder's input.
_STATISTICS_FACES = 1024
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: Of guessing, in 1 - AUC.
_CHANCE = 0.5


class LinkageOptions(TrainingOptions, ReaderOptions):
    """Options of :class:`Linkage`, beside those of its trainings."""

    widths: Widths = Field(
        default=(64, 128, 256, 512), description="Channels of an encoder's first convolution and of each stage."
    )
    blocks: int = Field(2, ge=1, le=16, description="Residual blocks a stage.")
    teacher: Path | None = Field(
        None,
        description="ONNX file of a public face recogniser (input RGB (255 x - 127.5) / 128, output embeddings) to "
        "imitate; none trains one on the public faces and their identities.",
    )
    embedding_size: int = Field(
        default=256, ge=2, le=8192, description="Dimensions of the embedding, where the teacher does not say."
    )
    teacher_steps: int = Field(6000, ge=1, description="Gradient steps of the teacher's training.")
    teacher_learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="Learning rate of AdamW for the teacher."
    )
    scale: float = Field(default=24.0, gt=0, le=1000, description="Scale s of the teacher's margin softmax.")
    margin: float = Field(0.2, ge=0, lt=1, description="Margin m of the teacher's margin softmax.")
    steps: int = Field(20_000, ge=1, description="Gradient steps of the student's training.")
    learning_rate: float = Field(
        5e-4, gt=0, le=1, description="Learning rate of AdamW for the student; the default as published."
    )
    decay: float = Field(0.4, ge=0, le=0.9, description="Share of a training, at its end, over which it falls.")
    weight_decay: float = Field(0.05, ge=0, le=10, description="Weight decay of AdamW.")
    augmentation: float = Field(
        1.0, ge=0, le=2, description="How strongly faces are varied: 0 mirrors only, 1 suits a hundred identities."
    )
    hints: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of a second loss, by which the student's maps behind each stage approach the teacher's "
        "(FitNets, Romero et al., ICLR 2015; mean squared error over the teacher's mean square), where the attack has "
        "trained the teacher and the sizes agree. Short trainings come about twice as far with it.",
    )
    infer_state: bool = Field(
        True,
        description="Where a defence picks and permutes channels, read each face's state off its representation and "
        "meet every map with filters of its own; at blackbox the secret table is inferred from intercepted traffic "
        "first. False trains on the mixture of states, or of guesses.",
    )


def variation(strength: float) -> AugmentationOptions:
    """How public faces are varied: as other cameras would have seen them.

    An attacker with few public identities has to keep a network from telling people by exposure or crop. Only
    half of the faces are moved by fractions of a pixel: resampling blurs, and a network that saw nothing but blurred
    faces would not know the fine detail that many defences send.
    """
    return AugmentationOptions(
        shift=0.06 * strength,
        zoom=math.expm1(0.12 * strength),
        rotation=8 * strength,
        moved=0.5,
        brightness=0.2 * strength,
        contrast=0.3 * strength,
        saturation=0.4 * strength,
        erase=0.5 if strength else 0.0,
        erase_area=max(1e-6, min(1.0, (0.4 * strength) ** 2)),
    )


@dataclass(frozen=True)
class _HeldOut:
    """Faces, uint8 (V, 3, H, W), of identities that no training sees, and all P pairs of them."""

    faces: Tensor
    first: Tensor
    second: Tensor
    same: Tensor

    @classmethod
    def of(cls, faces: Tensor, identities: Tensor) -> _HeldOut:
        first, second = torch.triu_indices(len(faces), len(faces), offset=1)
        return cls(faces, first, second, identities[first] == identities[second])

    @property
    def verifiable(self) -> bool:
        """Whether there are pairs of both kinds, two of each at least."""
        return 2 <= int(self.same.sum()) <= len(self.same) - 2

    def scores(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of genuine and of impostor pairs, from unit embeddings (V, D) of either side."""
        cosine = (left.cpu()[self.first] * right.cpu()[self.second]).sum(dim=1)
        return cosine[self.same], cosine[~self.same]

    def auc(self, left: Tensor, right: Tensor) -> float:
        """Chance that a genuine pair outscores an impostor pair; ties count one half."""
        genuine, impostor = self.scores(left, right)
        ranked = impostor.sort().values
        below = torch.searchsorted(ranked, genuine) + torch.searchsorted(ranked, genuine, right=True)
        return float(below.double().mean() / (2 * len(ranked)))

    def accuracy(self, left: Tensor, right: Tensor) -> float:
        """Mean of the shares of genuine and of impostor pairs told right.

        The threshold is chosen on every second pair of each kind for the others, and the other way round.
        """
        genuine, impostor = self.scores(left, right)
        shares = []
        for turn in (0, 1):
            chosen = _best_threshold(genuine[turn::2], impostor[turn::2])
            test = genuine[1 - turn :: 2], impostor[1 - turn :: 2]
            shares.append(float((test[0] >= chosen).double().mean() + (test[1] < chosen).double().mean()) / 2)
        return sum(shares) / 2


def _best_threshold(genuine: Tensor, impostor: Tensor) -> float:
    candidates = torch.cat((genuine, impostor)).sort().values
    accepted = 1 - torch.searchsorted(genuine.sort().values, candidates) / len(genuine)
    rejected = torch.searchsorted(impostor.sort().values, candidates) / len(impostor)
    return float(candidates[(accepted + rejected).argmax()])


class _Classifier(nn.Module):
    """The teacher under its margin softmax, as one module with the loss as output."""

    def __init__(self, encoder: Encoder, head: CosFace) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, faces: Tensor, identities: Tensor) -> Tensor:
        loss, _ = self.head(self.encoder(faces), identities)
        return loss  # type: ignore[no-any-return]


class _Distiller(nn.Module):
    """The student against the teacher's embeddings, as one module with the loss as output."""

    def __init__(self, encoder: Encoder, hints: float) -> None:
        super().__init__()
        self.encoder, self.hints = encoder, hints

    def forward(self, target: Tensor, maps: Sequence[Tensor], representations: Tensor, layout: Tensor | None) -> Tensor:
        """The loss against embeddings (N, D) and, where ``maps`` are given, those of the teacher's stages."""
        outputs = self.encoder.stage_outputs(representations, layout)
        loss = 1 - functional.cosine_similarity(self.encoder.read_out(outputs[-1]), target).mean()
        if maps:
            errors = [
                (a.float() - b.float()).square().mean() / b.float().square().mean()
                for a, b in zip(outputs[1:], maps, strict=True)
            ]
            loss = loss + self.hints * torch.stack(errors).mean()
        return loss


class Linkage(LinkageAttack):
    """Embedding distillation (FaceLinkGen): a student on representations z imitates a teacher on plain faces X.

    The student minimises 1 - cos(student(z), teacher(X)) over public faces, each varied, then shown to the teacher as
    it is and protected afresh for the student. It starts from the teacher's weights, but for the first convolution
    where representations are no pictures. Where a defence permutes channels, the state is read off the representation,
    also at ``oracle``: interceptions that are to be linked come without their states.
    """

    name = "linkage"
    summary = "an encoder of representations distilled from a face recogniser links them to plain faces"
    cost = "fit: teacher and student, minutes on two cores; link: hundreds of faces/s"
    reference = (
        "Guo and Du, FaceLinkGen: Rethinking Identity Leakage in Privacy-Preserving Face Recognition with Identity "
        "Extraction, arXiv 2602.02914, 2026"
    )
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC})
    Options = LinkageOptions
    presets: ClassVar = {
        # Hundreds or a few thousand steps: higher rates and hints make the most of them.
        "quick": {
            "widths": (16, 32, 64, 128),
            "blocks": 1,
            "embedding_size": 64,
            "batch_size": 32,
            "teacher_steps": 120,
            "teacher_learning_rate": 3e-3,
            "steps": 240,
            "learning_rate": 4e-3,
            "hints": 2.0,
            "augmentation": 0.5,
            "state_faces": 200,
            "traffic": 500,
        },
        "cpu": {
            "widths": (24, 48, 96, 192),
            "blocks": 1,
            "embedding_size": 128,
            "teacher_steps": 1500,
            "teacher_learning_rate": 2e-3,
            "steps": 1500,
            "learning_rate": 3e-3,
            "hints": 2.0,
        },
        "gpu": {
            "batch_size": 256,
            "teacher_steps": 8000,
            "steps": 12_000,
            "learning_rate": 1e-3,
            "hints": 2.0,
            "early_stop": True,
        },
        # As published: no state read off, no hints. Two epochs suffice of hundreds of thousands of faces, not of fewer.
        "paper": {"steps": 40_000, "infer_state": False},
    }
    budgets: ClassVar = {"steps": "steps"}
    options: LinkageOptions

    teacher: Encoder | OnnxEncoder
    student: Encoder
    reader: StateReader | None

    # -- building -----------------------------------------------------------------------------------

    def build(self, adversary: Adversary) -> None:
        """Build both encoders and the reader of states."""
        options = self.options
        self.reader = StateReader(_without_states(adversary), self.mechanism) if options.infer_state else None
        if options.teacher is None:
            size = options.embedding_size
            self.teacher = self._encoder((3, *adversary.faces.shape[2:]), size)
        else:
            self.teacher = OnnxEncoder(options.teacher, self.device)
            size = self.teacher.embedding_size
        width = None if self.reader is None else self.reader.width
        self.student = self._encoder(self.mechanism.representation_shape, size, width)
        self.to(memory_format=torch.channels_last)

    def _encoder(self, shape: tuple[int, int, int], size: int, width: int | None = None) -> Encoder:
        options = self.options
        return Encoder(shape, widths=options.widths, blocks=options.blocks, embedding_size=size, width=width)

    def _layout(self, representations: Tensor) -> Tensor | None:
        """int64 (N, C): what each map of (N, C, h, w) is, as far as can be told; None where that never varies."""
        if self.reader is None or self.reader.width is None:
            return None
        return self.reader.layouts(self.reader.rows(representations, None))

    # -- training -----------------------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Train the teacher, where none is given, and then the student; some identities are held out for the curves."""
        options = self.options
        least = 2 / len(torch.unique(adversary.identities))
        trainer = Trainer(self.name, adversary, self.seed, options, held_out=least)
        chosen = trainer.validation()
        held = _HeldOut.of(trainer.faces[chosen.to(trainer.device)], adversary.identities[chosen].cpu())
        details: dict[str, Any] = {}
        mechanism = None
        if self.reader is not None:
            details |= self.reader.fit(self.seed, options)
            mechanism = self.reader.mechanism if self.reader.infers_secret else None
        exposure = Exposure(adversary, self.seed, mechanism=mechanism)
        taught = self._teach(self.teacher, trainer, held) if isinstance(self.teacher, Encoder) else None
        self.teacher.eval().requires_grad_(False)
        learnt = self._distil(trainer, exposure, held)

        plain = _embed(partial(_plain, self.teacher), held.faces, trainer.fabric)
        intercepted = self._intercepted(self.student, held.faces, exposure, trainer.fabric)
        for name, embeddings in (("teacher", plain), ("student", intercepted)):
            details[f"{name}_accuracy"] = held.accuracy(embeddings, plain) if held.verifiable else None
            details[f"{name}_auc"] = held.auc(embeddings, plain) if held.verifiable else None
        if isinstance(self.teacher, OnnxEncoder):
            details["teacher"] = {"file": self.teacher.path.name, "sha256": bytes(self.teacher.digest.tolist()).hex()}
        if taught is not None:
            details |= {
                "teacher_steps": taught.details["steps"],
                "teacher_curve": [list(point) for point in taught.curve],
                "teacher_saturated": taught.saturated,
            }
        details |= {
            "validation_faces": len(chosen),
            "training_identities": len(torch.unique(adversary.identities[trainer.training])),
            "validation_pairs": [int(held.same.sum()), int((~held.same).sum())],
            "student_saturated": learnt.saturated,
            "stopped_early": learnt.details["steps"] < options.steps,
            "states_inferred": self.reader is not None and self.reader.width is not None,
        }
        # A student cannot be better than whom it imitates: both have to have learnt what there is to learn.
        saturated = learnt.saturated and (taught is None or taught.saturated)
        return replace(learnt, saturated=saturated, details=learnt.details | details)

    def _train(
        self,
        trainer: Trainer,
        name: str,
        module: nn.Module,
        inputs: Callable[[Tensor, Tensor, int], tuple[Any, ...]],
        **more: Any,
    ) -> FitReport:
        """Train ``module``, called ``name``, whose output is the loss, on varied faces.

        ``inputs(faces, index, step)`` are its arguments for faces (n, 3, H, W) in [0, 1] that are the public ones at
        ``index``; ``more`` is of :class:`Training`.
        """
        options = self.options
        model = trainer.fabric.setup_module(module)

        def loss(step: int) -> Tensor:
            index = trainer.batch(step, name).to(trainer.device)
            draws = derived(self.seed, name, "vary", step)
            faces = augment(trainer.floats(index), variation(options.augmentation), draws)
            value: Tensor = model(*inputs(faces, index, step))
            return value

        optimizer = partial(torch.optim.AdamW, weight_decay=options.weight_decay)
        return trainer.train(Training(name=name, network=module, loss=loss, optimizer=optimizer, **more))

    def _statistics(self, trainer: Trainer) -> Iterator[tuple[int, Tensor]]:
        """Numbered chunks of training faces, for the statistics of an encoder's input."""
        sample = trainer.sample(_STATISTICS_FACES, "statistics")
        yield from enumerate(trainer.floats(index) for index in sample.split(_CHUNK))

    def _teach(self, teacher: Encoder, trainer: Trainer, held: _HeldOut) -> FitReport:
        options, identities = self.options, trainer.adversary.identities
        trained, position = torch.unique(identities[trainer.training], return_inverse=True)
        if len(trained) < 2 or not held.verifiable:
            raise ValueError(
                f"linkage trains its teacher to tell people apart, and validates it on two others with several faces "
                f"each: the public faces show {len(torch.unique(identities))} identities in {len(identities)} faces; "
                f"give more, or a teacher"
            )
        classes = torch.zeros(len(identities), dtype=torch.int64)
        classes[trainer.training.cpu()] = position.cpu()
        classes = classes.to(trainer.device)
        teacher.normalisation.measure((faces, None) for _, faces in self._statistics(trainer))
        with seeded(self.seed, "centres"):
            head = CosFace(options.embedding_size, len(trained), scale=options.scale, margin=options.margin)
            # Steps of AdamW are of one size, whatever the gradient's: from small centres they would be leaps.
            nn.init.normal_(head.weight)

        def validate(module: nn.Module) -> float:
            assert isinstance(module, _Classifier)
            plain = _embed(partial(_plain, module.encoder), held.faces, trainer.fabric)
            return 1 - held.auc(plain, plain)

        return self._train(
            trainer,
            "teacher",
            _Classifier(teacher, head.to(trainer.device)),
            lambda faces, index, step: (faces, classes[index]),
            validate=validate,
            floor=_CHANCE,
            steps=options.teacher_steps,
            learning_rate=options.teacher_learning_rate,
            early_stop=False,
            later=options.steps,
        )

    def _distil(self, trainer: Trainer, exposure: Exposure, held: _HeldOut) -> FitReport:
        def seen(faces: Tensor, *name: str | int) -> tuple[Tensor, Tensor | None, Tensor | None]:
            protected = exposure.protect(faces, *name)
            return protected.representation, self._layout(protected.representation), protected.state

        self.student.normalisation.measure(
            seen(faces, "statistics", number)[:2] for number, faces in self._statistics(trainer)
        )
        targets = _embed(partial(_plain, self.teacher), held.faces, trainer.fabric)
        target_of = self._targets(trainer)
        countable = exposure.countable

        def inputs(faces: Tensor, index: Tensor, step: int) -> tuple[Any, ...]:
            target, maps = target_of(faces, index)
            representations, layout, states = seen(faces, "protect", step)
            trainer.note(states if countable else None)
            return target, maps, representations, layout

        def validate(module: nn.Module) -> float:
            assert isinstance(module, _Distiller)
            intercepted = self._intercepted(module.encoder, held.faces, exposure, trainer.fabric)
            return float(1 - (intercepted * targets).sum(dim=1).mean())

        return self._train(
            trainer,
            "student",
            _Distiller(self.student, self.options.hints),
            inputs,
            validate=validate,
            # Of the one embedding that is nearest to all of them.
            floor=float(1 - targets.mean(dim=0).norm()),
            steps=self.options.steps,
        )

    def _targets(self, trainer: Trainer) -> Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]:
        """Start the student near its teacher; returns what gives it, for faces varied and their numbers, its targets.

        These are unit embeddings (n, D) and, where hints are wanted, the maps behind the teacher's stages. A teacher
        trained here is asked about each face as it is varied. A published one knows a person however
        varied, and costs many times more: it is asked once for each public face as it is.
        """
        teacher, student = self.teacher, self.student
        if isinstance(teacher, Encoder):
            encoder = teacher
            student.start_from(encoder)
            # Maps of one place can be compared where both encoders look at pictures of one size.
            hints = self.options.hints > 0 and encoder.shape[1:] == student.shape[1:]

            @torch.no_grad()
            def ask(faces: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor]]:
                with trainer.fabric.autocast():
                    maps = encoder.stage_outputs(faces)[1:]
                    embeddings = encoder.read_out(maps[-1]) + encoder(faces.flip(-1))
                return functional.normalize(embeddings.float(), dim=1), maps if hints else []

            return ask
        training = trainer.training.to(trainer.device)
        known = torch.zeros(len(trainer.faces), teacher.embedding_size, device=trainer.device)
        known[training] = _embed(partial(_plain, teacher), trainer.faces[training], trainer.fabric)
        student.aim_at(known[training])
        return lambda faces, index: (known[index], [])

    def _intercepted(self, student: Encoder, faces: Tensor, exposure: Exposure, fabric: Fabric) -> Tensor:
        """Unit embeddings of ``faces`` (uint8) protected under draws that are the same every time."""
        numbers = itertools.count()

        def embed(batch: Tensor) -> Tensor:
            sent = exposure.protect(batch, "validate", next(numbers)).representation
            return functional.normalize(student(sent, self._layout(sent)), dim=1)

        return _embed(embed, faces, fabric)

    # -- linking ------------------------------------------------------------------------------------

    def encode_representations(self, representations: Tensor) -> Tensor:
        """The student's embeddings."""

        def encode(part: Tensor) -> Tensor:
            sent = part.to(self.device)
            embeddings: Tensor = self.student(sent, self._layout(sent))
            return embeddings

        return in_chunks(encode, representations).float()

    def encode_faces(self, faces: Tensor) -> Tensor:
        """The teacher's embeddings of faces and their mirror images, averaged."""
        return in_chunks(lambda part: _plain(self.teacher, part.to(self.device)), faces)


def _without_states(adversary: Adversary) -> Adversary:
    """The adversary as far as linking goes: representations to be linked come without their states."""
    return replace(adversary, knowledge=Knowledge.WHITEBOX) if adversary.knowledge is Knowledge.ORACLE else adversary


def _plain(teacher: nn.Module, faces: Tensor) -> Tensor:
    """Unit embeddings of plain faces (N, 3, H, W) and their mirror images, averaged."""
    return functional.normalize((teacher(faces) + teacher(faces.flip(-1))).float(), dim=1)


@torch.no_grad()
def _embed(embed: Callable[[Tensor], Tensor], faces: Tensor, fabric: Fabric) -> Tensor:
    """``embed`` of uint8 faces as floats, a chunk at a time: float32 (N, D)."""
    with fabric.autocast():
        return in_chunks(lambda part: embed(to_float(part)), faces).float()
