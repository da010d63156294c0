"""``bench run --dry-run``: what would be done, and about how long it takes.

The estimate is measured, not looked up: every stage that is not in the cache is started for real on stand-in faces
and stopped as soon as its own progress says how fast it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from attacks.base import LinkageAttack
from bench.data.faces import FaceSet, Source
from bench.data.stream.scan import Scan
from bench.nets.recogniser import build_recogniser
from bench.results import PlannedStage, RunPlan
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages
from bench.run.config import RunConfig
from bench.run.provider import Stages
from bench.run.stage import Job
from bench.run.store import run_id
from defenses.base import Defense
from defenses.template import TemplateDefense

#: Seconds after which a started stage has shown its pace.
ENOUGH_SECONDS = 3.0


class _Enough(Exception):
    """Raised from a progress report, with the estimated seconds, to stop a stage whose pace is known."""


def _estimate(start: Callable[[Callable[..., None]], object]) -> float:
    """Seconds that ``start(report)`` would take to its end.

    The first report starts the clock: what comes before it (building, warming up) happens once.
    """
    began, first = time.perf_counter(), list[tuple[float, int]]()

    def pace(done: int, total: int, **fields: float) -> None:
        now = time.perf_counter()
        if not first:
            first.append((now, done))
        started, before = first[0]
        if done > before and now - started >= ENOUGH_SECONDS:
            raise _Enough((now - started) / (done - before) * total)

    try:
        start(pace)
    except _Enough as enough:
        return float(enough.args[0])
    return time.perf_counter() - began


def stand_in(config: RunConfig, seed: int) -> Source:
    """Random pictures in the numbers that the synthetic dataset would have: enough to time training on."""
    identities = int(config.dataset_options["identities"])
    images = int(config.dataset_options["images_per_identity"])
    if config.limit is not None:
        identities = min(identities, max(2, config.limit // images))
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    pixels = torch.randint(0, 256, (identities * images, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(identities).repeat_interleave(images)
    return Source("synthetic", FaceSet(pixels, labels, tuple(str(i) for i in range(identities))), synthetic=True)


def make_plan(
    config: RunConfig, attack_configs: Mapping[str, Sequence[AttackConfig]], attacks: AttackStages
) -> RunPlan:
    """The plan of a run; trains nothing to its end and writes nothing.

    Recovering and linking cannot be timed before an attack is fitted: they are listed without an estimate.
    """
    stages = attacks.stages
    planned = []

    def plan(job: Job[Any], what: str, *, timed: bool = True) -> bool:
        """List a stage; whether it is in the cache."""
        seconds, cached = None, stages.cache.holds(job.stage, job.key)
        if timed and not cached:
            with TemporaryDirectory() as folder:
                seconds = _estimate(lambda report: job.make(Path(folder), report))
        planned.append(PlannedStage(name=job.stage, what=what, cached=cached, seconds=seconds))
        return cached

    if config.dataset == "synthetic" and not stages.cache.holds("data", stages.data_key):
        seconds = _estimate(stages.load_source)
        planned.append(PlannedStage(name="data", what="render faces", cached=False, seconds=seconds))
        stages.source = stand_in(config, config.seed)
    if config.stream and not plan(scan := stages.scan_job(), scan.what):
        # Nothing was looked at yet: what a scan would have found and left out is passed over.
        faces = stages.opened.on_disk
        tolerant = replace(faces, source=faces.source.reading("skip"))
        stages.opened = replace(stages.opened, faces=tolerant)
        stages.assume(scan, Scan.unknown(tolerant))
    defense, plain = stages.unfitted(config.defense, config.defense_options), stages.defense("none", {})
    jobs: list[tuple[Job[Any], str, bool]] = []
    behind = defense.behind if isinstance(defense, TemplateDefense) else None
    for member in (behind, defense):
        if member is None or not member.trainable:
            continue
        fit = stages.defense_job(member)
        jobs.append((fit, f"fit {member.name} to {len(stages.splits.provider)} images", True))
        if not stages.cache.holds(fit.stage, fit.key):
            stages.assume(fit, member)
    # A linkage attack is its own ceiling: it links plain faces as well. The others are run on unprotected ones.
    targets = [(attack_config, defense) for configs in attack_configs.values() for attack_config in configs]
    targets += [(configs[-1], plain) for configs in attack_configs.values() if not _links(configs[-1])]

    trained = _recognisers(config, targets, attacks, defense, plain)
    if any(stages.is_taught(role) for role, _ in trained):
        lesson = stages.teacher_job()
        if not plan(lesson, f"embed {len(stages.splits.provider)} plain images by the teacher"):
            # For timing, any embeddings of its size will do.
            face = torch.full((1, 3, config.image_size, config.image_size), 0.5)
            stages.assume(lesson, torch.randn(len(stages.splits.provider), stages.teacher.embed(face).shape[1]))
        if config.utility:
            what = f"embed {len(stages.splits.victims)} plain victim images by the teacher"
            jobs.append((stages.teacher_scores_job(), what, True))
    for role, target in trained:
        job = stages.recogniser_job(target, role)
        jobs.append((job, _training(config, stages, role), True))
        if not stages.cache.holds(job.stage, job.key):
            # For attacks that query it: an untrained one is as fast.
            taught, shape = stages.taught(role), stages.seen_by_recogniser(target).representation_shape
            size = config.training.embedding_size if taught is None else taught.shape[1]
            untrained = (
                build_recogniser(config.backbone, shape, size, image_size=config.image_size, seed=0)
                .to(stages.fabric.device)
                .eval()
            )
            stages.assume(job, untrained)
    stages.ready(defense)
    for attack_config, target in targets:
        jobs.append((attacks.fit_job(attack_config, target), _fitting(attack_config, attacks), True))
    for attack_config, target in targets:
        if _links(attack_config):
            what = f"embed {len(stages.splits.victims)} victim images, twice protected and plain"
            jobs.append((attacks.link_job(attack_config, target), what, False))
        else:
            what = f"recover {len(attacks.selection.attacked)} victim images, k = {attack_config.interceptions}"
            jobs.append((attacks.recover_job(attack_config, target), what, False))
    for job, what, timed in {(job.stage, job.key): (job, what, timed) for job, what, timed in jobs}.values():
        plan(job, what, timed=timed)
    return RunPlan(
        run_id=run_id(config),
        device=str(stages.fabric.device),
        precision=str(stages.fabric._precision.precision),
        config=config.model_dump(mode="json"),
        stages=planned,
        seconds=sum(stage.seconds or 0.0 for stage in planned),
    )


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


def _training(config: RunConfig, stages: Stages, role: str) -> str:
    faces = stages.splits.evaluator if role == "evaluator" else stages.splits.provider
    assert faces is not None  # the role is there only with its identities
    how = f"{stages.training(role).epochs} epochs{', taught' if stages.is_taught(role) else ''}"
    return f"train on {len(faces)} images of {faces.identities} identities, {how}"


def _fitting(attack_config: AttackConfig, attacks: AttackStages) -> str:
    options = ", ".join(f"{name}={value}" for name, value in attack_config.options.items())
    images = len(attacks.public(attack_config))
    return f"train {attack_config.name} on {images} public images{f' ({options})' if options else ''}"
