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

import attacks as attacks_package
import defenses as defenses_package
from attacks.base import (
    GRANTS,
    OF_RECOGNISER,
    Adversary,
    Attack,
    Capability,
    FitReport,
    Knowledge,
    Observation,
    RecoveryAttack,
    Traffic,
    no_report,
)
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
from bench.probes import Probes, select_probes
from bench.progress import ProgressBars, Report
from bench.randomness import Streams
from bench.recognition.checkpoint import load_recogniser, save_recogniser
from bench.recognition.recogniser import Recogniser, build_recogniser
from bench.recognition.training import train
from bench.recognition.verification import embed_faces
from bench.service import Enrolment, Service, class_centres, traffic
from defenses.base import Defense

T = TypeVar("T")
Log = Callable[..., None]

# Code that a kind of stage depends on: a change in it makes the stage anew.
DATA_CODE = ("bench.data",)
DEFENSE_CODE = tuple(f"defenses.{module}" for module in sorted(defenses_package.SUPPORT_MODULES))
ATTACK_CODE = tuple(f"attacks.{module}" for module in sorted(attacks_package.SUPPORT_MODULES))
RECOGNITION_CODE = ("bench.recognition", *DEFENSE_CODE, *DATA_CODE)

#: Representation values intercepted at once: 256 MiB of them.
REPRESENTATION_VALUES = 2**28 // 4


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
    """

    def __init__(self, config: RunConfig, *, fabric: Fabric, cache: StageCache, bars: ProgressBars, log: Log) -> None:
        self.config = config
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
            with self._timed("data"), self.bars.task("decode faces") as report:
                return self.load_source(report)
        return self._do(Job("data", self.data_key, "render faces", self._make_source, _read_source))

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
                _save_tensors(defense.state_dict(), folder / "defense.safetensors")

            def read(folder: Path) -> Defense:
                defense.load_state_dict(load_file(folder / "defense.safetensors"))
                return defense

            self._do(Job("defense", self._defense_key(defense), f"fit {name}", make, read))
        return defense.to(self.fabric.device)

    def _defense_key(self, defense: Defense) -> str:
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

    def _recogniser_key(self, defense: Defense, role: str, backbone: str) -> str:
        config = self.config
        return make_key(
            {
                "role": role,
                "data": self.data_key,
                "shares": config.shares,
                "evaluator_file": config.evaluator is not None,
                "defense": self._defense_key(defense),
                "backbone": backbone,
                "training": config.training.model_dump(mode="json"),
                "seed": config.seed,
                **self._platform(),
            },
            RECOGNITION_CODE,
        )

    def recogniser(self, defense: Defense, role: str = "provider") -> Recogniser:
        """A recogniser trained on representations of the provider's (or the evaluator's) faces."""
        return self._do(self.recogniser_job(defense, role))

    def recogniser_job(self, defense: Defense, role: str) -> Job[Recogniser]:
        """The stage that trains a recogniser."""
        config = self.config
        backbone = config.backbone if role == "provider" else config.evaluator_backbone
        faces = self.splits.provider if role == "provider" else self.splits.evaluator
        if faces is None:
            raise UsageError("the evaluator has no identities to train on: give shares.evaluator or --evaluator")

        def make(folder: Path, report: Report) -> None:
            seed = self.streams.seed_for(f"training/{role}")
            recogniser = build_recogniser(
                backbone,
                defense.representation_shape,
                config.training.embedding_size,
                dropout=config.training.dropout,
                seed=seed,
            )
            outcome = train(
                recogniser,
                faces,
                defense,
                config.training,
                fabric=self.fabric,
                seed=seed,
                checkpoint=folder / "resume",
                report=report,
            )
            save_recogniser(recogniser, folder / "recogniser.safetensors", asdict(outcome))
            shutil.rmtree(folder / "resume", ignore_errors=True)

        def read(folder: Path) -> Recogniser:
            recogniser, _ = load_recogniser(folder / "recogniser.safetensors", self.fabric.device)
            return recogniser

        key = self._recogniser_key(defense, role, backbone)
        what = f"train {role} recogniser on {defense.name}"
        return Job(f"recogniser-{role}-{defense.name}", key, what, make, read)

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
            _save_tensors({"scores": scores}, folder / "scores.safetensors")

        def read(folder: Path) -> Tensor:
            return load_file(folder / "scores.safetensors")["scores"]

        key = make_key(
            {"recogniser": self._recogniser_key(defense, "provider", self.config.backbone)}, ("bench.metrics",)
        )
        return self._do(Job(f"verify-{defense.name}", key, f"verify on {defense.name}", make, read))

    # -- evaluator -------------------------------------------------------------------------------

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The recogniser that judges identity leakage; neither defence nor attack ever sees it."""
        if self.config.evaluator is not None:
            return OnnxEvaluator(self.config.evaluator, device=self.fabric.device)
        defense, role, _ = self._evaluator_training()
        recogniser = self.recogniser(defense, role)
        size = (self.config.image_size, self.config.image_size)
        return RecogniserEvaluator(recogniser, f"trained {self.config.evaluator_backbone}", size, self.fabric.device)

    def _evaluator_training(self) -> tuple[Defense, str, str]:
        plain = plugins.make_defense("none", {}, self.config.preset, self.config.image_size)
        return plain, "evaluator", self.config.evaluator_backbone

    def plain_embeddings(self) -> Tensor:
        """The evaluator's embeddings of all plain victim faces, unit rows: float32 (N, D)."""
        evaluator = self.evaluator

        def make(folder: Path, report: Report) -> None:
            faces = self.splits.victims
            embeddings: list[Tensor] = []
            for batch in faces.batches(self.config.batch_size):
                embeddings.append(evaluator.embed(batch.to(self.fabric.device)).cpu())
                report(sum(len(e) for e in embeddings), len(faces))
            _save_tensors({"embeddings": torch.cat(embeddings)}, folder / "embeddings.safetensors")

        def read(folder: Path) -> Tensor:
            return load_file(folder / "embeddings.safetensors")["embeddings"]

        key = make_key(
            {
                "data": self.data_key,
                "shares": self.config.shares,
                "seed": self.config.seed,
                "evaluator": evaluator.describe(),
                "recogniser": None if self.config.evaluator else self._recogniser_key(*self._evaluator_training()),
                **self._platform(),
            },
            ("bench.metrics.evaluator",),
        )
        return self._do(Job("evaluate", key, f"embed victims with {evaluator.name}", make, read))

    # -- attack ----------------------------------------------------------------------------------

    def adversary(self, attack: Attack, defense: Defense, checkpoint: Path | None, report: Report) -> Adversary:
        """What the chosen rung hands to the attack, and nothing else."""
        knowledge = Knowledge(self.config.knowledge)
        public = self.splits.public
        service = self.service(defense, "fit") if Capability.EMBEDDINGS in attack.needs else None
        return Adversary(
            faces=public.images,
            identities=public.labels,
            knowledge=knowledge,
            mechanism=defense.guess if knowledge is Knowledge.BLACKBOX else lambda generator: defense,
            generator=self.streams.generator("attack"),
            fabric=self.fabric,
            recogniser=self.recogniser(defense) if Capability.RECOGNISER in attack.needs else None,
            embed=service.embed if service else None,
            traffic=self._traffic(defense) if Capability.TRAFFIC in attack.needs else None,
            checkpoint=checkpoint,
            report=report,
        )

    def service(self, defense: Defense, purpose: str) -> Service:
        """The provider's service, whose clients draw their states from a stream of the ``purpose``'s own."""
        generator = self.streams.generator(f"service/{purpose}")
        return Service(self.recogniser(defense), defense, generator, batch_size=self.config.batch_size)

    def _traffic(self, defense: Defense) -> Traffic:
        def intercept(count: int) -> Iterator[Tensor]:
            return traffic(
                defense,
                self.splits.victims,
                self.selection.attacked,
                self.streams.generator("traffic"),
                count=count,
                batch_size=self.config.batch_size,
                device=self.fabric.device,
            )

        return intercept

    @functools.cached_property
    def selection(self) -> Probes:
        """Which victim images are attacked, and which are the plain gallery."""
        return select_probes(self.splits.victims, self.config.probes, self.streams.generator("probes"))

    def _attack_key(self, attack: Attack, defense: Defense) -> str:
        config = self.config
        needs_recogniser = bool(attack.needs & OF_RECOGNISER)
        return make_key(
            {
                "data": self.data_key,
                "shares": config.shares,
                "evaluator_file": config.evaluator is not None,
                "defense": self._defense_key(defense),
                "attack": {"name": attack.name, "options": attack.options.model_dump(mode="json")},
                "knowledge": config.knowledge,
                "probes": config.probes if Capability.TRAFFIC in attack.needs else None,
                "recogniser": self._recogniser_key(defense, "provider", config.backbone) if needs_recogniser else None,
                "seed": config.seed,
                **self._platform(),
            },
            (*ATTACK_CODE, type(attack).__module__, *DEFENSE_CODE, *DATA_CODE, "bench.service"),
        )

    def fitted_attack(self, defense: Defense) -> tuple[Attack, FitReport]:
        """The attack, fitted against ``defense`` on the attacker's public faces."""
        return self._do(self.attack_job(defense))

    def attack_job(self, defense: Defense) -> Job[tuple[Attack, FitReport]]:
        """The stage that fits the attack."""
        attack = plugins.make_attack(self.config.attack, self.config.attack_options, self.config.preset)

        def make(folder: Path, report: Report) -> None:
            torch.manual_seed(self.streams.seed_for("attack"))
            fitted = plugins.make_attack(self.config.attack, self.config.attack_options, self.config.preset)
            adversary = self.adversary(fitted, defense, folder / "resume", report)
            with failing_as(f"attack {fitted.name} on {defense.name}"):
                outcome = fitted.fit(adversary)
            _save_tensors(fitted.state_dict(), folder / "attack.safetensors")
            _write_report(folder, outcome)
            shutil.rmtree(folder / "resume", ignore_errors=True)

        def read(folder: Path) -> tuple[Attack, FitReport]:
            attack.prepare(self.adversary(attack, defense, None, no_report))
            attack.load_state_dict(load_file(folder / "attack.safetensors"))
            attack.to(self.fabric.device).eval()
            return attack, _read_report(folder)

        key = self._attack_key(attack, defense)
        what = f"train {attack.name} on {defense.name}"
        return Job(f"attack-{attack.name}-{defense.name}", key, what, make, read)

    def interceptions(
        self, defense: Defense, probes: Tensor, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What is sent for the victim images ``probes``, batch by batch, each image ``queries`` times.

        Yields the images' indices (n,), representations (n, k, C, h, w) and true states (n, k, D), None where none are
        drawn.
        """
        queries = self.config.queries
        values = queries * defense.bytes_per_face() // torch.float32.itemsize
        batch_size = max(1, min(batch_size or self.config.batch_size, REPRESENTATION_VALUES // values))
        generator = self.streams.generator("victims")
        for index in probes.split(batch_size):
            faces = to_float(self.splits.victims.images[index].to(self.fabric.device))
            sent = [defense.protect(faces, generator) for _ in range(queries)]
            states = [one.state for one in sent if one.state is not None]
            representations = torch.stack([one.representation for one in sent], dim=1)
            yield index, representations, torch.stack(states, dim=1) if states else None

    def observations(self, attack: Attack, defense: Defense, probes: Tensor) -> Iterator[Observation]:
        """What ``attack`` gets to see of the victim images ``probes``, batch by batch."""
        reveal = Knowledge(self.config.knowledge) is Knowledge.ORACLE
        stolen, scored = Capability.TEMPLATES in attack.needs, Capability.SCORES in attack.needs
        service = self.service(defense, "observe") if stolen or scored else None
        enrolment_draws = self.streams.generator("enrolment")
        for index, representations, states in self.interceptions(defense, probes):
            templates = enrolled = score = None
            if service:
                embedded = service.embed_representations(representations.flatten(0, 1))
                templates = embedded.unflatten(0, representations.shape[:2])
                if scored:
                    score = Enrolment(service, templates[:, 0]).score
            if service and stolen:
                enrolled = class_centres(service, self.splits.victims, index, enrolment_draws)
            yield Observation(
                representations,
                states=states if reveal else None,
                templates=templates if stolen else None,
                enrolled=enrolled,
                score=score,
            )

    def recoveries(self, defense: Defense, probes: Tensor) -> Tensor:
        """Recovered faces of the victim images ``probes``: float32 (V, 3, H, W) in [0, 1], on the CPU."""
        attack = plugins.make_attack(self.config.attack, self.config.attack_options, self.config.preset)

        def make(folder: Path, report: Report) -> None:
            fitted, _ = self.fitted_attack(defense)
            faces = []
            if not isinstance(fitted, RecoveryAttack):
                raise TypeError(f"{fitted.name} recovers no faces")
            for observation in self.observations(fitted, defense, probes):
                with failing_as(f"attack {fitted.name} on {defense.name}"):
                    faces.append(fitted.recover(observation).cpu())
                report(sum(len(f) for f in faces), len(probes))
            _save_tensors({"faces": torch.cat(faces)}, folder / "recovered.safetensors")

        def read(folder: Path) -> Tensor:
            return load_file(folder / "recovered.safetensors")["faces"]

        key = make_key(
            {"attack": self._attack_key(attack, defense), "probes": probes.tolist(), "queries": self.config.queries},
            ("bench.stages", "bench.service"),
        )
        return self._do(Job(f"recover-{attack.name}-{defense.name}", key, f"recover from {defense.name}", make, read))

    # -- how stages are kept ---------------------------------------------------------------------

    def _platform(self) -> dict[str, str]:
        return {"torch": torch.__version__, "device": self.fabric.device.type}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        nested = sum(self.seconds.values())
        try:
            yield
        finally:
            # A stage that asks for another one (verify for its recogniser) is not charged for it.
            inner = sum(self.seconds.values()) - nested
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started - inner

    def _do(self, job: Job[T]) -> T:
        """Make the stage unless it is there, and read it back.

        It is read back in either case, so that a fresh result and a cached one cannot differ. Asked for again in the
        same run, it is the same object: not read twice, and not counted as reused.
        """
        if (job.stage, job.key) not in self._results:
            with self._timed(job.stage), self.cache.entry(job.stage, job.key) as entry:
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


def check_needs(attack: Attack | type[Attack], knowledge: str) -> None:
    """Refuse an attack that needs what the chosen rung does not grant.

    Raises:
        UsageError: naming what is missing and the rungs that would do.
    """
    missing = attack.needs - GRANTS[Knowledge(knowledge)]
    if missing:
        enough = ", ".join(rung for rung, grants in GRANTS.items() if attack.needs <= grants)
        raise UsageError(
            f"attack {attack.name} needs {', '.join(sorted(missing))}, which --knowledge {knowledge} does not grant: "
            f"use --knowledge {enough or 'of another attack'}"
        )


def check_coverage(report: FitReport, defense: Defense, knowledge: str) -> bool | None:
    """Whether the states that the attack was trained on cover what the defence emits.

    None where there are no states to cover, or where the attacker guesses the secret: the states of a
    guessed table are not those of the real one.

    Raises:
        BenchError: they do not: the number would be that of an attacker who was mis-driven.
    """
    states = defense.states()
    if states is None or report.states_seen is None or knowledge == Knowledge.BLACKBOX:
        return None
    seen = {tuple(state) for state in report.states_seen.tolist()}
    unseen = [tuple(state) for state in states.tolist() if tuple(state) not in seen]
    if unseen:
        raise BenchError(
            f"the attack was trained on {len(seen)} of the {len(states)} states that {defense.name} emits "
            f"(never on {unseen[0]}): train it longer, its figure would be too kind to the defence"
        )
    return True


def _fingerprint(root: Path | None) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file: cheap, and changes when the data does."""
    if root is None:
        return []
    files: Sequence[Path] = sorted(root.rglob("*")) if root.is_dir() else [root]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_source(folder: Path, source: Source) -> None:
    if source.victims is not None or source.pairs is not None:
        raise TypeError("only a source without a verification set of its own is stored")
    _save_tensors({"images": source.faces.images, "labels": source.faces.labels}, folder / "faces.safetensors")
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


def _write_report(folder: Path, report: FitReport) -> None:
    document = {"saturated": report.saturated, "curve": report.curve, "details": report.details}
    states = None if report.states_seen is None else report.states_seen.tolist()
    write_text(folder / "report.json", json.dumps({**document, "states_seen": states}, indent=2))


def _read_report(folder: Path) -> FitReport:
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    states = document.pop("states_seen")
    curve = tuple((int(seen), float(loss)) for seen, loss in document.pop("curve"))
    return FitReport(
        states_seen=None if states is None else torch.tensor(states, dtype=torch.int64), curve=curve, **document
    )
