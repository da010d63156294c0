"""Linkage by distillation: an encoder of representations that answers as a face recogniser does for the plain face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Knowledge, LinkageAttack
from attacks.parts.encoder import Encoder, MarginSoftmax
from attacks.parts.exposure import Exposure, chunks, split_identities
from attacks.parts.states import StateReader
from attacks.parts.training import Outcome, SeenStates, Trainer, Training, TrainingOptions, at
from bench.images import to_float
from bench.nets.onnx import OnnxEncoder
from bench.randomness import derived, seeded

#: Held-out faces that give the loss curves.
_VALIDATION_FACES = 256
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: Of guessing, in 1 - AUC.
_CHANCE = 0.5


class LinkageOptions(TrainingOptions):
    """Options of :class:`Linkage`, beside those of how its encoders are built and trained.

    Attributes:
        teacher: ONNX file of a public face recogniser (input RGB (255 x - 127.5) / 128, output embeddings) to imitate;
            None trains one on the public faces and their identities.
        embedding_size: dimensions of the embedding, where ``teacher`` does not say.
        teacher_steps: of the teacher's training.
        teacher_learning_rate: of AdamW.
        scale, margin: s and m of the teacher's margin softmax.
        steps: of the student's training.
        learning_rate: of AdamW; 5e-4 is the published one.
        hints: weight of a second loss, by which the maps behind each stage of the student approach the teacher's
            (FitNets, Romero et al., ICLR 2015), where the attack has trained the teacher and the sizes agree; each is
            the mean squared error over the teacher's mean square. Short trainings come about twice as far with it.
        early_stop: start the student's decay as soon as its validation loss has plateaued.
        infer_state: where a defence picks and permutes channels, read each face's state off its representation and
            meet every map with filters of its own; at ``blackbox`` the secret table is inferred from intercepted
            traffic first. False trains on the mixture of states, or of guesses.
        state_faces: public faces that the reader of states learns from.
        traffic: intercepted faces that a secret table is inferred from.
        validation: share of the public identities held out for the loss curves, at least two of them.
    """

    teacher: Path | None = None
    embedding_size: int = Field(default=256, ge=2, le=8192)
    teacher_steps: int = Field(default=6000, ge=1)
    teacher_learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False)
    scale: float = Field(default=24.0, gt=0, le=1000, allow_inf_nan=False)
    margin: float = Field(default=0.2, ge=0, lt=1)
    steps: int = Field(default=20_000, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0, le=1, allow_inf_nan=False)
    hints: float = Field(default=0.0, ge=0, le=1000, allow_inf_nan=False)
    early_stop: bool = False
    infer_state: bool = True
    state_faces: int = Field(default=800, ge=16)
    traffic: int = Field(default=1000, ge=1)
    validation: float = Field(default=0.1, gt=0, lt=1)


# -- held-out pairs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HeldOut:
    """Faces of identities that no training sees, and all pairs of them.

    Attributes:
        faces: uint8 (V, 3, H, W), on the device.
        first, second: int64 (P,).
        same: bool (P,).
    """

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

    def scores(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of genuine and of impostor pairs, from unit embeddings (V, D) of either side."""
        cosine = (one.cpu()[self.first] * other.cpu()[self.second]).sum(dim=1)
        return cosine[self.same], cosine[~self.same]

    def auc(self, one: Tensor, other: Tensor) -> float:
        """Chance that a genuine pair outscores an impostor pair; ties count one half."""
        genuine, impostor = self.scores(one, other)
        ranked = impostor.sort().values
        below = torch.searchsorted(ranked, genuine) + torch.searchsorted(ranked, genuine, right=True)
        return float(below.double().mean() / (2 * len(ranked)))

    def accuracy(self, one: Tensor, other: Tensor) -> float:
        """Mean of the shares of genuine and of impostor pairs told right.

        The threshold is chosen on every second pair of each kind for the others, and the other way round.
        """
        genuine, impostor = self.scores(one, other)
        right = []
        for turn in (0, 1):
            chosen = _best_threshold(genuine[turn::2], impostor[turn::2])
            test = genuine[1 - turn :: 2], impostor[1 - turn :: 2]
            right.append(float((test[0] >= chosen).double().mean() + (test[1] < chosen).double().mean()) / 2)
        return sum(right) / 2


def _best_threshold(genuine: Tensor, impostor: Tensor) -> float:
    candidates = torch.cat((genuine, impostor)).sort().values
    accepted = 1 - torch.searchsorted(genuine.sort().values, candidates) / len(genuine)
    rejected = torch.searchsorted(impostor.sort().values, candidates) / len(impostor)
    return float(candidates[(accepted + rejected).argmax()])


# -- what is trained ----------------------------------------------------------------------------------


class _Classifier(nn.Module):
    """The teacher under its margin softmax, as one module with the loss as output."""

    def __init__(self, encoder: Encoder, softmax: MarginSoftmax) -> None:
        super().__init__()
        self.encoder, self.softmax = encoder, softmax

    def forward(self, faces: Tensor, identities: Tensor) -> Tensor:
        loss: Tensor = self.softmax(self.encoder(faces), identities)
        return loss


class _Distiller(nn.Module):
    """The student against the teacher's embeddings, as one module with the loss as output."""

    def __init__(self, encoder: Encoder, hints: float) -> None:
        super().__init__()
        self.encoder, self.hints = encoder, hints

    def forward(self, target: Tensor, maps: Sequence[Tensor], representations: Tensor, places: Tensor | None) -> Tensor:
        """The loss against embeddings (N, D) and, where ``maps`` are given, those of the teacher's stages."""
        own = self.encoder.stage_outputs(representations, places)
        loss = 1 - functional.cosine_similarity(self.encoder.read_out(own[-1]), target).mean()
        if maps:
            errors = [
                (a.float() - b.float()).square().mean() / b.float().square().mean()
                for a, b in zip(own[1:], maps, strict=True)
            ]
            loss = loss + self.hints * torch.stack(errors).mean()
        return loss


# -- the attack ---------------------------------------------------------------------------------------


class Linkage(LinkageAttack):
    """Embedding distillation (FaceLinkGen): a student on representations z imitates a teacher on plain faces X.

    The student minimises 1 - cos(student(z), teacher(X)) over public faces, each varied, then shown to the teacher as
    it is and protected afresh for the student. It starts from the teacher's weights, but for the first convolution
    where representations are no pictures. Where a defence permutes channels, the state is read off the representation,
    also at ``oracle``: interceptions that are to be linked come without their states.
    """

    name: ClassVar[str] = "linkage"
    summary: ClassVar[str] = "an encoder of representations distilled from a face recogniser links them to plain faces"
    cost: ClassVar[str] = "fit: teacher and student, minutes on two cores; link: hundreds of faces/s"
    reference: ClassVar[str] = (
        "Guo and Du, FaceLinkGen: Rethinking Identity Leakage in Privacy-Preserving Face Recognition with Identity "
        "Extraction, arXiv 2602.02914, 2026"
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC}
    )
    Options: ClassVar[type[AttackOptions]] = LinkageOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
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
    budgets: ClassVar[Mapping[str, str]] = {"steps": "steps"}
    options: LinkageOptions

    teacher: Encoder | OnnxEncoder
    student: Encoder
    reader: StateReader | None

    # -- building -----------------------------------------------------------------------------------

    def build(self, adversary: Adversary) -> None:
        """Build both encoders and the reader of states.

        Raises:
            ValueError: ``teacher`` is no ONNX recogniser.
        """
        options = self.options
        self.reader, places = None, None
        if options.infer_state:
            self.reader = StateReader()
            self.reader.prepare(_without_states(adversary), self.seed)
            places = None if self.reader.classifier is None else len(self.reader.classifier.bias)
        shape: dict[str, Any] = {"widths": options.widths, "blocks": options.blocks}
        if options.teacher is None:
            size = options.embedding_size
            self.teacher = Encoder((3, *adversary.faces.shape[2:]), **shape, embedding_size=size)
        else:
            self.teacher = OnnxEncoder(options.teacher, self.device)
            size = self.teacher.embedding_size
        self.student = Encoder(self.mechanism.representation_shape, **shape, embedding_size=size, places=places)
        self.to(memory_format=torch.channels_last)

    def _places(self, representations: Tensor) -> Tensor | None:
        """int64 (N, C): what each map of (N, C, h, w) is, as far as can be told; None where that never varies."""
        if self.reader is None or self.reader.classifier is None:
            return None
        return self.reader.places(self.reader.rows(representations, None))

    # -- training -----------------------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Train the teacher, where none is given, and then the student; some identities are held out for the curves.

        Raises:
            ValueError: too few identities to train and validate with; a black box without intercepted traffic where a
                secret is to be inferred; or a checkpoint of another fit.
            FloatingPointError: a loss is not finite.
        """
        options, fabric, seed = self.options, adversary.fabric, self.seed
        share = max(options.validation, 2 / len(torch.unique(adversary.identities)))
        training, held_out = split_identities(adversary.identities, share, derived(seed, "identities"))
        chosen = held_out[torch.randperm(len(held_out), generator=derived(seed, "validation"))[:_VALIDATION_FACES]]
        held = _HeldOut.of(at(adversary.faces, chosen).to(fabric.device), adversary.identities[chosen].cpu())
        details: dict[str, Any] = {}
        mechanism = None
        if self.reader is not None:
            details |= self.reader.fit(
                _without_states(adversary), seed, faces=options.state_faces, traffic=options.traffic
            )
            mechanism = self.reader.mechanism if self.reader.infers_secret else None
        exposure = Exposure(adversary, seed, mechanism=mechanism)
        trainer = Trainer(self.name, adversary, seed, training, options, self._images(len(training)))

        taught: Outcome | None = None
        if isinstance(self.teacher, Encoder):
            taught = self._teach(self.teacher, trainer, held)
        self.teacher.eval().requires_grad_(False)
        seen = SeenStates()
        learnt = self._distil(trainer, exposure, held, seen)
        return self._report(trainer, held, exposure, taught, learnt, seen, details)

    def _images(self, training: int) -> int:
        """What both trainings will see at most, for the progress."""
        steps = self.options.steps + (self.options.teacher_steps if self.options.teacher is None else 0)
        return steps * min(self.options.batch_size, training)

    def _teach(self, teacher: Encoder, trainer: Trainer, held: _HeldOut) -> Outcome:
        adversary, options = trainer.adversary, self.options
        names, classes = torch.unique(adversary.identities, return_inverse=True)
        trained, position = torch.unique(classes[trainer.training], return_inverse=True)
        if len(trained) < 2 or not held.verifiable:
            raise ValueError(
                f"linkage trains its teacher to tell people apart, and validates it on two others with several faces "
                f"each: the public faces show {len(names)} identities in {len(adversary.faces)} faces; give more, or a "
                f"teacher"
            )
        lookup = torch.zeros(len(adversary.faces), dtype=torch.int64)
        lookup[trainer.training.cpu()] = position.cpu()
        lookup = lookup.to(trainer.device)
        teacher.normalisation.measure((to_float(chunk), None) for _, chunk in trainer.statistics(adversary.faces))
        with seeded(trainer.seed, "centres"):
            softmax = MarginSoftmax(options.embedding_size, len(trained), scale=options.scale, margin=options.margin)
        module = _Classifier(teacher, softmax.to(trainer.device))

        def batch(faces: Tensor, index: Tensor, step: int) -> tuple[tuple[Any, ...], Tensor | None]:
            return (faces, lookup[index]), None

        def validate(module: nn.Module) -> float:
            assert isinstance(module, _Classifier)
            plain = _embed(lambda faces: _plain(module.encoder, faces), held.faces, trainer.fabric)
            return 1 - held.auc(plain, plain)

        return trainer.train(
            Training(
                "teacher",
                module,
                batch,
                validate,
                floor=_CHANCE,
                steps=options.teacher_steps,
                learning_rate=options.teacher_learning_rate,
                early_stop=False,
            )
        )

    def _distil(self, trainer: Trainer, exposure: Exposure, held: _HeldOut, met: SeenStates) -> Outcome:
        def seen(faces: Tensor, *name: str | int) -> tuple[Tensor, Tensor | None, Tensor | None]:
            protected = exposure.protect(faces, *name)
            return protected.representation, self._places(protected.representation), protected.state

        self.student.normalisation.measure(
            seen(to_float(chunk), "statistics", number)[:2]
            for number, chunk in trainer.statistics(trainer.adversary.faces)
        )
        targets = _embed(lambda faces: _plain(self.teacher, faces), held.faces, trainer.fabric)
        target_of = self._targets(trainer)
        countable = exposure.countable

        def batch(faces: Tensor, index: Tensor, step: int) -> tuple[tuple[Any, ...], Tensor | None]:
            target, maps = target_of(faces, index)
            representations, places, states = seen(faces, "protect", step)
            return (target, maps, representations, places), states if countable else None

        def validate(module: nn.Module) -> float:
            assert isinstance(module, _Distiller)
            found = self._intercepted(module.encoder, held.faces, exposure, trainer.fabric)
            return float(1 - (found * targets).sum(dim=1).mean())

        return trainer.train(
            Training(
                "student",
                _Distiller(self.student, self.options.hints),
                batch,
                validate,
                # Of the one embedding that is nearest to all of them.
                floor=float(1 - targets.mean(dim=0).norm()),
                steps=self.options.steps,
                learning_rate=self.options.learning_rate,
                early_stop=self.options.early_stop,
            ),
            met,
        )

    def _targets(self, trainer: Trainer) -> Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]:
        """Start the student near its teacher; returns what gives it, for faces varied and their numbers, its targets.

        These are unit embeddings (n, D) and, where hints are wanted, the maps behind the teacher's stages. A teacher
        trained here is asked about each face as it is varied. A published one knows a person however
        varied, and costs many times more: it is asked once for each public face as it is.
        """
        teacher = self.teacher
        if isinstance(teacher, Encoder):
            own, student = teacher, self.student
            student.start_from(own)
            # Maps of one place can be compared where both encoders look at pictures of one size.
            hints = self.options.hints > 0 and own.shape[1:] == student.shape[1:]

            @torch.no_grad()
            def ask(faces: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor]]:
                with trainer.fabric.autocast():
                    maps = own.stage_outputs(faces)[1:]
                    embeddings = own.read_out(maps[-1]) + own(faces.flip(-1))
                return functional.normalize(embeddings.float(), dim=1), maps if hints else []

            return ask
        faces = trainer.adversary.faces
        known = torch.zeros(len(faces), teacher.embedding_size, device=trainer.device)
        trained = at(faces, trainer.training).to(trainer.device)
        known[trainer.training.to(known.device)] = _embed(lambda some: _plain(teacher, some), trained, trainer.fabric)
        self.student.aim_at(known[trainer.training.to(known.device)])
        return lambda faces, index: (known[index], [])

    def _intercepted(self, student: Encoder, faces: Tensor, exposure: Exposure, fabric: Fabric) -> Tensor:
        """Unit embeddings of ``faces`` (uint8) protected under draws that are the same every time."""
        numbers = iter(range(len(faces)))

        def embed(batch: Tensor) -> Tensor:
            sent = exposure.protect(batch, "validate", next(numbers)).representation
            return functional.normalize(student(sent, self._places(sent)), dim=1)

        return _embed(embed, faces, fabric)

    def _report(
        self,
        trainer: Trainer,
        held: _HeldOut,
        exposure: Exposure,
        taught: Outcome | None,
        learnt: Outcome,
        seen: SeenStates,
        details: dict[str, Any],
    ) -> FitReport:
        plain = _embed(lambda faces: _plain(self.teacher, faces), held.faces, trainer.fabric)
        found = self._intercepted(self.student, held.faces, exposure, trainer.fabric)
        for name, one in (("teacher", plain), ("student", found)):
            details[f"{name}_accuracy"] = held.accuracy(one, plain) if held.verifiable else None
            details[f"{name}_auc"] = held.auc(one, plain) if held.verifiable else None
        if isinstance(self.teacher, OnnxEncoder):
            details["teacher"] = {"file": self.teacher.path.name, "sha256": bytes(self.teacher.digest.tolist()).hex()}
        if taught is not None:
            details |= {
                "teacher_steps": taught.steps,
                "teacher_curve": [list(point) for point in taught.curve],
                "teacher_saturated": taught.saturated,
            }
        return FitReport(
            # A student cannot be better than whom it imitates: both have to have learnt what there is to learn.
            saturated=learnt.saturated and (taught is None or taught.saturated),
            states_seen=seen.states,
            curve=learnt.curve,
            details={
                **learnt.details(),
                "parameters": sum(p.numel() for p in self.student.parameters()),
                "training_faces": len(trainer.training),
                "training_identities": len(torch.unique(trainer.adversary.identities[trainer.training])),
                "validation_faces": len(held.faces),
                "validation_pairs": [int(held.same.sum()), int((~held.same).sum())],
                "student_saturated": learnt.saturated,
                "stopped_early": learnt.steps < self.options.steps,
                "states_inferred": self.reader is not None and self.reader.classifier is not None,
                **details,
            },
        )

    # -- linking ------------------------------------------------------------------------------------

    def encode_representations(self, representations: Tensor) -> Tensor:
        """The student's embeddings."""
        return self._in_chunks(lambda batch: self.student(batch, self._places(batch)), representations)

    def encode_faces(self, faces: Tensor) -> Tensor:
        """The teacher's embeddings of faces and their mirror images, averaged."""
        return self._in_chunks(lambda batch: _plain(self.teacher, batch), faces)

    def _in_chunks(self, embed: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        device = self.student.normalisation.mean.device
        parts = [embed(chunk.to(device)).float().to(inputs.device) for chunk in chunks(inputs, _CHUNK)]
        return torch.cat(parts) if parts else torch.zeros(0, self.student.linear.out_features, device=inputs.device)


# -- pieces -------------------------------------------------------------------------------------------


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
        return torch.cat([embed(to_float(chunk)) for chunk in chunks(faces, _CHUNK)]).float()
