"""The stages of a run, each cached under its resolved options, the versions of its inputs and of its code."""

from __future__ import annotations

import copy
import functools
import operator
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bench import plugins
from bench.data.faces import FaceSet, PairProtocol, Source
from bench.data.loaders import MAIN
from bench.data.splits import Splits, parts_of, split, whole_identities
from bench.errors import DataError, MissingError, UsageError, failing_as, first_line
from bench.files import keep, kept
from bench.images import to_float
from bench.metrics.evaluator import (
    Evaluator,
    brought_recogniser,
    check_no_judge,
    describe,
    judge_names,
    open_encoder,
    probe,
)
from bench.metrics.verification import pair_scores
from bench.nets.augmentation import augment
from bench.nets.brought import digest_of, plugin_module
from bench.nets.checkpoints import load_recogniser
from bench.nets.encoder import BroughtRecogniser, FaceEncoder
from bench.nets.heads import MarginHead
from bench.nets.options import AS_READ, InputForm
from bench.nets.recogniser import Recogniser, TemplateReader, build_recogniser
from bench.progress import ProgressBars, Report
from bench.randomness import Streams
from bench.recognition.embed import embed_faces
from bench.recognition.options import TrainingOptions
from bench.recognition.state import save_recogniser
from bench.results import RecogniserInfo, TeacherInfo
from bench.run.config import RunConfig
from bench.run.enrolment import TemplateSystem
from bench.run.machines import ConnectedProcesses, Machine, TrainingOrder
from bench.run.protocols import VerificationSet, load_pack
from bench.run.sources import DataSet, digest
from bench.run.stage import CODE, Job, Log, StageCache, StageRunner, make_key, plugin_code, tensor_job
from defenses.base import Defense, DefenseTraining
from defenses.template import TemplateDefense

if TYPE_CHECKING:
    from bench.recognition.training import TrainingReport

T = TypeVar("T")

_FACES = 256
_BATCH = 16


@torch.no_grad()
def channel_energy(described: dict[str, Any], faces: Tensor) -> dict[str, list[float]]:
    """Mean magnitude of each channel (Mi et al., ICCV 2023, section 3.2: energy = mean abs(x)), summed over colours.

    Of the first 256 of some public faces, uint8 (M, 3, H, H): ``channel_energy``, 64 values, channel 8 u + v. Nothing
    where the defence, by what is ``described`` of it, keeps no frequencies.
    """
    if "kept_channels" not in described:
        return {}
    factor = {name: value for name, value in described.get("options", {}).items() if name == "upsampling"}
    everything = plugins.make_defense("arcface-fd", factor, "cpu", faces.shape[-1])
    sample = faces[:_FACES]
    total = torch.zeros(everything.channels)
    for part in sample.split(_BATCH):
        sent = everything.protect(to_float(part), torch.Generator().manual_seed(0)).representation
        total += sent.abs().mean(dim=(2, 3)).sum(dim=0)
    per_channel: Tensor = (total / len(sample)).view(3, -1).sum(dim=0)
    return {"channel_energy": per_channel.tolist()}


@dataclass(frozen=True, slots=True)
class Brought:
    """A recogniser that somebody brought along.

    Attributes:
        setting: ``recogniser`` or ``plain_recogniser``.
        source: its file, or the name of a plug-in.
        given: what its input is, by who brings it.
    """

    setting: str
    source: Path
    given: InputForm

    def fitted(self, encoder: FaceEncoder, form: Tensor, sender: Defense) -> Recogniser:
        """The recogniser behind a defence, fed as was found out.

        Raises:
            UsageError: it takes other representations than the defence sends.
            ValueError: it is never fed so.
        """
        encoder.feed(form)
        return brought_recogniser(encoder, sender.representation_shape, sender.name, self.setting)


def check_brought(config: RunConfig, defense: Defense) -> None:
    """Try the recognisers that somebody brings along, before any compute.

    Raises:
        MissingError, DataError: as :func:`bench.metrics.evaluator.open_encoder`.
        UsageError: one takes something else than it is sent, is a judge, or contradicts another setting.
    """
    behind = defense.behind if isinstance(defense, TemplateDefense) else defense
    plain = plugins.make_defense("none", {}, config.preset, config.image_size)
    senders = {"recogniser": behind or plain, "plain_recogniser": plain}
    for setting, sender in senders.items():
        source: Path | None = getattr(config, setting)
        if source is None:
            if (given := getattr(config, f"{setting}_input")) != AS_READ:
                said = ", ".join(given.model_dump(exclude_none=True))
                raise UsageError(f"{setting}_input gives {said} of no recogniser: give one, or leave it out")
            continue
        check_no_judge(source, config.evaluator, setting)
        if config.teacher is not None:
            raise UsageError(f"a recogniser that is brought along learns from no --teacher: give one, or {source}")
        if setting == "plain_recogniser" and senders["recogniser"].name == "none":
            raise UsageError(
                f"{defense.name} protects what a recogniser makes of plain faces: give {source} as --recogniser"
            )
        given, shape = getattr(config, f"{setting}_input"), sender.representation_shape
        _try_brought(source, digest_of(source), given, shape, sender.name, setting)


@functools.cache
def _try_brought(
    source: Path, digest: str, given: InputForm, shape: tuple[int, int, int], sender: str, setting: str
) -> None:
    """Try the recogniser of this digest, once in a process: a sweep asks for every cell."""
    brought_recogniser(open_encoder(source, given=given, role=setting), shape, sender, setting)


def unknown_training(recognisers: Mapping[str, RecogniserInfo]) -> list[str]:
    """What a reader has to know of figures by recognisers that were brought along."""
    return [
        f"{told.name} was brought along: whom it learnt from is not known here, and the victims may be among them"
        for told in recognisers.values()
    ]


class Stages(StageRunner):
    """What the provider makes of its data, and the evaluator that scores identities.

    Args:
        config: the resolved configuration.
        machine: device and precision.
        cache, bars, log: as for :class:`StageRunner`.
        processes: processes that help to train recognisers, if there are any.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        machine: Machine,
        cache: StageCache,
        bars: ProgressBars,
        log: Log,
        processes: ConnectedProcesses | None = None,
    ) -> None:
        super().__init__(cache, bars, log)
        self.config = config
        self.processes = processes
        self.machine, self.device = machine, machine.device
        self.streams = Streams(config.seed)

    # -- data ------------------------------------------------------------------------------------

    @functools.cached_property
    def data(self) -> dict[str, DataSet]:
        """The data sets by the settings that name them, in the order in which people are placed."""
        return {role: DataSet(self, self.config, self.streams, role) for role in self._parts_from}

    @functools.cached_property
    def _parts_from(self) -> dict[str, tuple[str, ...]]:
        return parts_of(self.config.roles)

    def data_for(self, part: str) -> DataSet:
        """The data set that a part comes from."""
        return next(self.data[role] for role, parts in self._parts_from.items() if part in parts)

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """The decoded data sets."""
        return {role: data.source for role, data in self.data.items()}

    @property
    def victim_source(self) -> Source:
        """The data set that the victims come from."""
        return self.data_for("victims").source

    @property
    def guessed(self) -> str | None:
        """Why no victim can be looked up by name, where the data does not say who is who; else None."""
        return self.victim_source.guessed

    @property
    def all_made(self) -> bool:
        """Whether there is one data set, which is made: it is known by what was asked for."""
        return [data.made for data in self.data.values()] == [True]

    @functools.cached_property
    def faces_key(self) -> str:
        """Key of the faces that are learnt from: what was asked for or, of data on disk, what was found and decoded.

        Who else is in the run counts only as far as it keeps somebody from being learnt from.
        """
        learnt = self.data_for("provider")
        if self.all_made:
            return learnt.made_key
        content = {
            "content": learnt.made_key if learnt.made else self.found["sets"].get(learnt.role, {}).get("faces"),
            "parts": self._parts_from[learnt.role],
            "own_victims": self.found["sets"].get(learnt.role, {}).get("victims") is not None,
            "excluded": self.found["excluded"],
            "stream": learnt.stream,
        }
        return make_key(content, ())

    @functools.cached_property
    def data_key(self) -> str:
        """Key of the faces that are used: recognisers, which train on the disk, do not depend on what memory holds."""
        hold = self.config.stream_images if self.config.stream else None
        everybody = None if self.all_made else self.found["sets"]
        made = [data.made_key for data in self.data.values() if data.made]
        content = {"faces": self.faces_key, "hold": hold, "sets": everybody, "made": made}
        return make_key(content, CODE["split"])

    @functools.cached_property
    def found(self) -> dict[str, Any]:
        """What was decoded of the data ``sets``, and who was ``excluded`` from those that are learnt from.

        It is noted in the cache for plans, which do not decode.
        """
        apart = len(self.data) > 1 or self.victim_source.victims is not None
        found = {
            "sets": {role: {} if data.made else data.found() for role, data in self.data.items()},
            "excluded": self.splits.excluded if apart else (),
        }
        return dict(keep(self._note(), found))

    def recall(self) -> bool:
        """Take data on disk for what a run last found in files of these names, sizes and times; whether one did.

        Good enough for a plan. Without such a run they are taken for data that nothing was computed of.
        """
        self.found = kept(self._note()) or {"sets": {}, "excluded": None}
        return self.found["excluded"] is not None

    def _note(self) -> Path:
        asked: dict[str, Any] = {role: data.on_disk() for role, data in self.data.items()}
        if len(self.data) > 1:  # who the victims are may decide who is learnt from
            asked |= {"seed": self.config.seed, "shares": self._shares()}
        return self.cache.root / f"found-{make_key(asked, CODE['faces on disk'])}.json"

    def sizes(self) -> dict[str, int]:
        """About how many images each part has, before anybody is left out; nothing where that is not known yet."""
        shares, sizes = self._shares(), dict[str, int]()
        whole, sets = sum(shares.values()), self.__dict__.get("found", {}).get("sets", {})
        for role, parts in self._parts_from.items():
            if (known := self.data[role].sizes(sets.get(role, {}))) is None:
                return {}
            images, victims = known
            given = {part: shares[part] for part in parts}
            if victims is not None and given.pop("victims", None) is not None:
                sizes["victims"] = victims
            total = whole if role == MAIN else 1.0
            sizes |= {part: round(images * share * total / sum(given.values())) for part, share in given.items()}
        return sizes

    def circumstances(self) -> dict[str, Any]:
        """What the seconds of a stage depend on: the configuration, the machine, and the sizes of the parts."""
        device = self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        machine = [device.type, name, torch.get_num_threads(), self.machine.precision]
        return {"machine": machine, "sizes": self.sizes(), "config": self.config.model_dump(mode="json")}

    @functools.cached_property
    def splits(self) -> Splits:
        """Identity-disjoint provider, public, evaluator and victim faces."""
        shares, sources, generator = self._shares(), self.sources, self.streams.generator("split")
        if not self.config.stream:
            return split(sources, **shares, generator=generator)
        with self.timed("data"), self.bars.task("decode faces") as report:
            return split(sources, **shares, generator=generator, hold=self.config.stream_images, report=report)

    def _shares(self) -> dict[str, Any]:
        """The share of the identities that each part has."""
        shares = self.config.shares.model_dump()
        if self.config.evaluator:
            # Nothing is trained to judge: the others share out that part in proportion.
            spare = shares.pop("evaluator")
            shares = {name: share / (1 - spare) for name, share in shares.items()} | {"evaluator": 0.0}
        return shares

    def platform(self) -> dict[str, str]:
        """What else decides the figures of a stage that computes with torch."""
        return {"torch": torch.__version__, "device": self.device.type}

    def trained_under(self) -> dict[str, Any]:
        """What decides, beside its own options, what is trained on a part of the identities."""
        config = self.config
        evaluated = {"shares": config.shares, "evaluator_file": bool(config.evaluator)}
        return {**evaluated, "seed": config.seed, **self.platform()}

    # -- defence ---------------------------------------------------------------------------------

    def defense(self, name: str, options: Mapping[str, Any]) -> Defense:
        """The defence on the device: frozen, fitted where it is trainable, with its recogniser where it needs one."""
        return self.ready(self.unfitted(name, options))

    def unfitted(self, name: str, options: Mapping[str, Any]) -> Defense:
        """The defence as it is before its fit, on the device."""
        config = self.config
        seed = self.streams.seed_for("defense")
        defense = plugins.make_defense(name, dict(options), config.preset, config.image_size, seed=seed)
        return defense.requires_grad_(False).to(self.device)

    def ready(self, defense: Defense) -> Defense:
        """Give an unfitted defence what it needs, a recogniser to protect the embeddings of and its fit; the same."""
        if isinstance(defense, TemplateDefense):
            if defense.behind is not None:
                self.ready(defense.behind)
            recogniser = self.recogniser(self.seen_by_recogniser(defense))
            defense.attach(recogniser.requires_grad_(False), recogniser.spec.embedding_size)
            defense.requires_grad_(False).to(self.device)
        if defense.trainable and (fitted := self.do(self.defense_job(defense))) is not defense:
            defense.load_state_dict(fitted.state_dict())
        return defense

    def defense_job(self, defense: Defense) -> Job[Defense]:
        """The stage that fits a trainable defence, seeded, and stores what it learnt."""

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            device = self.device
            fitted = copy.deepcopy(defense).requires_grad_(True).train()
            with (
                failing_as(f"defence {defense.name}"),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                torch.manual_seed(self.streams.seed_for("defense/fit"))
                fitted.fit(self._defense_training(resume, report))
            return fitted.state_dict()

        def read(tensors: dict[str, Tensor]) -> Defense:
            defense.load_state_dict(tensors)
            return defense

        stage, key = f"defense-{defense.name}", self.defense_key(defense)
        return tensor_job(stage, key, f"fit {defense.name}", "defense.safetensors", compute, read)

    def _defense_training(self, folder: Path, report: Report) -> DefenseTraining:
        faces, options, device = self._provider_in_memory(), self.config.labels_only, self.device
        if options.head == "partial-fc":  # its centres have no gradients; the head that it samples has
            options = options.model_copy(update={"head": "combined"})

        def batches(batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
            for index in torch.randperm(len(faces), generator=generator).split(batch_size):
                pixels = augment(to_float(faces.images[index]), options.augmentation, generator)
                yield pixels.to(device), faces.labels[index].to(device)

        def make_recogniser(shape: tuple[int, int, int]) -> tuple[Recogniser, MarginHead]:
            seed, size = self.streams.seed_for("defense/recogniser"), options.embedding_size
            recogniser = build_recogniser(
                self.config.backbone,
                shape,
                size,
                dropout=options.dropout,
                image_size=self.config.image_size,
                seed=seed,
            )
            from bench.recognition.training import build_head

            head = build_head(options, len(faces.names), seed=seed)
            assert isinstance(head, MarginHead)
            return recogniser.to(device), head.to(device)

        return DefenseTraining(
            batches=batches,
            images=len(faces),
            identities=len(faces.names),
            generator=self.streams.generator("defense/fit"),
            fabric=self.machine.fabric,
            make_recogniser=make_recogniser,
            folder=folder,
            report=report,
        )

    def _provider_in_memory(self) -> FaceSet:
        """The provider's faces, of streamed ones as many as may be held, for a defence that is fitted to them."""
        faces = self.splits.provider
        if isinstance(faces, FaceSet):
            return faces
        return whole_identities(faces, self.config.stream_images, self.streams.generator("defense/faces")).load()

    def defense_key(self, defense: Defense) -> str:
        """Key of the defence, as it is fitted."""
        config = self.config
        training = config.labels_only.model_dump(mode="json")
        hold = config.stream_images if config.stream else None
        fit = {
            "data": self.faces_key,
            "hold": hold,
            "backbone": config.backbone,
            "training": training,
            **self.trained_under(),
        }
        return make_key(
            {
                "fit": fit if defense.trainable else None,
                "recogniser": self.recogniser_key(defense, "provider") if defense.level == "template" else None,
                "defense": {"name": defense.name, "options": defense.options.model_dump(mode="json")},
                "image_size": config.image_size,
            },
            (
                *(code for member in defense.members for code in plugin_code(type(member).__module__)),
                *((*CODE["recogniser"], *CODE["split"]) if defense.trainable else ()),
            ),
        )

    # -- recognition -----------------------------------------------------------------------------

    def recogniser_key(self, defense: Defense, role: str) -> str:
        """Key of the recogniser of the provider or the evaluator."""
        config, defense = self.config, self.seen_by_recogniser(defense)
        if (brought := self.brought(defense, role)) is not None:
            module = plugin_module(brought.source)
            content = {
                "recogniser": digest_of(brought.source),
                "input": brought.given.model_dump(mode="json"),
                "faces": self.faces_key,
                "defense": self.defense_key(defense),
                **self.trained_under(),
            }
            return make_key(content, (*CODE["evaluation"], *(plugin_code(module) if module else ())))
        backbone = config.backbone if role == "provider" else config.evaluator_backbone
        return make_key(
            {
                "role": role,
                "data": self.faces_key,
                "defense": self.defense_key(defense),
                "backbone": backbone,
                "training": self.training(role).model_dump(mode="json"),
                "teacher": self.teacher_key if self.is_taught(role) else None,
                **self.trained_under(),
            },
            (*CODE["recogniser"], *CODE["split"]),
        )

    def recogniser(self, defense: Defense, role: str = "provider") -> Recogniser:
        """A recogniser trained on representations of the provider's (or the evaluator's) faces, or brought along."""
        recogniser = self.do(self.recogniser_job(defense, role))
        return TemplateReader(recogniser, defense.representation_shape) if defense.level == "template" else recogniser

    def seen_by_recogniser(self, defense: Defense) -> Defense:
        """What the recogniser is trained behind: of a template defence what comes before it, which may be nothing."""
        return defense if not isinstance(defense, TemplateDefense) else defense.behind or self._plain()

    def brought(self, defense: Defense, role: str) -> Brought | None:
        """The recogniser that somebody brought along to stand for one that is trained behind a defence, if any."""
        config, sender = self.config, self.seen_by_recogniser(defense)
        if role != "provider":
            return None
        setting = "recogniser" if sender.name != "none" or self._sees_plain else "plain_recogniser"
        source = getattr(config, setting)
        return None if source is None else Brought(setting, source, getattr(config, f"{setting}_input"))

    @functools.cached_property
    def _sees_plain(self) -> bool:
        """Whether the recogniser behind the run's own defence sees plain faces."""
        config = self.config
        own = plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
        return self.seen_by_recogniser(own).name == "none"

    def recogniser_job(self, defense: Defense, role: str) -> Job[Recogniser]:
        """The stage that trains a recogniser or, of one that is brought along, finds out what it is fed."""
        defense = self.seen_by_recogniser(defense)
        if (brought := self.brought(defense, role)) is not None:
            return self._brought_job(defense, brought)

        def make(folder: Path, report: Report) -> None:
            if self.processes is not None:
                self.taught(role)  # the others find it in the cache
                state = {name: tensor.cpu() for name, tensor in defense.state_dict().items()}
                options = defense.options.model_dump(mode="json")
                self.processes.call(TrainingOrder(defense.name, options, state, role, folder))
            recogniser, summary = self._train(defense, role, folder, report)
            save_recogniser(recogniser, folder / "recogniser.safetensors", asdict(summary))
            shutil.rmtree(folder / "resume", ignore_errors=True)

        def read(folder: Path) -> Recogniser:
            return load_recogniser(folder / "recogniser.safetensors", self.device)[0]

        key = self.recogniser_key(defense, role)
        what = f"train {role} recogniser on {defense.name}"
        return Job(f"recogniser-{role}-{defense.name}", key, what, make, read)

    def _brought_job(self, defense: Defense, brought: Brought) -> Job[Recogniser]:
        @functools.cache
        def encoder() -> FaceEncoder:
            return open_encoder(brought.source, self.device, brought.given, role=brought.setting)

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            generator = self.streams.generator(f"{brought.setting}/input")

            def sent(faces: Tensor) -> Tensor:
                return defense.protect(faces, generator).representation

            probe(encoder(), self._provider_in_memory(), role=brought.setting, sent=sent)
            return {"form": encoder().form}

        def read(tensors: dict[str, Tensor]) -> Recogniser:
            return brought.fitted(encoder(), tensors["form"], defense)

        stage = "recogniser-brought" if brought.setting == "recogniser" else "recogniser-brought-plain"
        key, what = self.recogniser_key(defense, "provider"), f"try {brought.source.name} on {defense.name}"
        return tensor_job(stage, key, what, "recogniser.safetensors", compute, read)

    def brought_info(self, defense: Defense) -> dict[str, RecogniserInfo]:
        """What a result says of the recognisers that were brought along, by their settings."""
        told = {}
        for target in (defense, self._plain()):
            if (brought := self.brought(target, "provider")) is not None:
                recogniser = self.do(self.recogniser_job(target, "provider"))
                assert isinstance(recogniser, BroughtRecogniser)
                told[brought.setting] = RecogniserInfo(name=brought.source.name, **describe(recogniser.encoder))
        return told

    def train_along(self, order: TrainingOrder) -> None:
        """Do this process's part of a training that the first one of the processes makes."""
        defense = plugins.make_defense(order.defense, dict(order.options), self.config.preset, self.config.image_size)
        defense.load_state_dict(dict(order.state))
        self._train(defense, order.role, order.folder, lambda *_, **__: None)

    def training(self, role: str) -> TrainingOptions:
        """The evaluator judges: it never learns from labels that are wrong on purpose, nor from a teacher."""
        if role == "provider":
            return self.config.training
        return self.config.labels_only.model_copy(update={"label_noise": 0.0})

    def _train(self, defense: Defense, role: str, folder: Path, report: Report) -> tuple[Recogniser, TrainingReport]:
        config, options = self.config, self.training(role)
        faces = self.splits.provider if role == "provider" else self.splits.evaluator
        if faces is None:
            raise UsageError("the evaluator has no identities to train on: give shares.evaluator or --evaluator")
        seed, teacher = self.streams.seed_for(f"training/{role}"), self.taught(role)
        recogniser = build_recogniser(
            config.backbone if role == "provider" else config.evaluator_backbone,
            defense.representation_shape,
            options.embedding_size if teacher is None else teacher.shape[1],
            dropout=options.dropout,
            image_size=config.image_size,
            seed=seed,
        )
        if self.processes is not None:
            self.processes.meet()
        fabric = self.machine.fabric if self.processes is None else self.processes.fabric
        from bench.recognition.training import train  # imports Fabric, which plans do without

        summary = train(
            recogniser,
            faces,
            defense,
            options,
            fabric=fabric,
            seed=seed,
            teacher=teacher,
            checkpoint=folder / "resume",
            report=report,
        )
        return recogniser, summary

    # -- teacher ---------------------------------------------------------------------------------

    def is_taught(self, role: str) -> bool:
        """Whether recognisers of this role learn from the teacher: the provider's where there is one, no judge ever."""
        return role == "provider" and self.config.teacher is not None

    def taught(self, role: str) -> Tensor | None:
        """The teacher's embeddings of the faces that this role trains on, float32 (N, D); None without a teacher."""
        return self.do(self.teacher_job()) if self.is_taught(role) else None

    @functools.cached_property
    def teacher(self) -> Evaluator:
        """The teacher, run as judges are."""
        assert self.config.teacher is not None
        return Evaluator.from_file(self.config.teacher, self.device, role="teacher")

    @functools.cached_property
    def teacher_key(self) -> str:
        """Key of the teacher's embeddings of the provider's faces, whatever defence and training follow."""
        assert self.config.teacher is not None
        content = {"teacher": digest_of(self.config.teacher), "faces": self.faces_key, **self.trained_under()}
        return make_key(content, (*CODE["evaluation"], *CODE["split"]))

    def teacher_job(self) -> Job[Tensor]:
        """The stage that finds out what the teacher is fed, and lets it embed the provider's plain faces, once for all.

        Each is the embedding of a face and its mirror image, as protocols take it: unit rows, float32 (N, D).
        """

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            faces = self.splits.provider
            assert isinstance(faces, FaceSet)  # a stream is refused before
            self.teacher.probe(faces)
            return {"embeddings": self._embed_plain(self.teacher, faces, report), "form": self.teacher.form}

        def read(tensors: dict[str, Tensor]) -> Tensor:
            self.teacher.form = tensors["form"]
            return tensors["embeddings"]

        what, file = "embed the provider's faces for the teacher", "embeddings.safetensors"
        return tensor_job("teacher", self.teacher_key, what, file, compute, read)

    def teacher_scores_job(self) -> Job[Tensor]:
        """The stage that scores the plain pairs of the victims' protocol by the teacher: (P,)."""

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            self.taught("provider")  # knows what it is fed
            return {
                "scores": pair_scores(self._embed_plain(self.teacher, self.splits.victims, report), self.splits.pairs)
            }

        key = make_key({"teacher": self.teacher_key, "data": self.data_key}, CODE["verification"])
        what, file = "verify by the teacher", "scores.safetensors"
        return tensor_job("verify-teacher", key, what, file, compute, operator.itemgetter("scores"))

    def teacher_info(self) -> TeacherInfo:
        """What a result says of the teacher."""
        embeddings = self.do(self.teacher_job())
        return TeacherInfo(**self.teacher.describe(), embedding_size=embeddings.shape[1])

    def _embed_plain(self, encoder: Evaluator, faces: FaceSet, report: Report) -> Tensor:
        """An encoder's embeddings of plain faces: unit rows, float32 (N, D), on the processor."""
        embeddings: list[Tensor] = []
        for batch in faces.batches(self.config.batch_size):
            embeddings.append(encoder.embed(batch.to(self.device)).cpu())
            report(sum(len(e) for e in embeddings), len(faces))
        return torch.cat(embeddings)

    def verification_set(self, path: Path) -> VerificationSet:
        """A further verification pack, in memory only as long as the caller holds it.

        Raises:
            DataError: a damaged file.
        """
        with self.timed("data"), self.bars.task(f"decode {path.name}") as report:
            pack = load_pack(path, self.config.image_size, self.learnt, report)
            return replace(pack, key=digest(pack.faces, pack.pairs))

    def learnt(self, faces: FaceSet) -> NDArray[np.bool_]:
        """Whether each face (N) equals one that the provider learns from pixel for pixel, bool (N,)."""
        provider = self.splits.provider
        if isinstance(provider, FaceSet):
            return faces.among(provider.images)
        return np.isin(faces.digests(), provider.digests())

    def _verified(self, pack: VerificationSet | None) -> tuple[FaceSet, PairProtocol, str]:
        """The faces of a pack, or the victims, their pairs, and the stream that they are protected from."""
        if pack is None:
            return self.splits.victims, self.splits.pairs, "queries"
        return pack.faces, pack.pairs, f"queries/{pack.name}"

    def verification_job(self, defense: Defense, pack: VerificationSet | None = None) -> Job[Tensor]:
        """The stage that scores the pairs of a protocol, each image protected under one random state: (P,).

        The protocol is that of the victims, or of a further ``pack``.

        Under keys both faces of a pair are protected with the first person's: who claims to be that person has stolen
        the key, or else it were the key that tells people apart, and not the face (Kong et al., Pattern Recognition
        39(7), 2006, on BioHashing).
        """

        def embed(stream: str, faces: FaceSet, keys: Tensor | None = None) -> Tensor:
            return embed_faces(
                self.recogniser(defense),
                defense,
                faces,
                generators=self.streams.numbered(stream),
                batch_size=self.config.batch_size,
                keys=keys,
                fabric=self.machine.fabric,
            )

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            faces, pairs, stream = self._verified(pack)
            keys = self._keys(defense, faces, stream)
            if isinstance(defense, TemplateDefense):
                sides = self.do(self.embeddings_job(defense, pack))
                held = None if keys is None else keys[pairs.first]
                with failing_as(f"defence {defense.name}"):
                    system = self.system(defense)
                    stored = system.enrol(stream, sides[0], held)
                    return {"scores": system.match(stream, stored, sides[1], held)}
            if keys is None:
                return {"scores": pair_scores(embed(stream, faces), pairs)}
            first = embed(f"{stream}/first", faces.subset(pairs.first), keys[pairs.first])
            second = embed(f"{stream}/second", faces.subset(pairs.second), keys[pairs.first])
            return {"scores": (first * second).sum(dim=1)}

        content = {
            "recogniser": self.recogniser_key(defense, "provider"),
            "defense": self.defense_key(defense),
            "data": self.data_key if pack is None else pack.key,
            "batch_size": self.config.batch_size,
        }
        of = "verify" if pack is None else f"verify-{pack.name}"
        stage, key = f"{of}-{defense.name}", make_key(content, CODE["verification"])
        what, file = f"{of.replace('-', ' ', 1)} on {defense.name}", "scores.safetensors"
        return tensor_job(stage, key, what, file, compute, operator.itemgetter("scores"))

    # -- templates -------------------------------------------------------------------------------

    def embeddings_job(
        self, defense: TemplateDefense, pack: VerificationSet | None = None
    ) -> Job[tuple[Tensor, Tensor]]:
        """The stage that embeds both faces of every pair of a protocol, unprotected: unit rows (P, D) each.

        The protocol is that of the victims, or of a further ``pack``. The same for all template defences without a head
        of their own.
        """

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            (faces, pairs, stream), sides = self._verified(pack), {}
            for side, images in (("first", pairs.first), ("second", pairs.second)):
                used, place = torch.unique(images, return_inverse=True)
                sides[side] = self.system(defense).embed(f"{stream}/{side}", faces.images[used], report)[place]
            return sides

        content = {
            "recogniser": self.recogniser_key(defense, "provider"),
            "defense": self.defense_key(defense) if defense.trainable else None,
            "data": self.data_key if pack is None else pack.key,
            "batch_size": self.config.batch_size,
        }
        return tensor_job(
            "embed-victims" if pack is None else f"embed-{pack.name}",
            make_key(content, CODE["verification"]),
            "embed the victims' pairs" if pack is None else f"embed the pairs of {pack.name}",
            "embeddings.safetensors",
            compute,
            lambda tensors: (tensors["first"], tensors["second"]),
        )

    def system(self, defense: TemplateDefense) -> TemplateSystem:
        """The system that stores this defence's templates."""
        return TemplateSystem(defense, self.streams, self.device, self.config.batch_size)

    # -- evaluator -------------------------------------------------------------------------------

    @functools.cached_property
    def evaluators(self) -> tuple[Evaluator, ...]:
        """The recognisers that judge identity leakage, one at least; neither defence nor attack ever sees them."""
        if files := self.config.evaluator:
            opened = tuple(Evaluator.from_file(file, self.device) for file in files)
            for evaluator, name in zip(opened, judge_names(files), strict=True):
                evaluator.name = name
            return opened
        recogniser = self.recogniser(self._plain(), "evaluator")
        size = (self.config.image_size, self.config.image_size)
        return (Evaluator(recogniser, f"trained {self.config.evaluator_backbone}", size, self.device),)

    def victim_keys(self, defense: Defense, purpose: str = "victims") -> Tensor | None:
        """The key of each victim image's client, int64 (N, k); None for a defence without keys.

        All images of a person are one client's, who has another key for each ``purpose``, as for each application.
        """
        return self._keys(defense, self.splits.victims, purpose)

    def _keys(self, defense: Defense, faces: FaceSet, purpose: str) -> Tensor | None:
        keys = defense.draw_keys(len(faces.names), self.streams.generator(f"{purpose}/keys"))
        return None if keys is None else keys[faces.labels]

    def _plain(self) -> Defense:
        return plugins.make_defense("none", {}, self.config.preset, self.config.image_size)

    def evaluations(self) -> list[tuple[Evaluator, Tensor]]:
        """Each judge with its embeddings of all plain victim faces: unit rows, float32 (N, D)."""
        return [self.do(self.evaluation_job(number)) for number in range(len(self.evaluators))]

    def evaluation_job(self, number: int = 0) -> Job[tuple[Evaluator, Tensor]]:
        """The stage that finds out what judge ``number`` is fed, and lets it embed all plain victim faces."""
        files = self.config.evaluator

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            faces, evaluator = self.splits.victims, self.evaluators[number]
            evaluator.probe(self.splits.public, faces, self.splits.pairs)
            return {"embeddings": self._embed_plain(evaluator, faces, report), "form": evaluator.form}

        def read(tensors: dict[str, Tensor]) -> tuple[Evaluator, Tensor]:
            evaluator = self.evaluators[number]
            evaluator.form = tensors["form"]
            return evaluator, tensors["embeddings"]

        key = make_key(
            {
                "data": self.data_key,
                "shares": self.config.shares,
                "seed": self.config.seed,
                "evaluator": digest_of(files[number]) if files else self.recogniser_key(self._plain(), "evaluator"),
                "batch_size": self.config.batch_size,
                **self.platform(),
            },
            CODE["evaluation"],
        )
        what = "embed the victims for the evaluator"
        return tensor_job("evaluate", key, what, "embeddings.safetensors", compute, read)


def load_defense(run: Path, config: RunConfig) -> Defense:
    """The defence of the finished run in the folder ``run``, frozen, with what it learnt there.

    Raises:
        MissingError: the run keeps no such checkpoint.
        DataError: a checkpoint is damaged, or of other settings.
    """
    defense = plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
    folder = run / "checkpoints"
    if isinstance(defense, TemplateDefense):  # which may be fitted to what the recogniser makes
        checkpoint = folder / "recogniser.safetensors"
        recogniser: Recogniser
        if config.recogniser is not None:
            brought = Brought("recogniser", config.recogniser, config.recogniser_input)
            encoder = open_encoder(brought.source, given=brought.given, role=brought.setting)
            sender = defense.behind or plugins.make_defense("none", {}, config.preset, config.image_size)
            recogniser = _from_checkpoint(checkpoint, lambda tensors: brought.fitted(encoder, tensors["form"], sender))
        else:
            recogniser, _ = load_recogniser(checkpoint)
        defense.attach(recogniser, recogniser.spec.embedding_size)
    if defense.trainable:
        _from_checkpoint(folder / "defense.safetensors", defense.load_state_dict)
    return defense.requires_grad_(False)


def _from_checkpoint(checkpoint: Path, use: Callable[[dict[str, Tensor]], T]) -> T:
    """What ``use`` makes of the tensors that a finished run keeps in a file."""
    if not checkpoint.is_file():
        raise MissingError(f"there is no {checkpoint}: make the run again")
    try:
        return use(load_file(checkpoint))
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise DataError(f"{checkpoint} does not hold what the run's settings ask for: {first_line(error)}") from error
