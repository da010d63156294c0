"""``bench run --dry-run``: what would be done, and about how long it takes.

A plan computes nothing. It reads no face and goes by what finished stages of the cache took; with ``measure`` every
stage that is not in the cache is started for real, on stand-in faces where they are rendered, and stopped as soon as
its own progress says how fast it goes.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from rich.console import Console

from attacks.base import LinkageAttack
from bench import plugins
from bench.data.faces import FaceSet, Source
from bench.data.loaders import MAIN, check_root, check_there
from bench.data.stream.scan import Scan
from bench.errors import BenchError, in_words, one_line
from bench.files import kept
from bench.nets.recogniser import build_recogniser
from bench.results import PlannedStage, RunPlan
from bench.run.attack_config import AttackConfig, attack_configs
from bench.run.attacker import AttackStages
from bench.run.beside import half_of_the_threads
from bench.run.config import RunConfig
from bench.run.identification import distracted_job, pooled_job
from bench.run.launch import end_process, keep_freed_memory, obey_parent, start_process
from bench.run.protocols import packs_of
from bench.run.provider import Stages
from bench.run.sources import DataSet
from bench.run.stage import SECONDS, Job
from bench.run.store import run_id
from defenses.base import Defense
from defenses.template import TemplateDefense

if TYPE_CHECKING:
    from bench.run.pipeline import Pipeline

#: Seconds after which a started stage has shown its pace, and those that measuring may take in all.
ENOUGH_SECONDS = 3.0
MEASURE_SECONDS = 60.0

#: Stand-in faces at most: more show no other pace.
STAND_INS = 4000


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of the plan.

    Attributes:
        job: how it is made and called in the cache.
        what: in words.
        kind: how the names of stages begin that do the same behind other defences.
        attack: whose stage it is, if an attack's.
        timed: whether it can be measured, which takes no other stage's result than a pretended one.
        pretend: makes the later stages believe that it was done, for measuring them.
    """

    job: Job[Any]
    what: str
    kind: str
    attack: AttackConfig | None = None
    timed: bool = True
    pretend: Callable[[], None] = lambda: None

    @property
    def trains(self) -> bool:
        """Whether it may be made beside another (:mod:`bench.run.beside`)."""
        of_kind = self.timed and self.kind.startswith(("recogniser-", "attack-"))
        return of_kind and (self.attack is None or not _links(self.attack))


def make_plan(
    config: RunConfig,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    attacks: AttackStages,
    *,
    measure: bool = False,
    beside: bool = False,
) -> RunPlan:
    """The plan of a run, which makes two trainings at a time or not; trains nothing to its end and writes nothing.

    To ``measure`` takes :data:`MEASURE_SECONDS` at most, else nothing is computed.

    Raises:
        MissingError: the data are not there.
    """
    stages, notes, ahead = attacks.stages, list[str](), _Ahead(config, attack_configs, attacks)
    steps, cached = ahead.steps, ahead.cached
    if not ahead.recalled:
        notes.append("no run has read these faces yet: what the cache holds of them is not known")
    if measure:
        estimates = _measured(config, len(steps))
    else:
        timings = Timings(stages, beside=beside)
        estimates = [None if here else timings.estimate(step) for step, here in zip(steps, cached, strict=True)]
    planned = [
        PlannedStage(
            name=step.job.stage,
            what=step.what,
            cached=here if ahead.recalled or here or step.kind == "scan" else None,
            seconds=seconds,
        )
        for step, here, seconds in zip(steps, cached, estimates, strict=True)
    ]
    if left := sum(not stage.cached and stage.seconds is None for stage in planned):
        why = "none like it was finished: try --measure"
        if measure:
            why = f"not to be measured yet, or not in {MEASURE_SECONDS:.0f} s"
        notes.append(f"how long {left} of {len(planned)} stages take is unknown ({why})")
    resolved = {
        "defense_options": ahead.defense.describe()["options"],
        "attack_options": {
            name: configs[-1].make().options.model_dump(mode="json") for name, configs in attack_configs.items()
        },
    }
    return RunPlan(
        run_id=run_id(config),
        device=str(stages.device),
        precision=stages.machine.precision,
        config=config.model_dump(mode="json") | resolved,
        stages=planned,
        seconds=_in_all(steps, estimates, beside=beside and not measure),
        notes=tuple(notes),
    )


def _in_all(steps: Sequence[Step], estimates: Sequence[float | None], *, beside: bool) -> float:
    """Seconds of those that are known; of trainings that are made two at a time half, or the longest of them."""
    seconds = [seconds or 0.0 for seconds in estimates]
    trained = [taken for step, taken in zip(steps, seconds, strict=True) if beside and step.trains]
    return sum(seconds) - sum(trained) + max(sum(trained) / 2, *trained, 0.0)


def missing_steps(
    config: RunConfig,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    attacks: AttackStages,
    defense: Defense,
    plain: Defense,
) -> list[Step]:
    """The stages of a run that it has to make, in order: those that it needs and that are not in the cache.

    Their jobs hold ``defense`` and ``plain``, which have to be ready (:meth:`Stages.ready`) when one is done.
    """
    cache, steps = attacks.stages.cache, _steps(config, attack_configs, attacks, defense, plain)
    return [step for step in steps if not cache.holds(step.job.stage, step.job.key)]


class _Ahead:
    """What a run has to do.

    Attributes:
        recalled: whether it is known what its data are, so that what was made of them is.
        defense: its defence, not fitted.
        steps: its stages, in order.
        cached: which of these are there.
    """

    def __init__(
        self, config: RunConfig, attack_configs: Mapping[str, Sequence[AttackConfig]], attacks: AttackStages
    ) -> None:
        stages = attacks.stages
        self.recalled = stages.all_made or _recalled(stages)
        self.defense = stages.unfitted(config.defense, config.defense_options)
        self.steps = _steps(config, attack_configs, attacks, self.defense, stages.unfitted("none", {}))
        self.cached = [stages.cache.holds(step.job.stage, step.job.key) for step in self.steps]


def _recalled(stages: Stages) -> bool:
    """Whether it is known what lies on the disk, without looking into it."""
    for role, data in stages.data.items():
        check_root(*data.named)
        check_there(data.named.root, "--data-root" if role == MAIN else f"--{role.replace('_', '-')}")
    return stages.recall()


# -- what is done ----------------------------------------------------------------------------------


def _steps(
    config: RunConfig,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    attacks: AttackStages,
    defense: Defense,
    plain: Defense,
) -> list[Step]:
    """All stages of a run that are there or needed, each once, in order. Their keys are computed, and nothing else."""
    stages = attacks.stages
    # A linkage attack is its own ceiling: it links plain faces as well. The others are run on unprotected ones.
    targets = [(attack_config, defense) for configs in attack_configs.values() for attack_config in configs]
    targets += [(configs[-1], plain) for configs in attack_configs.values() if not _links(configs[-1])]
    steps = [*_of_data(config, stages), *_of_provider(config, stages, targets, attacks, defense, plain)]
    ends = [_on_victims(attack_config, target, attacks) for attack_config, target in targets]
    own = [(configs[-1], defense) for configs in attack_configs.values()]
    for (attack_config, target), end in zip(targets, ends, strict=True):
        fit, what = attacks.fit_job(attack_config, target), _fitting(attack_config, stages)
        # A result tells of the run's own fits; the others are there for what they get of the victims.
        done = stages.cache.holds(end.job.stage, end.job.key) and (attack_config, target) not in own
        if not done or stages.cache.holds(fit.stage, fit.key):
            steps.append(Step(fit, what, f"attack-{attack_config.name}-", attack_config))
    steps += ends
    if isinstance(defense, TemplateDefense):
        for name, configs in attack_configs.items():
            if not _links(configs[-1]):
                job = attacks.invert_job(configs[-1], defense)
                steps.append(Step(job, job.what, f"invert-{name}-", configs[-1], timed=False))
    unique: dict[tuple[str, str], Step] = {}
    for step in steps:
        unique.setdefault((step.job.stage, step.job.key), step)
    return list(unique.values())


def _of_data(config: RunConfig, stages: Stages) -> Iterator[Step]:
    for data in stages.data.values():
        if data.made:

            def pretend(data: DataSet = data) -> None:
                data.source = stand_in(config, config.seed, data.given)

            job = data.rendering_job()
            yield Step(job, job.what, "data", pretend=pretend)
        elif data.stream:
            scan = data.scan_job()

            def pass_over(data: DataSet = data, scan: Job[Scan] = scan) -> None:
                # Nothing was looked at yet: what a scan would have found and left out is passed over.
                faces = data.opened.on_disk
                tolerant = replace(faces, source=faces.source.reading("skip"))
                data.opened = replace(data.opened, faces=tolerant)
                stages.assume(scan, Scan.unknown(tolerant))

            yield Step(scan, scan.what, "scan", pretend=pass_over)


def _of_provider(
    config: RunConfig,
    stages: Stages,
    targets: Sequence[tuple[AttackConfig, Defense]],
    attacks: AttackStages,
    defense: Defense,
    plain: Defense,
) -> Iterator[Step]:
    behind = defense.behind if isinstance(defense, TemplateDefense) else None
    for member in (behind, defense):
        if member is not None and member.trainable:
            fit = stages.defense_job(member)
            what = f"fit {member.name} to {_about(stages, 'provider')}"
            yield Step(fit, what, fit.stage, pretend=functools.partial(stages.assume, fit, member))
    recognisers = _recognisers(config, targets, attacks, defense, plain)
    if any(stages.is_taught(role) for role, _ in recognisers):
        lesson = stages.teacher_job()

        def teach() -> None:
            # For timing, any embeddings of its size will do.
            face = torch.full((1, 3, config.image_size, config.image_size), 0.5)
            size = stages.teacher.embed(face).shape[1]
            stages.assume(lesson, torch.randn(len(stages.splits.provider), size))

        what = f"embed {_about(stages, 'provider')} by the teacher"
        yield Step(lesson, what, "teacher", pretend=teach)
    for role, target in recognisers:
        job = stages.recogniser_job(target, role)
        pretend = functools.partial(_pretend_trained, stages, target, role)
        if stages.brought(target, role) is not None:
            yield Step(job, job.what, "recogniser-brought", timed=False)
        else:
            yield Step(job, _training(stages, role), f"recogniser-{role}-", pretend=pretend)
    if config.utility:
        if config.teacher is not None:
            what = f"embed {_about(stages, 'victims')} by the teacher"
            yield Step(stages.teacher_scores_job(), what, "verify-teacher")
        for target in (defense, plain):
            if isinstance(target, TemplateDefense):
                embed = stages.embeddings_job(target)
                yield Step(embed, embed.what, "embed-victims", timed=False)
            what = f"verify {_about(stages, 'victims')} on {target.name}"
            yield Step(stages.verification_job(target), what, "verify-", timed=False)
        for target in (defense, plain):
            further: list[Job[Any]] = [
                pooled_job(stages, target, path) for path in packs_of(config).values() if path.is_dir()
            ]
            if config.distractors is not None:
                further.append(distracted_job(stages, target))
            for step in further:
                yield Step(step, step.what, step.stage.removesuffix(target.name), timed=False)
    if not all(_links(attack_config) for attack_config, _ in targets):
        for number in range(len(config.evaluator) or 1):
            what = f"embed {_about(stages, 'victims')} for the evaluator"
            yield Step(stages.evaluation_job(number), what, "evaluate", timed=False)


def _pretend_trained(stages: Stages, target: Defense, role: str) -> None:
    """For attacks that query it: an untrained recogniser is as fast."""
    config = stages.config
    taught, shape = stages.taught(role), stages.seen_by_recogniser(target).representation_shape
    size = config.training.embedding_size if taught is None else taught.shape[1]
    untrained = build_recogniser(config.backbone, shape, size, image_size=config.image_size, seed=0)
    stages.assume(stages.recogniser_job(target, role), untrained.to(stages.device).eval())


def _on_victims(attack_config: AttackConfig, target: Defense, attacks: AttackStages) -> Step:
    """What follows the fit. It cannot be timed before: how long it takes depends on what was fitted."""
    name, stages = attack_config.name, attacks.stages
    if _links(attack_config):
        what = f"embed {_about(stages, 'victims')}, twice protected and plain"
        return Step(attacks.link_job(attack_config, target), what, f"link-{name}-", attack_config, timed=False)
    probes = min(stages.config.probes, stages.sizes().get("victims", stages.config.probes))
    what = f"recover {probes} victim images, k = {attack_config.interceptions}"
    return Step(attacks.recover_job(attack_config, target), what, f"recover-{name}-", attack_config, timed=False)


def _links(attack_config: AttackConfig) -> bool:
    return isinstance(attack_config.make(), LinkageAttack)


def _recognisers(
    config: RunConfig,
    targets: Sequence[tuple[AttackConfig, Defense]],
    attacks: AttackStages,
    defense: Defense,
    plain: Defense,
) -> list[tuple[str, Defense]]:
    """Role and defence of every recogniser that the run trains."""
    trained = [("provider", defense), ("provider", plain)] if config.utility or defense.level == "template" else []
    trained += [
        ("provider", target) for attack_config, target in targets if attacks.asks_provider(attack_config.make())
    ]
    if not config.evaluator and not all(_links(attack_config) for attack_config, _ in targets):
        trained.append(("evaluator", plain))
    return list(dict.fromkeys(trained))


def _about(stages: Stages, part: str) -> str:
    """The images of a part in words, with about how many there are where that is known."""
    images, whose = stages.sizes().get(part), part.removesuffix("s")
    return f"the {whose} images" if images is None else f"about {images:,} {whose} images"


def _training(stages: Stages, role: str) -> str:
    taught = ", taught" if stages.is_taught(role) else ""
    return f"train on {_about(stages, role)}, {stages.training(role).epochs} epochs{taught}"


def _fitting(attack_config: AttackConfig, stages: Stages) -> str:
    options = ", ".join(f"{name}={value}" for name, value in attack_config.options.items())
    share = attack_config.public
    part = "" if share == 1 else f"{share:.0%} of " if share < 1 else f"{share:.0f} of "
    return f"train {attack_config.name} on {part}{_about(stages, 'public')}{f' ({options})' if options else ''}"


# -- how long it takes -----------------------------------------------------------------------------


def _work(stage: str, attack: str | None, config: RunConfig, sizes: Mapping[str, int]) -> tuple[float, Any]:
    """How much a stage has to do, in units of its own, and what else its pace depends on.

    Raises:
        KeyError: a part whose size is not known.
    """
    kind, size = stage.partition("-")[0], config.image_size
    pace: list[Any]
    if attack is not None:
        configs = attack_configs(config)[attack]
        # An attack trains as long as its options say, on however many faces: how its time grows is its own affair.
        pace = [size, config.preset, config.knowledge, config.backbone, config.teacher, config.budget, configs[-1]]
        if kind == "attack":
            return 1.0, [*pace, sizes["public"]]
        return float(sizes["victims"] if kind == "link" else min(config.probes, sizes["victims"])), pace
    match kind:
        case "data":
            return float(sum(sizes.values())), size
        case "recogniser" if stage.startswith("recogniser-evaluator"):
            training = config.labels_only
            return float(sizes["evaluator"] * training.epochs), [size, config.evaluator_backbone, training.views]
        case "recogniser" if stage.startswith("recogniser-brought"):
            return 1.0, [size, config.recogniser, config.plain_recogniser]
        case "recogniser":
            pace = [size, config.backbone, config.training.views]
            return float(sizes["provider"] * config.training.epochs), pace
        case "defense":
            pace = [size, config.preset, config.backbone, config.defense, config.defense_options]
            return float(sizes["provider"]), pace
        case "teacher":
            return float(sizes["provider"]), [size, config.teacher]
        case "pool" | "search":  # as long again, of the same images
            return 1.0, [size, config.backbone, config.verify, config.distractors, sizes["victims"]]
        case _:  # victims are embedded
            pace = [size, config.backbone, config.evaluator_backbone, config.teacher, config.evaluator]
            return float(sizes["victims"]), pace


class Timings:
    """What the finished stages in a run's cache took.

    Where trainings are made ``beside`` others, those with half of the threads count, too.
    """

    def __init__(self, stages: Stages, *, beside: bool = False) -> None:
        self.stages = stages
        self.here = stages.circumstances()
        machines = [self.here["machine"]]
        if beside:
            with half_of_the_threads():
                machines.append(stages.circumstances()["machine"])
        self._defenses = set(plugins.defenses())
        self._taken: list[tuple[str, dict[str, Any]]] = []
        for file in sorted(stages.cache.root.glob(f"*/{SECONDS}")):
            taken = kept(file)
            if taken is not None and taken.get("machine") in machines:
                self._taken.append((file.parent.name.rpartition("-")[0], taken))

    def estimate(self, step: Step) -> float | None:
        """Seconds that a stage will take, by the pace of those of its name or, failing these, behind other defences.

        None where none was finished on this machine under settings that its pace depends on.
        """
        by_name = [taken for stage, taken in self._taken if stage == step.job.stage]
        by_kind = [taken for stage, taken in self._taken if self._is_of_kind(stage, step.kind)]
        return self._scaled(by_name, step) or self._scaled(by_kind, step)

    def _is_of_kind(self, stage: str, kind: str) -> bool:
        # attack-unet-none is, and attack-unet-ensemble-none is not, of the kind attack-unet-.
        return stage.startswith(kind) and set(stage.removeprefix(kind).split("+")) <= self._defenses

    def _scaled(self, finished: Sequence[Mapping[str, Any]], step: Step) -> float | None:
        attack = None if step.attack is None else step.attack.name
        seconds = work = 0.0
        try:
            mine, pace = _work(step.job.stage, attack, self.stages.config, self.here["sizes"])
        except KeyError:
            return None
        for taken in finished:
            try:
                config = RunConfig.model_validate(taken["config"])
                theirs, their_pace = _work(step.job.stage, attack, config, taken["sizes"])
                if pace == their_pace:
                    seconds, work = seconds + float(taken["seconds"]), work + theirs
            except (KeyError, TypeError, ValueError, ValidationError, BenchError):
                continue  # of a version with other settings
        return seconds / work * mine if work else None


# -- measuring -------------------------------------------------------------------------------------

#: A stage by its place in the plan, and the seconds that it will take, where they are known.
Told = tuple[int, float | None]


class _Enough(BaseException):
    """Stops a stage whose pace is known or whose time is up; plug-ins that catch their own errors do not catch it."""


def _measured(config: RunConfig, count: int) -> list[float | None]:
    """Seconds of every stage that is not cached, of ``count``; None where time was up before they were known.

    A stage that says nothing of its progress can be stopped nowhere but in the middle of something, and whatever that
    was (gradients switched off, a lock held) would stay so. So all this is done in a process that is killed then.
    """
    estimates: list[float | None] = [None] * count
    until = None
    with TemporaryDirectory() as folder:
        limits = torch.get_num_threads(), ENOUGH_SECONDS, MEASURE_SECONDS
        process, receiver = start_process(_measure_apart, config, folder, *limits)
        try:
            while receiver.poll(None if until is None else max(0.0, until - time.perf_counter())):
                match receiver.recv():
                    case BenchError() as error:
                        raise error
                    case number, seconds:
                        estimates[number] = seconds
                    case None:  # it has started: only now does time run
                        until = time.perf_counter() + MEASURE_SECONDS
        except EOFError:
            pass  # it has ended
        finally:
            end_process(process, 0)
            receiver.close()
    return estimates


def _measure_apart(
    config: RunConfig, folder: str, threads: int, enough: float, limit: float, sender: Connection
) -> None:
    """What that process does."""
    obey_parent()
    keep_freed_memory()
    torch.set_num_threads(threads)
    from bench.run.pipeline import Pipeline

    try:
        pipeline = Pipeline(config, console=Console(quiet=True))
        sender.send(None)
        for told in measure_stages(pipeline, Path(folder), enough, limit):
            sender.send(told)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)  # nobody waits for it
    except Exception as error:
        sender.send(error if isinstance(error, BenchError) else BenchError(one_line(in_words(error))))


def measure_stages(pipeline: Pipeline, folder: Path, enough: float, limit: float) -> Iterator[Told]:
    """Seconds of every stage that is not cached and can be timed, each measured on its share of ``limit`` seconds.

    Each is started in a folder within ``folder`` and stopped when it reports, once it has shown its pace for ``enough``
    seconds or its time is up.
    """
    attacks = pipeline.attack_stages()
    ahead = _Ahead(pipeline.config, pipeline.attack_configs, attacks)
    stages, until, smaller, ready = attacks.stages, time.perf_counter() + limit, 1.0, False
    waiting = sum(step.timed and not here for step, here in zip(ahead.steps, ahead.cached, strict=True))
    for number, (step, here) in enumerate(zip(ahead.steps, ahead.cached, strict=True)):
        if here or time.perf_counter() >= until:
            continue
        if step.attack is not None and not ready:
            ready = True
            stages.ready(ahead.defense)
        if step.timed:

            def start(report: Callable[..., None], job: Job[Any] = step.job) -> None:
                with TemporaryDirectory(dir=folder) as own:
                    job.make(Path(own), report)

            seconds = time_to_end(start, enough, (until - time.perf_counter()) / waiting)
            waiting -= 1
            yield number, None if seconds is None else seconds / (smaller if step.attack is None else 1.0)
        step.pretend()
        if step.kind == "data":
            given = stages.config.options_of(stages.data_for("provider").role)
            smaller = _stand_ins(stages.config, given)[0] / int(given["identities"]) if "identities" in given else 1.0


def time_to_end(start: Callable[[Callable[..., None]], object], enough: float, limit: float) -> float | None:
    """Seconds that ``start(report)`` would take to its end; None where ``limit`` seconds do not tell.

    The first report starts the clock: what comes before it (building, warming up) happens once.
    """
    began, reports = time.perf_counter(), list[tuple[float, int, int]]()

    def pace(done: int, total: int, **fields: float) -> None:
        now = time.perf_counter()
        reports.append((now, done, total))
        if (done > reports[0][1] and now - reports[0][0] >= enough) or now - began >= limit:
            raise _Enough

    try:
        start(pace)
    except _Enough:
        pass
    else:
        return time.perf_counter() - began
    if reports[-1][1] <= reports[0][1]:
        return None
    (first, before, _), (last, done, total) = reports[0], reports[-1]
    return (last - first) / (done - before) * total


def _stand_ins(config: RunConfig, given: Mapping[str, Any]) -> tuple[int, int]:
    """Identities, and images of each, of the stand-in faces."""
    identities, images = (int(given[name]) for name in ("identities", "images_per_identity"))
    most = max(STAND_INS // images, 32)
    if config.limit is not None:
        most = min(most, max(2, config.limit // images))
    return min(identities, most), images


def stand_in(config: RunConfig, seed: int, given: Mapping[str, Any]) -> Source:
    """Random pictures of as many people as the synthetic dataset would have, or a part: enough to time training on."""
    identities, images = _stand_ins(config, given)
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    pixels = torch.randint(0, 256, (identities * images, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(identities).repeat_interleave(images)
    return Source("synthetic", FaceSet(pixels, labels, tuple(str(i) for i in range(identities))), synthetic=True)
