"""The stages of a run, each cached under its resolved options, the versions of its inputs and of its code."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor

import defenses as defenses_package
from bench import plugins
from bench.cache import StageCache, make_key
from bench.config import RunConfig
from bench.data.faceset import FaceSet, Source, to_float
from bench.data.loaders import load
from bench.data.splits import Splits, split
from bench.errors import BenchError, UsageError
from bench.files import write_text
from bench.metrics.evaluator import Evaluator, OnnxEvaluator, RecogniserEvaluator
from bench.metrics.verification import pair_scores
from bench.progress import ProgressBars, Report
from bench.randomness import Streams
from bench.recognition.checkpoint import load_recogniser, save_recogniser
from bench.recognition.options import TrainingOptions
from bench.recognition.recogniser import Recogniser, build_recogniser
from bench.recognition.training import TrainingReport, train
from bench.recognition.verification import embed_faces
from bench.team import Team, TrainingOrder
from defenses.base import Defense

T = TypeVar("T")
Log = Callable[..., None]

# Code that a kind of stage depends on: a change in it makes the stage anew.
DATA_CODE = ("bench.data",)
DEFENSE_CODE = tuple(f"defenses.{module}" for module in sorted(defenses_package.SUPPORT_MODULES))
RECOGNITION_CODE = ("bench.recognition", *DEFENSE_CODE, *DATA_CODE)


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """One stage: how it is called and keyed, how it is made in a folder and read back from it."""

    stage: str
    key: str
    what: str
    make: Callable[[Path, Report], None]
    read: Callable[[Path], T]


class Stages:
    """Makes, stores and reloads what the stages of one run produce.

    Args:
        config: the resolved configuration.
        fabric: device and precision.
        cache: where finished stages lie.
        bars: progress.
        log: called as ``log(event, **fields)``.
        team: processes that help to train recognisers, if there are any.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        fabric: Fabric,
        cache: StageCache,
        bars: ProgressBars,
        log: Log,
        team: Team | None = None,
    ) -> None:
        self.config = config
        self.team = team
        self.fabric = fabric
        self.cache = cache
        self.bars = bars
        self.log = log
        self.streams = Streams(config.seed)
        self.seconds: dict[str, float] = {}
        self.cached: list[str] = []
        self._results: dict[tuple[str, str], Any] = {}

    # -- data ------------------------------------------------------------------------------------

    @functools.cached_property
    def data_key(self) -> str:
        """Key of the data: what was asked for and, for data on disk, what lies there."""
        config = self.config
        return make_key(
            {
                "dataset": config.dataset,
                "options": config.dataset_options,
                "image_size": config.image_size,
                "seed": self.streams.seed_for("data"),
                "files": _fingerprint(config.data_root) if config.dataset != "synthetic" else None,
            },
            DATA_CODE,
        )

    @functools.cached_property
    def source(self) -> Source:
        """The decoded faces. Rendered ones are stored; files on disk are quick to decode again."""
        if self.config.dataset != "synthetic":
            with self.timed("data"), self.bars.task("decode faces") as report:
                return self.load_source(report)
        return self.do(Job("data", self.data_key, "render faces", self._make_source, _read_source))

    def load_source(self, report: Report) -> Source:
        config = self.config
        return load(
            config.dataset,
            data_root=config.data_root,
            image_size=config.image_size,
            seed=self.streams.seed_for("data"),
            options=config.dataset_options,
            report=report,
        )

    def _make_source(self, folder: Path, report: Report) -> None:
        _write_source(folder, self.load_source(report))

    @functools.cached_property
    def splits(self) -> Splits:
        """Identity-disjoint provider, public, evaluator and victim faces."""
        shares = self.config.shares.model_dump()
        if self.config.evaluator is not None:
            # Nothing is trained to judge: the others share out that part in proportion.
            spare = shares.pop("evaluator")
            shares = {name: share / (1 - spare) for name, share in shares.items()} | {"evaluator": 0.0}
        return split(self.source, **shares, generator=self.streams.generator("split"))

    # -- defence ---------------------------------------------------------------------------------

    def defense(self, name: str, options: Mapping[str, Any]) -> Defense:
        """The defence, on the device, fitted where it is trainable."""
        defense = plugins.make_defense(name, dict(options), self.config.preset, self.config.image_size)
        if defense.trainable:
            faces = self.splits.provider

            def make(folder: Path, report: Report) -> None:
                with failing_as(f"defence {name}"):
                    defense.fit(to_float(faces.images), faces.labels, self.streams.generator("defense"))
                save_tensors(defense.state_dict(), folder / "defense.safetensors")

            def read(folder: Path) -> Defense:
                defense.load_state_dict(load_file(folder / "defense.safetensors"))
                return defense

            self.do(Job("defense", self.defense_key(defense), f"fit {name}", make, read))
        return defense.to(self.fabric.device)

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
                "data": self.data_key,
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

    def _faces(self, role: str) -> FaceSet:
        faces = self.splits.provider if role == "provider" else self.splits.evaluator
        if faces is None:
            raise UsageError("the evaluator has no identities to train on: give shares.evaluator or --evaluator")
        return faces

    def _training(self, role: str) -> TrainingOptions:
        """The evaluator judges: it never learns from labels that are wrong on purpose."""
        training = self.config.training
        return training if role == "provider" else training.model_copy(update={"label_noise": 0.0})

    def _train(
        self, defense: Defense, role: str, faces: FaceSet, folder: Path, report: Report
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

        key = make_key({"recogniser": self.recogniser_key(defense, "provider")}, ("bench.metrics",))
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

    # -- how stages are kept ---------------------------------------------------------------------

    def platform(self) -> dict[str, str]:
        """What else decides the figures of a stage that computes with torch."""
        return {"torch": torch.__version__, "device": self.fabric.device.type}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Charge the block to ``stage``, without the stages that it asks for."""
        started = time.perf_counter()
        nested = sum(self.seconds.values())
        try:
            yield
        finally:
            # Verifying, for one, is not charged for training the recogniser.
            inner = sum(self.seconds.values()) - nested
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started - inner

    def assume(self, job: Job[T], value: T) -> None:
        """Take ``value`` for the result of a stage, in this run only; nothing is stored."""
        self._results[job.stage, job.key] = value

    def do(self, job: Job[T]) -> T:
        """Make the stage unless it is there, and read it back.

        It is read back in either case, so that a fresh result and a cached one cannot differ. Asked for again in the
        same run, it is the same object: not read twice, and not counted as reused.
        """
        if (job.stage, job.key) not in self._results:
            with self.timed(job.stage), self.cache.entry(job.stage, job.key) as entry:
                if entry.complete:
                    self.cached.append(job.stage)
                    self.log("cached", stage=job.stage, key=job.key)
                else:
                    self.log("stage", stage=job.stage, key=job.key)
                    with self.bars.task(job.what) as report:
                        job.make(entry.partial, report)
            self._results[job.stage, job.key] = job.read(entry.path)
        result: T = self._results[job.stage, job.key]
        return result


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


def _fingerprint(root: Path | None) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file: cheap, and changes when the data does."""
    if root is None:
        return []
    files: Sequence[Path] = sorted(root.rglob("*")) if root.is_dir() else [root]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_source(folder: Path, source: Source) -> None:
    if source.victims is not None or source.pairs is not None:
        raise TypeError("only a source without a verification set of its own is stored")
    save_tensors({"images": source.faces.images, "labels": source.faces.labels}, folder / "faces.safetensors")
    head = {
        "name": source.name,
        "names": source.faces.names,
        "synthetic": source.synthetic,
        "details": source.details,
    }
    write_text(folder / "faces.json", json.dumps(head))


def _read_source(folder: Path) -> Source:
    tensors = load_file(folder / "faces.safetensors")
    head = json.loads((folder / "faces.json").read_text(encoding="utf-8"))
    faces = FaceSet(tensors["images"], tensors["labels"], tuple(head["names"]))
    return Source(head["name"], faces, synthetic=head["synthetic"], details=head["details"])
