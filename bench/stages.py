"""The stages of a run, each cached under its resolved options, the versions of its inputs and of its code."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import defenses as defenses_package
from bench import plugins
from bench.cache import make_key
from bench.data.faceset import FaceSet, to_float
from bench.data.nested import whole_identities
from bench.data.stream.view import IdentityView
from bench.data_stages import DATA_CODE, DataStages, Job, save_tensors
from bench.errors import BenchError, UsageError
from bench.metrics.evaluator import Evaluator, OnnxEvaluator, RecogniserEvaluator
from bench.metrics.verification import pair_scores
from bench.progress import Report
from bench.recognition.checkpoint import load_recogniser, save_recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.recogniser import Recogniser, build_recogniser
from bench.recognition.training import TrainingReport, train
from bench.recognition.verification import embed_faces
from bench.team import TrainingOrder
from defenses.base import Defense

# Code that a kind of stage depends on: a change in it makes the stage anew.
DEFENSE_CODE = tuple(f"defenses.{module}" for module in sorted(defenses_package.SUPPORT_MODULES))
RECOGNITION_CODE = ("bench.recognition", *DEFENSE_CODE, *DATA_CODE)


class Stages(DataStages):
    """What the provider makes of its data, and the judge; see :class:`bench.data_stages.DataStages` for the rest."""

    # -- defence ---------------------------------------------------------------------------------

    def defense(self, name: str, options: Mapping[str, Any]) -> Defense:
        """The defence, on the device, fitted where it is trainable."""
        defense = plugins.make_defense(name, dict(options), self.config.preset, self.config.image_size)
        if defense.trainable:

            def make(folder: Path, report: Report) -> None:
                faces = self._provider_in_memory()
                with failing_as(f"defence {name}"):
                    defense.fit(to_float(faces.images), faces.labels, self.streams.generator("defense"))
                save_tensors(defense.state_dict(), folder / "defense.safetensors")

            def read(folder: Path) -> Defense:
                defense.load_state_dict(load_file(folder / "defense.safetensors"))
                return defense

            self.do(Job("defense", self.defense_key(defense), f"fit {name}", make, read))
        return defense.to(self.fabric.device)

    def _provider_in_memory(self) -> FaceSet:
        """The provider's faces, of streamed ones as many as may be held, for a defence that is fitted to them."""
        faces = self.splits.provider
        if isinstance(faces, FaceSet):
            return faces
        return whole_identities(faces, self.config.stream_images, self.streams.generator("defense/faces")).load()

    def defense_key(self, defense: Defense) -> str:
        """Key of the defence, as it is fitted."""
        return make_key(
            {
                "data": self.data_key if defense.trainable else None,
                "shares": self.config.shares if defense.trainable else None,
                "seed": self.config.seed if defense.trainable else None,
                "defense": {"name": defense.name, "options": defense.options.model_dump(mode="json")},
                "image_size": self.config.image_size,
            },
            (*DEFENSE_CODE, type(defense).__module__),
        )

    # -- recognition -----------------------------------------------------------------------------

    def recogniser_key(self, defense: Defense, role: str) -> str:
        """Key of the recogniser of the provider or the evaluator."""
        config = self.config
        backbone = config.backbone if role == "provider" else config.evaluator_backbone
        return make_key(
            {
                "role": role,
                "data": self.faces_key,
                "shares": config.shares,
                "evaluator_file": config.evaluator is not None,
                "defense": self.defense_key(defense),
                "backbone": backbone,
                "training": self._training(role).model_dump(mode="json"),
                "seed": config.seed,
                **self.platform(),
            },
            RECOGNITION_CODE,
        )

    def recogniser(self, defense: Defense, role: str = "provider") -> Recogniser:
        """A recogniser trained on representations of the provider's (or the evaluator's) faces."""
        return self.do(self.recogniser_job(defense, role))

    def recogniser_job(self, defense: Defense, role: str) -> Job[Recogniser]:
        """The stage that trains a recogniser."""
        faces = self._faces(role)

        def make(folder: Path, report: Report) -> None:
            if self.team is not None:
                state = {name: tensor.cpu() for name, tensor in defense.state_dict().items()}
                options = defense.options.model_dump(mode="json")
                self.team.call(TrainingOrder(defense.name, options, state, role, folder))
            recogniser, outcome = self._train(defense, role, faces, folder, report)
            save_recogniser(recogniser, folder / "recogniser.safetensors", asdict(outcome))
            shutil.rmtree(folder / "resume", ignore_errors=True)

        def read(folder: Path) -> Recogniser:
            recogniser, _ = load_recogniser(folder / "recogniser.safetensors", self.fabric.device)
            return recogniser

        key = self.recogniser_key(defense, role)
        what = f"train {role} recogniser on {defense.name}"
        return Job(f"recogniser-{role}-{defense.name}", key, what, make, read)

    def train_along(self, order: TrainingOrder) -> None:
        """Do this process's part of a training that the first one of the team makes."""
        defense = plugins.make_defense(order.defense, dict(order.options), self.config.preset, self.config.image_size)
        defense.load_state_dict(dict(order.state))
        self._train(defense, order.role, self._faces(order.role), order.folder, lambda *_, **__: None)

    def _faces(self, role: str) -> FaceSet | IdentityView:
        faces = self.splits.provider if role == "provider" else self.splits.evaluator
        if faces is None:
            raise UsageError("the evaluator has no identities to train on: give shares.evaluator or --evaluator")
        return faces

    def _training(self, role: str) -> TrainingOptions:
        """The evaluator judges: it never learns from labels that are wrong on purpose."""
        training = self.config.training
        return training if role == "provider" else training.model_copy(update={"label_noise": 0.0})

    def _train(
        self, defense: Defense, role: str, faces: FaceSet | IdentityView, folder: Path, report: Report
    ) -> tuple[Recogniser, TrainingReport]:
        config, options = self.config, self._training(role)
        seed = self.streams.seed_for(f"training/{role}")
        recogniser = build_recogniser(
            config.backbone if role == "provider" else config.evaluator_backbone,
            defense.representation_shape,
            options.embedding_size,
            dropout=options.dropout,
            seed=seed,
        )
        if self.team is not None:
            self.team.meet()
        fabric = self.fabric if self.team is None else self.team.fabric
        outcome = train(
            recogniser, faces, defense, options, fabric=fabric, seed=seed, checkpoint=folder / "resume", report=report
        )
        return recogniser, outcome

    def verification_scores(self, defense: Defense) -> Tensor:
        """Cosine per pair of the victims' protocol, each image protected under one random state: (P,)."""

        def make(folder: Path, report: Report) -> None:
            embeddings = embed_faces(
                self.recogniser(defense),
                defense,
                self.splits.victims,
                generator=self.streams.generator("queries"),
                batch_size=self.config.batch_size,
                fabric=self.fabric,
            )
            scores = pair_scores(embeddings, self.splits.pairs)
            save_tensors({"scores": scores}, folder / "scores.safetensors")

        def read(folder: Path) -> Tensor:
            return load_file(folder / "scores.safetensors")["scores"]

        content = {"recogniser": self.recogniser_key(defense, "provider"), "data": self.data_key}
        key = make_key(content, ("bench.metrics",))
        return self.do(Job(f"verify-{defense.name}", key, f"verify on {defense.name}", make, read))

    # -- evaluator -------------------------------------------------------------------------------

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The recogniser that judges identity leakage; neither defence nor attack ever sees it."""
        if self.config.evaluator is not None:
            return OnnxEvaluator(self.config.evaluator, device=self.fabric.device)
        recogniser = self.recogniser(self._plain(), "evaluator")
        size = (self.config.image_size, self.config.image_size)
        return RecogniserEvaluator(recogniser, f"trained {self.config.evaluator_backbone}", size, self.fabric.device)

    def _plain(self) -> Defense:
        return plugins.make_defense("none", {}, self.config.preset, self.config.image_size)

    def plain_embeddings(self) -> Tensor:
        """The evaluator's embeddings of all plain victim faces, unit rows: float32 (N, D)."""
        evaluator = self.evaluator

        def make(folder: Path, report: Report) -> None:
            faces = self.splits.victims
            embeddings: list[Tensor] = []
            for batch in faces.batches(self.config.batch_size):
                embeddings.append(evaluator.embed(batch.to(self.fabric.device)).cpu())
                report(sum(len(e) for e in embeddings), len(faces))
            save_tensors({"embeddings": torch.cat(embeddings)}, folder / "embeddings.safetensors")

        def read(folder: Path) -> Tensor:
            return load_file(folder / "embeddings.safetensors")["embeddings"]

        key = make_key(
            {
                "data": self.data_key,
                "shares": self.config.shares,
                "seed": self.config.seed,
                "evaluator": evaluator.describe(),
                "recogniser": None if self.config.evaluator else self.recogniser_key(self._plain(), "evaluator"),
                **self.platform(),
            },
            ("bench.metrics.evaluator",),
        )
        return self.do(Job("evaluate", key, f"embed victims with {evaluator.name}", make, read))


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Name the plug-in in the one line that the person sees when it gives up.

    Plug-ins know nothing of the harness: they say what is wrong with ``ValueError`` (input, options) and
    ``ArithmeticError`` (a loss that is not finite).
    """
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise BenchError(f"{what}: {error}") from error
