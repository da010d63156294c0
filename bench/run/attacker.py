"""What the attacks of a run are handed, and the stages that fit them and let them loose on the victims."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from attacks.base import (
    GRANTS,
    OF_RECOGNISER,
    Adversary,
    Attack,
    Capability,
    FitReport,
    Knowledge,
    LinkageAttack,
    Observation,
    RecoveryAttack,
    Traffic,
)
from bench.data.faces import FaceSet
from bench.data.splits import whole_identities
from bench.errors import failing_as
from bench.files import write_text
from bench.images import to_float
from bench.memory import in_halves
from bench.metrics.identity import Probes, content_ids, select_probes
from bench.progress import Report, no_report
from bench.recognition.state import resumed, write_tensors
from bench.run.attack_config import AttackConfig, option_files
from bench.run.machines import synchronise
from bench.run.provider import Stages
from bench.run.service import Client, Service, class_centres, other_images, score_query, traffic_query
from bench.run.stage import CODE, Job, make_key, plugin_code, tensor_job
from defenses.base import Defense, noise_is_shared
from defenses.layout import probe, row_numbers
from defenses.template import TemplateDefense

G = TypeVar("G")


def layout_hits(inferred: Tensor, states: Tensor, defense: Defense) -> dict[str, Tensor]:
    """How far a channel layout that an attack inferred is the true one.

    Args:
        inferred: int64 (N, k, C), the canonical channel that the attack takes each channel for.
        states: int64 (N, k, D), what the defence drew.
        defense: the one in use.

    Returns:
        On the CPU, ``right``, bool (N, k, C), which channels are what they are taken for, and where states can be
        listed ``named``, int64 (N, k, 2), the state drawn and the one inferred as rows of :meth:`Defense.states`, -1
        for a layout of no state. Nothing where the states of this defence lay out no channels.

    Raises:
        ValueError: ``inferred`` has another shape or type.
    """
    expected = (*states.shape[:2], defense.channels)
    if tuple(inferred.shape) != expected or inferred.dtype != torch.int64:
        raise ValueError(
            f"an inferred channel layout must be int64 {expected}, got "
            f"{str(inferred.dtype).removeprefix('torch.')} {tuple(inferred.shape)}"
        )
    drawn, listed = states.flatten(0, 1), defense.states()
    # Of more states than can be listed only what was drawn is probed.
    layout = probe(defense, torch.unique(drawn, dim=0) if listed is None else listed)
    if layout is None:
        return {}
    row, given = layout.row_of(drawn), inferred.flatten(0, 1).to(layout.canonical.device)
    hits = {"right": given == layout.canonical[row]}
    if listed is not None:
        same = (given[:, None] == layout.canonical).all(dim=2)
        hits["named"] = torch.stack((row, torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)), dim=1)
    return {name: values.unflatten(0, states.shape[:2]).cpu() for name, values in hits.items()}


#: Representation values intercepted at once: 256 MiB of them.
REPRESENTATION_VALUES = 2**28 // 4


class Interception(NamedTuple):
    """What is intercepted of a batch of victim images.

    Attributes:
        observation: what the attack sees of it.
        states: int64 (N, k, D), what the defence drew, which only the harness knows; None where nothing is drawn.
        service: answers the attack's score queries and counts them; None where it asks for nothing of the provider.
    """

    observation: Observation
    states: Tensor | None
    service: Service | None


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an attack made of the V attacked images, in B batches, on the CPU.

    Attributes:
        faces: float32 (V, 3, H, W) in [0, 1], in the order of the probes.
        batch_faces: int64 (B,), the faces recovered at once.
        batch_seconds: float64 (B,), what each batch took.
        right, named: as :func:`layout_hits`, (V, k, ...); None where the attack inferred no layout, or no state.
        queries: int64 (B,), score queries sent; None where the attack sends none.
    """

    faces: Tensor
    batch_faces: Tensor
    batch_seconds: Tensor
    right: Tensor | None = None
    named: Tensor | None = None
    queries: Tensor | None = None


class Linked(NamedTuple):
    """A linkage attack's embeddings of all victim images: float32 (N, D), unit rows, on the CPU.

    ``first`` and ``second`` are of two independent interceptions of each image, ``plain`` of the images themselves.
    """

    first: Tensor
    second: Tensor
    plain: Tensor


class Inverted(NamedTuple):
    """What an attack made of the templates of the V attacked images, on the CPU.

    ``first`` are its estimates of their embeddings, (V, D), and ``second`` of those of another image of each person,
    whose templates are under other keys; ``first_stored`` and ``second_stored`` the templates, (V, T), the first where
    several of a person were stolen.
    """

    first: Tensor
    second: Tensor
    first_stored: Tensor
    second_stored: Tensor


#: The stream of the keys under which the people are enrolled anew.
RENEWED = "renewed"


class AttackStages:
    """The attacker's side of a run, on top of the provider's."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.config = stages.config
        self.streams = stages.streams
        self._public: dict[float, FaceSet] = {}

    @functools.cached_property
    def selection(self) -> Probes:
        """Which victim images are attacked, and which are the plain gallery."""
        return select_probes(self.stages.splits.victims, self.config.probes, self.streams.generator("probes"))

    # -- what an attack is handed ----------------------------------------------------------------

    def given(self, attack: Attack) -> frozenset[Capability]:
        """What the attack needs, and of what else it can use what the rung grants."""
        return attack.needs | (attack.uses & GRANTS[Knowledge(self.config.knowledge)])

    def asks_provider(self, attack: Attack) -> bool:
        """Whether the provider's recogniser has to exist for this attack."""
        return bool(self.given(attack) & OF_RECOGNISER)

    def public(self, attack_config: AttackConfig) -> FaceSet:
        """The public faces that an attack's budget pays for; a smaller budget gets a part of what a larger one gets."""
        share = attack_config.public
        if share not in self._public:
            everybody, draws = self.stages.splits.public, self.streams.generator("budget")
            self._public[share] = whole_identities(everybody, share, draws)
        return self._public[share]

    def mechanism(self, defense: Defense) -> Callable[[torch.Generator], Defense]:
        """What the adversary can protect faces with: guesses of the defence under a black box, else the one in use."""
        own = copy.deepcopy(defense)  # what an attack does to it happens to nobody else
        if Knowledge(self.config.knowledge) is Knowledge.BLACKBOX:
            return own.guess
        return lambda generator: own

    def adversary(
        self,
        attack: Attack,
        defense: Defense,
        *,
        public: FaceSet | None = None,
        service: Service | None = None,
        client: Client | None = None,
        checkpoint: Path | None = None,
        report: Report = no_report,
    ) -> Adversary:
        """What the chosen rung hands to the attack by its needs, and nothing else.

        Its faces are the ``public`` ones given, else all; queries are answered by the ``service`` and the ``client``
        given, else by ones of their own; ``checkpoint`` is a folder for resuming the fit.
        """
        public = self.stages.splits.public if public is None else public
        given = self.given(attack)
        if Capability.EMBEDDINGS in given and service is None:
            service = self.service(defense, "fit")
        if Capability.PROTECTION in given and client is None:
            client = self.client(defense)
        return Adversary(
            faces=public.images.clone(),
            identities=public.labels.clone(),
            knowledge=Knowledge(self.config.knowledge),
            mechanism=self.mechanism(defense),
            generator=self.streams.generator("attack"),
            fabric=self.stages.machine.fabric,
            recogniser=copy.deepcopy(self.stages.recogniser(defense)) if Capability.RECOGNISER in given else None,
            embed=service.embed if service and Capability.EMBEDDINGS in given else None,
            traffic=self._traffic(defense) if Capability.TRAFFIC in given else None,
            client=client if Capability.PROTECTION in given else None,
            checkpoint=checkpoint,
            report=report,
        )

    def service(self, defense: Defense, purpose: str) -> Service:
        """The provider's service, whose clients draw their states from a stream of the ``purpose``'s own."""
        draws = self.streams.numbered(f"service/{purpose}")
        return Service(self.stages.recogniser(defense), defense, draws, batch_size=self.config.batch_size)

    def client(self, defense: Defense) -> Client:
        """The client as the attacker runs it, on streams of its own."""
        return Client(defense, lambda name: self.streams.generator(f"client/{name}"), self.stages.device)

    def _traffic(self, defense: Defense) -> Traffic:
        return traffic_query(
            defense,
            self.stages.splits.victims,
            self.selection.attacked,
            self.streams.numbered("traffic"),
            batch_size=self.config.batch_size,
            device=self.stages.device,
            keys=self.stages.victim_keys(defense),
        )

    # -- fitting ---------------------------------------------------------------------------------

    def _fit_key(self, attack: Attack, public: float, defense: Defense) -> str:
        config, stages = self.config, self.stages
        return make_key(
            {
                "data": stages.data_key,
                "public": public,
                "defense": stages.defense_key(defense),
                # A file counts by its bytes, wherever it lies.
                "attack": {
                    "name": attack.name,
                    "options": attack.options.model_dump(mode="json") | option_files(attack),
                },
                "knowledge": config.knowledge,
                "probes": config.probes if Capability.TRAFFIC in self.given(attack) else None,
                "recogniser": stages.recogniser_key(defense, "provider") if self.asks_provider(attack) else None,
                **stages.trained_under(),
            },
            (*CODE["attack"], *(code for member in attack.members for code in plugin_code(type(member).__module__))),
        )

    def fitted(self, attack_config: AttackConfig, defense: Defense) -> tuple[Attack, FitReport]:
        """The attack, fitted against ``defense`` on the public faces of its budget."""
        return self.stages.do(self.fit_job(attack_config, defense))

    def fit_job(self, attack_config: AttackConfig, defense: Defense) -> Job[tuple[Attack, FitReport]]:
        """The stage that fits the attack."""
        attack = attack_config.make()

        def make(folder: Path, report: Report) -> None:
            public = self.public(attack_config)
            torch.manual_seed(self.streams.seed_for("attack"))
            fitted = attack_config.make()
            given = self.given(fitted)
            service = self.service(defense, "fit") if Capability.EMBEDDINGS in given else None
            client = self.client(defense) if Capability.PROTECTION in given else None
            adversary = self.adversary(
                fitted,
                defense,
                public=public,
                service=service,
                client=client,
                checkpoint=folder / "resume",
                report=report,
            )
            with (
                _tallied(service, folder / "queries") as asked,
                _tallied(client, folder / "protection_queries") as protected,
                failing_as(f"attack {fitted.name} on {defense.name}"),
            ):
                fit_report = fitted.learn(adversary)
            spent = {"fit_queries": asked(), "protection_queries": protected()}
            counted = {name: count for name, count in spent.items() if count}
            fit_report = replace(fit_report, details={**fit_report.details, **counted})
            write_tensors(folder / "attack.safetensors", fitted.state_dict())
            _write_report(folder, fit_report)
            shutil.rmtree(folder / "resume", ignore_errors=True)

        def read(folder: Path) -> tuple[Attack, FitReport]:
            attack.prepare(self.adversary(attack, defense, public=self.public(attack_config)))
            attack.load_state_dict(load_file(folder / "attack.safetensors"))
            return attack, _read_report(folder)

        key = self._fit_key(attack, attack_config.public, defense)
        what = f"train {attack.name} on {defense.name}"
        return Job(f"attack-{attack.name}-{defense.name}", key, what, make, read)

    # -- interceptions ---------------------------------------------------------------------------

    def interceptions(
        self, defense: Defense, images: Tensor, count: int, *, stream: str = "victims", batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What is sent for the victim ``images``, batch by batch, each image ``count`` times.

        Each image has a random stream of its own in each of the ``count`` turns: fewer interceptions are a part of
        more, and what is sent of an image does not depend on the others. A client has one key for each ``stream`` and,
        where the key protects what is stored, for each turn: several records of a person are of several systems. The
        noise of a defence that draws it once for a batch is the same for as many images as the configuration protects
        at once; what is yielded together then shares it.

        Yields the images' indices (n,), representations (n, k, C, h, w) and true states (n, k, D), None where none are
        drawn.
        """
        values = count * math.prod(defense.representation_shape)
        batch_size = max(1, min(batch_size or self.config.batch_size, REPRESENTATION_VALUES // values))
        turns = [self.streams.numbered(f"{stream}/{turn}") for turn in range(count)]
        keys, shares = self.keys_of_turns(defense, count, stream), noise_is_shared(defense)
        batches = images.split(self.config.batch_size) if shares else [images]
        for number, index in (
            (number, part) for number, batch in enumerate(batches) for part in batch.split(batch_size)
        ):
            faces = to_float(self.stages.splits.victims.images[index].to(self.stages.device))
            sent = [
                defense.protect_each(
                    faces,
                    [draws(image) for image in index.tolist()],
                    keys=None if keys is None else keys[index, turn],
                    shared=self.streams.generator(f"{stream}/{turn}/shared/{number}") if shares else None,
                )
                for turn, draws in enumerate(turns)
            ]
            states = [protected.state for protected in sent if protected.state is not None]
            representations = torch.stack([protected.representation for protected in sent], dim=1)
            yield index, representations, torch.stack(states, dim=1) if states else None

    def keys_of_turns(self, defense: Defense, count: int, stream: str) -> Tensor | None:
        """The key of each victim image's client at each of ``count`` interceptions, int64 (N, count, k), or None."""
        changes = defense.level == "template"
        streams = [stream, *(f"{stream}/{turn}" if changes else stream for turn in range(1, count))]
        keys = [self.stages.victim_keys(defense, name) for name in streams]
        held = [key for key in keys if key is not None]
        return torch.stack(held, dim=1) if held else None

    def observations(
        self, attack: Attack, defense: Defense, probes: Tensor, count: int, *, stream: str = "victims"
    ) -> Iterator[Interception]:
        """What ``attack`` gets to see of the victim images ``probes``, batch by batch, each ``count`` times."""
        given = self.given(attack)
        reveal = Knowledge(self.config.knowledge) is Knowledge.ORACLE
        stolen, scored = Capability.TEMPLATES in given, Capability.SCORES in given
        enrolment = self.service(defense, "enrolment") if stolen else None
        victims = self.stages.splits.victims
        content = content_ids(victims.images) if stolen else torch.empty(0)
        keys, turns = self.stages.victim_keys(defense, stream), self.keys_of_turns(defense, count, stream)
        stored = isinstance(defense, TemplateDefense) and defense.key_stored
        shown = Capability.KEY in given or (stored and Capability.TEMPLATES in given)
        for index, representations, states in self.interceptions(defense, probes, count, stream=stream):
            templates = enrolled = score = service = None
            held = None if keys is None else keys[index]
            if stolen or scored:
                service = self.service(defense, "observe")
                embedded = service.embed_representations(representations.flatten(0, 1))
                templates = embedded.unflatten(0, representations.shape[:2])
                if scored:
                    score = score_query(service, templates[:, 0].clone(), self._draws_of("scores", index), held)
            if enrolment is not None:
                enrolled = class_centres(enrolment, victims, content, index, self._draws_of("enrolment", index), keys)
            observation = Observation(
                representations,
                states=states.clone() if states is not None and reveal else None,
                keys=turns[index].clone() if turns is not None and shown else None,
                templates=templates if stolen else None,
                enrolled=enrolled,
                score=score,
            )
            yield Interception(observation, states, service if scored else None)

    def _draws_of(self, stream: str, images: Tensor) -> list[torch.Generator]:
        """A generator per victim image."""
        return [self.streams.generator(f"{stream}/{image}") for image in images.tolist()]

    # -- recovery --------------------------------------------------------------------------------

    def recovered(self, attack_config: AttackConfig, defense: Defense) -> Recovered:
        """What the attack recovers of the attacked images."""
        return self.stages.do(self.recover_job(attack_config, defense))

    def recover_job(self, attack_config: AttackConfig, defense: Defense) -> Job[Recovered]:
        """The stage that recovers faces; each batch is kept as it is done, so that a killed run goes on after it."""

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            fitted, _ = self.fitted(attack_config, defense)
            probes = self.selection.attacked
            if not isinstance(fitted, RecoveryAttack):
                raise TypeError(f"{fitted.name} recovers no faces")
            parts: list[dict[str, Tensor]] = []
            for number, batch in enumerate(self.observations(fitted, defense, probes, attack_config.interceptions)):
                recover = functools.partial(_recover, fitted, batch, defense, self.stages.device)
                with failing_as(f"attack {fitted.name} on {defense.name}"):
                    parts.append(resumed(resume / f"part-{number}.safetensors", recover))
                report(sum(len(part["faces"]) for part in parts), len(probes))
            kept = set.intersection(*map(set, parts))
            return {name: torch.cat([part[name] for part in parts]) for name in kept}

        stage, what = f"recover-{attack_config.name}-{defense.name}", f"recover from {defense.name}"
        key = self._victims_key(attack_config, defense, probes=self.config.probes)
        return tensor_job(stage, key, what, "recovered.safetensors", compute, lambda tensors: Recovered(**tensors))

    def _victims_key(self, attack_config: AttackConfig, defense: Defense, **inputs: object) -> str:
        return make_key(
            {
                "attack": self._fit_key(attack_config.make(), attack_config.public, defense),
                "interceptions": attack_config.interceptions,
                "batch_size": self.config.batch_size,
                **inputs,
            },
            CODE["victims"],
        )

    # -- templates -------------------------------------------------------------------------------

    @functools.cached_property
    def partners(self) -> Tensor:
        """For each attacked image another of the person, no copy of it, of which a new template is made: int64 (V,)."""
        victims = self.stages.splits.victims
        content = content_ids(victims.images)
        return torch.stack([other_images(victims, content, image)[0] for image in self.selection.attacked.tolist()])

    def inverted(self, attack_config: AttackConfig, defense: TemplateDefense) -> Inverted | None:
        """The embeddings that the attack makes of stolen templates; None of an attack that makes none."""
        inverted = self.stages.do(self.invert_job(attack_config, defense))
        return inverted if len(inverted.first) else None

    def invert_job(self, attack_config: AttackConfig, defense: TemplateDefense) -> Job[Inverted]:
        """The stage that inverts the templates of the attacked images, and of their partners under other keys."""

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            fitted, _ = self.fitted(attack_config, defense)
            assert isinstance(fitted, RecoveryAttack)
            tensors: dict[str, Tensor] = {}
            probes = self.selection.attacked
            for turn, (side, images, stream) in enumerate(
                (("first", probes, "victims"), ("second", self.partners, RENEWED))
            ):
                made, stored = [], []
                for batch in self.observations(fitted, defense, images, attack_config.interceptions, stream=stream):
                    with failing_as(f"attack {fitted.name} on {defense.name}"), torch.no_grad():
                        embeddings = _some_at_once(fitted, fitted.infer_embeddings, batch.observation)
                    if embeddings is None:
                        return {name: torch.empty(0, 0) for name in Inverted._fields}
                    made.append(embeddings.float().cpu())
                    stored.append(batch.observation.representations[:, 0, :, 0, 0].float().cpu())
                    report(turn * len(images) + sum(map(len, made)), 2 * len(images))
                tensors |= {side: torch.cat(made), f"{side}_stored": torch.cat(stored)}
            return tensors

        stage, what = f"invert-{attack_config.name}-{defense.name}", f"invert templates of {defense.name}"
        key = self._victims_key(attack_config, defense, probes=self.config.probes)
        return tensor_job(stage, key, what, "inverted.safetensors", compute, lambda tensors: Inverted(**tensors))

    # -- linkage ---------------------------------------------------------------------------------

    def linked(self, attack_config: AttackConfig, defense: Defense) -> Linked:
        """The linkage attack's embeddings of all victim images, twice protected and plain."""
        return self.stages.do(self.link_job(attack_config, defense))

    def link_job(self, attack_config: AttackConfig, defense: Defense) -> Job[Linked]:
        """The stage that embeds the victims; several interceptions of an image give one embedding."""

        def compute(resume: Path, report: Report) -> dict[str, Tensor]:
            fitted, _ = self.fitted(attack_config, defense)
            if not isinstance(fitted, LinkageAttack):
                raise TypeError(f"{fitted.name} links no representations")
            victims, everyone = self.stages.splits.victims, torch.arange(len(self.stages.splits.victims))
            columns: dict[str, list[Tensor]] = {"first": [], "second": [], "plain": []}

            def keep(name: str, embeddings: Tensor) -> None:
                columns[name].append(embeddings.cpu())
                report(sum(len(batch) for batches in columns.values() for batch in batches), 3 * len(everyone))

            with failing_as(f"attack {fitted.name} on {defense.name}"), torch.no_grad():
                for name in ("first", "second"):
                    stream = f"linkage/{name}"
                    sent = self.interceptions(defense, everyone, attack_config.interceptions, stream=stream)
                    for _, representations, _ in sent:
                        keep(name, _some_at_once(fitted, fitted.embed_representations, representations))
                for faces in victims.batches(self.config.batch_size):
                    keep("plain", _some_at_once(fitted, fitted.embed_faces, faces.to(self.stages.device)))
            return {name: torch.cat(batches) for name, batches in columns.items()}

        stage, key = f"link-{attack_config.name}-{defense.name}", self._victims_key(attack_config, defense)
        what, file = f"link {defense.name}", "linked.safetensors"
        return tensor_job(stage, key, what, file, compute, lambda tensors: Linked(**tensors))


@contextmanager
def _tallied(answers: Service | Client | None, tally: Path) -> Iterator[Callable[[], int]]:
    """Count the queries of a fit over all its tries: those of one that was killed were sent as well."""
    before = int(tally.read_text(encoding="utf-8")) if tally.is_file() else 0

    def spent() -> int:
        return before + (answers.queries if answers else 0)

    try:
        yield spent
    finally:
        if answers is not None:
            write_text(tally, str(spent()))


def _some_at_once(attack: Attack, work: Callable[[Any], G], given: Observation | Tensor) -> G:
    """What ``work`` of an attack makes of all rows, tensors of as many, or None; of fewer at once where memory is full.

    An attack that learns from what it sees together then sees fewer.
    """

    def part(rows: slice) -> G:
        return work(given.rows(rows) if isinstance(given, Observation) else given[rows])

    made = list(in_halves(part, len(given), len(given), f"attack {attack.name}"))
    tensors: list[Tensor] = [each for each in made if isinstance(each, Tensor)]
    return cast(G, torch.cat(tensors)) if tensors else made[0]


def _recover(attack: RecoveryAttack, batch: Interception, defense: Defense, device: torch.device) -> dict[str, Tensor]:
    """One batch as it is stored: see :class:`Recovered`.

    Raises:
        ValueError: as the attack, or a layout of another shape.
    """
    synchronise(device)
    started = time.perf_counter()
    faces = _some_at_once(attack, attack.recover, batch.observation)
    synchronise(device)
    recovered = {
        "faces": faces,
        "batch_faces": torch.tensor([len(faces)]),
        "batch_seconds": torch.tensor([time.perf_counter() - started], dtype=torch.float64),
    }
    if batch.service is not None:
        recovered["queries"] = torch.tensor([batch.service.queries])
    if batch.states is not None:
        with torch.no_grad():
            inferred = _some_at_once(attack, attack.infer_layout, batch.observation)
            rows = _some_at_once(attack, attack.infer_states, batch.observation) if inferred is None else None
        if inferred is not None:
            recovered |= layout_hits(inferred, batch.states, defense)
        elif rows is not None and (listed := defense.states()) is not None:
            drawn = row_numbers(batch.states.flatten(0, 1).cpu(), listed.cpu()).view(rows.shape)
            recovered["named"] = torch.stack((drawn, rows.cpu()), dim=2)
    return recovered


def _write_report(folder: Path, report: FitReport) -> None:
    document: dict[str, object] = {name: getattr(report, name) for name in ("saturated", "states_read", "curve")}
    document["details"] = report.details
    states = None if report.states_seen is None else report.states_seen.tolist()
    write_text(folder / "report.json", json.dumps({**document, "states_seen": states}, indent=2))


def _read_report(folder: Path) -> FitReport:
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    states = document.pop("states_seen")
    curve = tuple((int(seen), float(loss)) for seen, loss in document.pop("curve"))
    return FitReport(
        states_seen=None if states is None else torch.tensor(states, dtype=torch.int64), curve=curve, **document
    )
