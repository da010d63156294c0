"""Linkage: what was intercepted is brought into the space of a face recogniser, there to be compared with plain faces.

Two ways lead there: recover a face and show it to the recogniser, or distil from the recogniser an encoder of
representations that answers as it does for the plain face.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import (
    Adversary,
    AttackOptions,
    Capability,
    FitReport,
    Knowledge,
    LinkageAttack,
    Names,
    Observation,
    ProtectionQuery,
    RecoveryAttack,
    Widths,
)
from attacks.parts.encoder import Encoder
from attacks.parts.exposure import Exposure, in_chunks, split_identities
from attacks.parts.states import ReaderOptions, StateReader
from attacks.parts.training import Trainer, Training, TrainingOptions
from bench import plugins
from bench.errors import UsageError
from bench.images import to_float
from bench.nets.augmentation import augment
from bench.nets.heads import CosFace
from bench.nets.onnx import OnnxEncoder
from bench.nets.options import AugmentationOptions
from bench.progress import no_report
from bench.randomness import derived, seeded
from defenses.base import Defense

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch

#: Faces that give the statistics of an encoder's input.
_STATISTICS_FACES = 1024
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: Of guessing, in 1 - AUC.
_CHANCE = 0.5
#: Ways to embed what was intercepted; a fitted attack stores the place of its own here.
_METHODS = ("recover", "distil", "fused")
#: What representations that are to be linked come without.
_UNSEEN = frozenset({Capability.STATE, Capability.KEY, Capability.TEMPLATES, Capability.SCORES})


class LinkageOptions(TrainingOptions, ReaderOptions):
    """Options of :class:`Linkage`, beside those of its trainings."""

    method: Literal["auto", "recover", "distil", "fused"] = Field(
        "auto",
        description="recover embeds recovered faces with the teacher, distil trains a student on representations to "
        "imitate it, fused adds both embeddings; auto keeps the one that tells held-out public people apart best.",
    )
    recovery: Names = Field(
        default=("linear", "unet"),
        description="Recovery attacks whose faces the teacher is shown: the first that applies to the defence.",
    )
    recovery_options: dict[str, Any] = Field(
        default={}, description="Options of these, each for those that have it (recovery_options.rank=200)."
    )
    recovery_preset: Literal["quick", "cpu", "gpu", "paper"] = Field(
        "cpu", description="Preset below these options; that of the run, where it has one."
    )
    room: float = Field(
        0.02,
        ge=-1,
        le=1,
        description="auto trains a student only where the accuracy on recovered faces of held-out people stays further "
        "than this below that on their plain faces; -1 always does.",
    )
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

    @model_validator(mode="after")
    def _recoveries_exist(self) -> Self:
        self.recoveries()
        return self

    def recoveries(self) -> list[RecoveryAttack]:
        """The recovery attacks by which faces may come back, none where there is a student alone.

        Raises:
            ValueError: an unknown name, an attack that recovers no faces, or options that do not suit them.
        """
        if self.method == "distil":
            return []
        try:
            kinds = [plugins.attacks().get(name) for name in self.recovery]
            if strange := [kind.name for kind in kinds if not issubclass(kind, RecoveryAttack)]:
                raise ValueError(f"recovery: {strange[0]} recovers no faces")
            known = {name for kind in kinds for name in kind.Options.model_fields}
            if unknown := sorted(set(self.recovery_options) - known):
                raise ValueError(
                    f"recovery_options: {', '.join(self.recovery)} have no {unknown[0]!r} "
                    f"(options: {', '.join(sorted(known))})"
                )
            made = []
            for kind in kinds:
                own = {name: v for name, v in self.recovery_options.items() if name in kind.Options.model_fields}
                made.append(kind(plugins.make_options(kind, own, self.recovery_preset, "recovery_options")))
        except UsageError as error:
            raise ValueError(str(error)) from None
        return [attack for attack in made if isinstance(attack, RecoveryAttack)]


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

    def figures(self, left: Tensor, right: Tensor) -> dict[str, float | None]:
        """Accuracy and AUC, None where there are no pairs, and the mean cosine of both sides of one face."""
        return {
            "accuracy": self.accuracy(left, right) if self.verifiable else None,
            "auc": self.auc(left, right) if self.verifiable else None,
            "cosine": float((left.cpu() * right.cpu()).sum(dim=1).mean()),
        }

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

    def forward(self, representations: Tensor, layout: Tensor | None, target: Tensor, *maps: Tensor) -> Tensor:
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
    """Representations z and plain faces X meet in the space of a teacher, a recogniser of the attacker's own.

    ``recover`` shows the teacher a recovered face, and its mirror image, in place of the plain one; any recovery attack
    that asks for representations alone will do, and combines several interceptions as it does. ``distil`` is embedding
    distillation (FaceLinkGen): a student minimises 1 - cos(student(z), teacher(X)) over public faces, each varied, then
    shown to the teacher as it is and protected afresh for the student. It starts from the weights of a teacher that was
    trained here, but for the first convolution where representations are no pictures. ``fused`` adds the two unit
    embeddings. ``auto`` compares what there is on public people whom no training has seen: recovered faces first, which
    cost least, then a student where these leave room, and both together.

    Under a black box these people are shown to the client in use: a guessed secret would tell nothing of what links.
    Where a defence permutes channels, the state is read off the representation, also at ``oracle``: interceptions that
    are to be linked come without their states.

    Attributes:
        recoveries: the recovery attacks asked for.
        chosen: int64 () buffer, the method in use, as its place among recover, distil and fused.
    """

    name = "linkage"
    summary = "a recogniser of recovered faces, or an encoder distilled from it, links representations to plain faces"
    cost = "fit: minutes where teacher or student are trained; link: tens of faces/s recovered, hundreds by the student"
    reference = (
        "Guo and Du, FaceLinkGen: Rethinking Identity Leakage in Privacy-Preserving Face Recognition with Identity "
        "Extraction, arXiv 2602.02914, 2026"
    )
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC})
    uses = frozenset({Capability.PROTECTION})
    opens = frozenset({"affine", "mixture", "permutation"})
    Options = LinkageOptions
    presets: ClassVar = {
        # Hundreds or a few thousand steps: higher rates and hints make the most of them.
        "quick": {
            "recovery_preset": "quick",
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
            "recovery_preset": "gpu",
            "batch_size": 256,
            "teacher_steps": 8000,
            "steps": 12_000,
            "learning_rate": 1e-3,
            "hints": 2.0,
            "early_stop": True,
        },
        # As published: a student alone, no state read off, no hints. Two epochs suffice of hundreds of thousands of
        # faces, not of fewer.
        "paper": {"method": "distil", "recovery_preset": "paper", "steps": 40_000, "infer_state": False},
    }
    budgets: ClassVar = {"steps": "steps"}
    options: LinkageOptions

    teacher: Encoder | OnnxEncoder
    student: Encoder
    reader: StateReader | None
    recoveries: nn.ModuleList
    chosen: Tensor

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__(options)
        self.recoveries = nn.ModuleList(self.options.recoveries())
        self._applicable: int | None = None
        self._reasons: list[str] = []
        self.needs = self.needs.union(*(attack.needs for attack in self.members))
        self.uses = self.uses.union(*(attack.uses for attack in self.members))

    def inapplicable(self, defense: Defense) -> str | None:
        """Recovered faces have to be had; a student can be trained on anything, and is where they are not asked for."""
        if self.options.method in ("auto", "distil"):
            return None
        place, reasons = self._first_applicable(defense)
        return f"{self.options.method} needs recovered faces; {'; '.join(reasons)}" if place is None else None

    def _first_applicable(self, defense: Defense) -> tuple[int | None, list[str]]:
        """The place of the first recovery attack that applies to ``defense``, and why those before it do not."""
        reasons: list[str] = []
        for place, attack in enumerate(self.recoveries):
            assert isinstance(attack, RecoveryAttack)
            unseen = sorted(attack.needs & _UNSEEN)
            reason = f"{' and '.join(unseen)} come with no representation to be linked" if unseen else None
            if reason is None and (reason := attack.inapplicable(defense)) is None:
                return place, reasons
            reasons.append(f"{attack.name}: {reason}")
        return None, reasons

    # -- building -----------------------------------------------------------------------------------

    def build(self, adversary: Adversary) -> None:
        """Build the recovery attack, both encoders and the reader of states."""
        options = self.options
        self._applicable, self._reasons = self._first_applicable(self.mechanism)
        if self.recovery is not None:
            training, _ = split_identities(
                adversary.identities, self._share_held_out(adversary), derived(self.seed, "identities")
            )
            self.recovery.prepare(_of_training(adversary, training))
        elif options.method in ("recover", "fused"):
            raise ValueError(f"{self.inapplicable(self.mechanism)}: use another recovery, or method=distil")
        self.register_buffer("chosen", torch.tensor(_METHODS.index("distil")))
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

    def _share_held_out(self, adversary: Adversary) -> float:
        """Of the identities: two at least, whose pairs can be told apart."""
        return max(self.options.validation, 2 / len(torch.unique(adversary.identities)))

    @property
    def recovery(self) -> RecoveryAttack | None:
        """The first recovery attack that applies to the defence; None where none does, or none is asked for."""
        if self._applicable is None:
            return None
        attack = self.recoveries[self._applicable]
        assert isinstance(attack, RecoveryAttack)
        return attack

    @property
    def method(self) -> str:
        """How a fitted attack embeds what was intercepted: recover, distil or fused."""
        return _METHODS[int(self.chosen)]

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
        """Train the teacher, where none is given, then learn to recover, to distil, or both; keep what links best.

        Some identities are held out, for the curves and for the choice.
        """
        options = self.options
        trainer = Trainer(self.name, adversary, self.seed, options, held_out=self._share_held_out(adversary))
        index = trainer.validation()
        held = _HeldOut.of(trainer.faces[index.to(trainer.device)], adversary.identities[index].cpu())
        details: dict[str, Any] = {}
        mechanism = None
        if self.reader is not None:
            details |= self.reader.fit(self.seed, options)
            mechanism = self.reader.mechanism if self.reader.infers_secret else None
        exposure = Exposure(adversary, self.seed, mechanism=mechanism, client=True)
        shown = exposure if adversary.knowledge is not Knowledge.BLACKBOX else adversary.client or exposure
        reports: dict[str, FitReport] = {}
        if isinstance(self.teacher, Encoder):
            reports["teacher"] = self._teach(self.teacher, trainer, held)
        self.teacher.eval().requires_grad_(False)
        plain = _embed(partial(_plain, self.teacher), held.faces, trainer.fabric)
        ceiling = held.figures(plain, plain)

        embedded: dict[str, Tensor] = {}
        methods: dict[str, dict[str, Any]] = {name: {} for name in _METHODS}
        if self.recovery is not None:
            reports["recover"] = self.recovery.learn(_of_training(adversary, trainer.training))
            embedded["recover"] = self._intercepted(self._recovered, held.faces, shown)
            methods["recover"] = {"recovery": self.recovery.name, **held.figures(embedded["recover"], plain)}
        elif self._reasons:
            methods["recover"]["not_applicable"] = "; ".join(self._reasons)
        short = (ceiling["accuracy"] or 0.0) - (methods["recover"].get("accuracy") or 0.0)
        if options.method == "auto" and held.verifiable and "recover" in embedded and short <= options.room:
            methods["distil"]["skipped"] = f"recovered faces come within {options.room:g} of plain ones"
        elif options.method != "recover":
            reports["distil"] = self._distil(trainer, exposure, held)
            embed = partial(self._encoded, self.student)
            with trainer.fabric.autocast():
                embedded["distil"] = self._intercepted(embed, held.faces, shown)
            methods["distil"] = held.figures(embedded["distil"], plain)
        if len(embedded) == 2:
            embedded["fused"] = functional.normalize(embedded["recover"] + embedded["distil"], dim=1)
            methods["fused"] = held.figures(embedded["fused"], plain)
        best = max(embedded, key=lambda name: (methods[name]["auc"] or 0.0, methods[name]["cosine"]))
        chosen = best if options.method == "auto" else options.method
        self.chosen.fill_(_METHODS.index(chosen))

        if isinstance(self.teacher, OnnxEncoder):
            details["teacher"] = {"file": self.teacher.path.name, "sha256": self.teacher.sha256}
        if "teacher" in reports:
            details |= {
                "teacher_steps": reports["teacher"].details["steps"],
                "teacher_curve": [list(point) for point in reports["teacher"].curve],
                "teacher_saturated": reports["teacher"].saturated,
            }
        if "recover" in reports:
            details |= {f"recovery_{name}": value for name, value in reports["recover"].details.items()}
        if "distil" in reports:
            learnt = reports["distil"]
            details |= learnt.details | {
                "student_saturated": learnt.saturated,
                "stopped_early": learnt.details["steps"] < options.steps,
            }
        details |= {
            "method": chosen,
            "methods": {name: figures for name, figures in methods.items() if figures},
            **{f"teacher_{name}": value for name, value in ceiling.items() if name != "cosine"},
            "validation_faces": len(index),
            "training_identities": len(torch.unique(adversary.identities[trainer.training])),
            "validation_pairs": [int(held.same.sum()), int((~held.same).sum())],
            "states_inferred": self.reader is not None and self.reader.width is not None,
        }
        used = {name: report for name, report in reports.items() if name in ("teacher", chosen) or chosen == "fused"}
        # What is linked cannot be better than the teacher: all that is used has to have learnt what there is to learn.
        rested = [report.saturated for report in used.values() if report.saturated is not None]
        embedders = [report for name, report in used.items() if name != "teacher"]
        return FitReport(
            saturated=all(rested) if rested else None,
            states_seen=_seen_by_all([report.states_seen for report in embedders]),
            states_read=min(
                (report.states_read for report in embedders if report.states_read is not None), default=None
            ),
            curve=embedders[-1].curve,
            details=details,
        )

    def _train(
        self,
        trainer: Trainer,
        name: str,
        module: _Classifier | _Distiller,
        inputs: Callable[[Tensor, Tensor, int], tuple[Tensor | None, ...]],
        **more: Any,
    ) -> FitReport:
        """Train ``module``, called ``name``, whose output is the loss, on varied faces.

        ``inputs(faces, index, step)`` are its arguments for faces (n, 3, H, W) in [0, 1] that are the public ones at
        ``index``; ``more`` is of :class:`Training`.
        """
        options = self.options
        model = trainer.fabric.setup_module(module)

        def drawn(step: int) -> tuple[Tensor | None, ...]:
            index = trainer.batch(step, name).to(trainer.device)
            draws = derived(self.seed, name, "vary", step)
            faces = augment(trainer.floats(index), variation(options.augmentation), draws)
            return inputs(faces, index, step)

        optimizer = partial(torch.optim.AdamW, weight_decay=options.weight_decay)
        cut = (module.encoder, "stage_outputs")
        return trainer.train(
            Training(name=name, network=module, loss=model, inputs=drawn, optimizer=optimizer, cut=cut, **more)
        )

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

        def inputs(faces: Tensor, index: Tensor, step: int) -> tuple[Tensor | None, ...]:
            target, maps = target_of(faces, index)
            representations, layout, states = seen(faces, "protect", step)
            trainer.note(states if countable else None)
            return representations, layout, target, *maps

        def validate(module: nn.Module) -> float:
            assert isinstance(module, _Distiller)
            with trainer.fabric.autocast():
                intercepted = self._intercepted(partial(self._encoded, module.encoder), held.faces, exposure)
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

    @torch.no_grad()
    def _intercepted(
        self, embed: Callable[[Tensor], Tensor], faces: Tensor, shown: Exposure | ProtectionQuery
    ) -> Tensor:
        """``embed`` (N, D) of ``faces`` (uint8) protected once; an exposure draws the same every time."""
        numbers = itertools.count()

        def protect(batch: Tensor) -> Tensor:
            if isinstance(shown, Exposure):
                return shown.protect(batch, "validate", next(numbers)).representation
            return shown(batch)

        return in_chunks(lambda batch: embed(protect(to_float(batch))[:, None]), faces, _CHUNK).float()

    def _recovered(self, representations: Tensor) -> Tensor:
        """The teacher's unit embeddings (N, D) of the faces recovered from (N, k, C, h, w)."""
        assert self.recovery is not None
        return _plain(self.teacher, self.recovery.recover(Observation(representations)).to(self.device))

    def _encoded(self, student: nn.Module, representations: Tensor) -> Tensor:
        """The mean (N, D) of the student's unit embeddings of each of (N, k, C, h, w)."""
        sent = representations.flatten(0, 1).to(self.device)
        embeddings = functional.normalize(student(sent, self._layout(sent)).float(), dim=1)
        return functional.normalize(embeddings.unflatten(0, representations.shape[:2]).mean(dim=1), dim=1)

    # -- linking ------------------------------------------------------------------------------------

    def encode_interceptions(self, representations: Tensor) -> Tensor:
        """By the method in use: of the recovered faces, by the student, or the sum of both."""

        def encode(part: Tensor) -> Tensor:
            ways = [self._recovered(part)] if self.method != "distil" else []
            ways += [self._encoded(self.student, part)] if self.method != "recover" else []
            return torch.stack(ways).sum(dim=0)

        return in_chunks(encode, representations).float()

    def encode_representations(self, representations: Tensor) -> Tensor:
        """As of faces intercepted once."""
        return self.encode_interceptions(representations[:, None])

    def encode_faces(self, faces: Tensor) -> Tensor:
        """The teacher's embeddings of faces and their mirror images, averaged."""
        return in_chunks(lambda part: _plain(self.teacher, part.to(self.device)), faces)


def _seen_by_all(seen: Sequence[Tensor | None]) -> Tensor | None:
    """The states that all parts of an attack were trained on, int64 (K, D); None where one has none to cover."""
    known = [{tuple(state) for state in states.tolist()} for states in seen if states is not None]
    if len(known) < len(seen):
        return None
    return torch.tensor(sorted(set.intersection(*known)), dtype=torch.int64)


def _of_training(adversary: Adversary, training: Tensor) -> Adversary:
    """Whom a recovery attack is fitted for: the public faces at ``training`` alone, and no states."""
    return replace(
        _without_states(adversary),
        faces=adversary.faces[training.to(adversary.faces.device)],
        identities=adversary.identities[training],
        checkpoint=adversary.checkpoint and adversary.checkpoint / "recovery",
        report=no_report,
    )


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
