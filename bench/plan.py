"""``bench run --dry-run``: what would be done, and about how long it takes.

The estimate is measured, not looked up: every stage that is not in the cache is started for real on stand-in faces
and stopped as soon as its own progress says how fast it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import plugins
from bench.config import RunConfig
from bench.data.faceset import FaceSet, Source
from bench.results import PlannedStage, RunPlan
from bench.stages import Job, Stages
from bench.store import run_id

#: Seconds after which a started stage has shown its pace.
ENOUGH_SECONDS = 3.0


class _Enough(Exception):
    """Raised from a progress report to stop a stage whose pace is known."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class _Pace:
    """A progress report that extrapolates and stops.

    The first report starts the clock: what comes before it (building, warming up) happens once.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, **fields: float) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, done)
            return
        started, before = self._first
        if done > before and now - started >= ENOUGH_SECONDS:
            raise _Enough((now - started) / (done - before) * total)


def _estimate(start: Callable[[Callable[..., None]], object]) -> float:
    """Seconds that ``start(report)`` would take to its end."""
    began = time.perf_counter()
    try:
        start(_Pace())
    except _Enough as enough:
        return enough.seconds
    return time.perf_counter() - began


def _time_job(job: Job[Any]) -> float:
    with TemporaryDirectory() as folder:
        return _estimate(lambda report: job.make(Path(folder), report))


def stand_in(config: RunConfig, seed: int) -> Source:
    """Random pictures in the numbers that the synthetic dataset would have: enough to time training on."""
    identities = int(config.dataset_options["identities"])
    images = int(config.dataset_options["images_per_identity"])
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    pixels = torch.randint(0, 256, (identities * images, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(identities).repeat_interleave(images)
    return Source("synthetic", FaceSet(pixels, labels, tuple(str(i) for i in range(identities))), synthetic=True)


def make_plan(config: RunConfig, stages: Stages) -> RunPlan:
    """The plan of a run; trains nothing to its end and writes nothing."""
    cache = stages.cache
    planned = []
    if config.dataset == "synthetic":
        cached = cache.holds("data", stages.data_key)
        if not cached:
            seconds = _estimate(stages.load_source)
            planned.append(PlannedStage(name="data", what="render faces", cached=False, seconds=seconds))
            stages.source = stand_in(config, config.seed)
    splits = stages.splits
    defense = plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
    defense = defense.to(stages.fabric.device)
    plain = plugins.make_defense("none", {}, config.preset, config.image_size).to(stages.fabric.device)
    roles = [("provider", defense), ("provider", plain)]
    if config.evaluator is None:
        roles.append(("evaluator", plain))

    public = f"train {config.attack} on {len(splits.public)} public images"
    jobs: list[tuple[Job[Any], str]] = []
    for role, one in roles:
        faces = splits.evaluator if role == "evaluator" else splits.provider
        assert faces is not None  # the role is there only with its identities
        what = f"train on {len(faces)} images of {len(faces.names)} identities, {config.training.epochs} epochs"
        jobs.append((stages.recogniser_job(one, role), what))
    jobs += [(stages.attack_job(one), public) for one in (defense, plain)]
    for job, what in {job.stage: (job, what) for job, what in jobs}.values():
        if cache.holds(job.stage, job.key):
            planned.append(PlannedStage(name=job.stage, what=what, cached=True))
        else:
            planned.append(PlannedStage(name=job.stage, what=what, cached=False, seconds=_time_job(job)))
    return RunPlan(
        run_id=run_id(config),
        device=str(stages.fabric.device),
        precision=str(stages.fabric._precision.precision),
        config=config.model_dump(mode="json"),
        stages=planned,
        seconds=sum(stage.seconds or 0.0 for stage in planned),
    )
