"""One run from end to end: data, defence, recognisers, attack, recovery, measures, result."""

from __future__ import annotations

import resource
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from attacks.base import Attack, FitReport, RecoveryAttack, no_report
from bench import plugins
from bench.cache import StageCache
from bench.config import RunConfig
from bench.data.faceset import to_float
from bench.data.loaders import DATASETS
from bench.device import make_fabric
from bench.errors import MissingError
from bench.judge import Assessment, Judge, to_measure
from bench.metrics.bootstrap import verification_estimates
from bench.metrics.floors import grey, mean_face, nearest, noise
from bench.metrics.perceptual import Lpips, load_lpips
from bench.metrics.throughput import measure
from bench.metrics.verification import lfw_accuracy
from bench.progress import ProgressBars
from bench.recognition.backbones import BACKBONES
from bench.recognition.heads import HEADS
from bench.results import (
    AttackInfo,
    DatasetInfo,
    DefenseInfo,
    Quality,
    Recovery,
    RunPlan,
    RunResult,
    Throughput,
    Utility,
    Verification,
)
from bench.stages import Stages, check_coverage, check_needs
from bench.store import RunStore
from defenses.base import Defense
from reports.contact_sheet import contact_sheet

#: Faces on the contact sheet.
SHEET_ROWS = 8

#: Interceptions looked up at once by the floor ``nearest``, which protects all public faces for each such batch.
NEAREST_BATCH = 1024

#: False acceptance rates at which the true acceptance rate is given.
FARS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}


class Pipeline:
    """Runs one cell: a defence against an attack on a dataset.

    Everything that can be refused is refused here, before any compute.

    Args:
        config: the resolved configuration.
        console: where progress goes.

    Raises:
        UsageError: an unknown name, bad options, or an attack that the rung does not grant what it needs.
    """

    def __init__(self, config: RunConfig, *, console: Console) -> None:
        self.config = config
        self.console = console
        self._check()
        self.fabric: Fabric = make_fabric(config.device, config.training.precision)
        self.store: RunStore | None = None

    def _check(self) -> None:
        config = self.config
        plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
        attack = plugins.make_attack(config.attack, config.attack_options, config.preset)
        check_needs(attack, config.knowledge)
        for registry, name in (
            (DATASETS, config.dataset),
            (BACKBONES, config.backbone),
            (BACKBONES, config.evaluator_backbone),
            (HEADS, config.training.head),
        ):
            registry.get(name)
        if config.evaluator is not None and not config.evaluator.is_file():
            raise MissingError(f"evaluator {config.evaluator} does not exist: give the path of an ONNX recogniser")

    @property
    def directory(self) -> Path:
        """The run's folder."""
        if self.store is None:
            raise RuntimeError("the run has not started")
        return self.store.directory

    def run(self) -> RunResult:
        """Compute everything and write the run's folder.

        A run that fails or is interrupted leaves a result that says so, and every finished stage for the next try.
        """
        config = self.config
        store = self.store = RunStore(config)
        device, precision = str(self.fabric.device), str(self.fabric._precision.precision)
        store.write_manifest("started", device, precision)
        store.log("started", run_id=store.run_id)
        try:
            result = self._compute(store)
        except BaseException as error:
            status = "cancelled" if isinstance(error, KeyboardInterrupt) else "error"
            message = " ".join(str(error).split()) or type(error).__name__
            store.log(status, error=message, traceback=traceback.format_exc())
            store.write_result(RunResult(run_id=store.run_id, status=status, error=message))
            store.write_manifest(status, device, precision)
            raise
        store.write_result(result)
        store.log("success", seconds=sum(result.seconds.values()))
        store.write_manifest("success", device, precision)
        return result

    def _stages(self, log: Any) -> Stages:
        cache = StageCache(self.config.out / "cache", resume=self.config.resume)
        return Stages(self.config, fabric=self.fabric, cache=cache, bars=ProgressBars(self.console, log), log=log)

    def _compute(self, store: RunStore) -> RunResult:
        config = self.config
        stages = self._stages(store.log)
        defense = stages.defense(config.defense, config.defense_options)
        plain = stages.defense("none", {})
        splits = stages.splits
        selection = stages.selection
        probes = selection.attacked

        utility = self._utility(stages, defense, plain, store)

        attack, report = stages.fitted_attack(defense)
        covered = check_coverage(report, defense, config.knowledge)
        recovered = stages.recoveries(defense, probes)
        unprotected = recovered if defense.name == plain.name else stages.recoveries(plain, probes)

        embeddings = stages.plain_embeddings()
        started = time.perf_counter()
        lpips = self._lpips()
        judge = Judge(
            splits.victims,
            splits.pairs,
            selection,
            evaluator=stages.evaluator,
            embeddings=embeddings,
            lpips=lpips,
            replicates=config.bootstrap,
            seed=stages.streams.seed_for("bootstrap"),
            batch_size=config.batch_size,
            device=self.fabric.device,
        )
        assessments = {
            name: judge.assess(faces)
            for name, faces in {
                config.attack: recovered,
                "ceiling": unprotected,
                **self._floors(stages, attack, defense, probes),
            }.items()
        }
        stages.seconds["measure"] = time.perf_counter() - started

        started = time.perf_counter()
        throughput = self._throughput(stages, attack, defense, probes)
        stages.seconds["throughput"] = time.perf_counter() - started

        for job, file in (
            (stages.recogniser_job(defense, "provider"), "recogniser"),
            (stages.attack_job(defense), "attack"),
        ):
            store.keep_checkpoint(stages.cache.path(job.stage, job.key) / f"{file}.safetensors", f"{file}.safetensors")
        self._write_raw(store, assessments)
        self._write_sheet(store, stages, defense, probes, recovered, unprotected, assessments[config.attack])
        dataset = self._dataset(stages, len(probes))
        return RunResult(
            run_id=store.run_id,
            status="success",
            warnings=self._warnings(dataset, report, assessments),
            defense=DefenseInfo.of(defense.describe()),
            attack=AttackInfo(
                name=config.attack,
                options=attack.options.model_dump(mode="json"),
                knowledge=config.knowledge,
                saturated=report.saturated,
                states_covered=covered,
                curve=list(report.curve),
                details=report.details,
            ),
            evaluator=judge.info,
            dataset=dataset,
            utility=utility,
            recovery=self._recovery(assessments),
            throughput=throughput,
            seconds={stage: round(seconds, 3) for stage, seconds in stages.seconds.items()},
            cached=list(dict.fromkeys(stages.cached)),
            peak_memory=_peak_memory(self.fabric.device),
        )

    # -- measures --------------------------------------------------------------------------------

    def _utility(self, stages: Stages, defense: Defense, plain: Defense, store: RunStore) -> Utility:
        pairs = stages.splits.pairs
        scores = {"protected": stages.verification_scores(defense), "unprotected": stages.verification_scores(plain)}
        verifications = {name: self._verification(stages, values) for name, values in scores.items()}
        table = pd.DataFrame({"same": pairs.same.numpy(), "fold": pairs.fold.numpy()})
        for name, values in scores.items():
            table[name] = values.numpy()
        store.write_table("scores", table)
        protected = verifications["protected"]
        return Utility(**protected.model_dump(), unprotected=verifications["unprotected"])

    def _verification(self, stages: Stages, scores: Tensor) -> Verification:
        pairs, labels = stages.splits.pairs, stages.splits.victims.labels
        estimates = verification_estimates(
            scores,
            pairs.same,
            pairs.fold,
            torch.stack([labels[pairs.first], labels[pairs.second]], dim=1),
            stages.streams.generator("bootstrap"),
            fars=list(FARS.values()),
            replicates=self.config.bootstrap,
        )
        return Verification(
            accuracy=to_measure(estimates.accuracy, "utility"),
            auc=to_measure(estimates.auc, "utility"),
            eer=to_measure(estimates.eer, "privacy"),
            tar_at_far={name: to_measure(estimates.tar_at_far[far], "utility") for name, far in FARS.items()},
            accuracy_std=lfw_accuracy(scores, pairs.same, pairs.fold).std,
            pairs=len(pairs),
        )

    def _lpips(self) -> Lpips | MissingError:
        try:
            return load_lpips(None, self.fabric.device)
        except MissingError as error:
            return error

    def _floors(self, stages: Stages, attack: Attack, defense: Defense, probes: Tensor) -> dict[str, Tensor]:
        public = stages.splits.public.images
        count, size = len(probes), self.config.image_size
        return {
            "mean_face": mean_face(public, count),
            "grey": grey(count, size),
            "noise": noise(count, size, stages.streams.generator("floors")),
            "nearest": self._nearest(stages, attack, defense, probes),
        }

    def _nearest(self, stages: Stages, attack: Attack, defense: Defense, probes: Tensor) -> Tensor:
        """The public face whose representation is nearest to the intercepted one, with the adversary's knowledge."""
        generator = stages.streams.generator("floors")
        mechanism = stages.adversary(attack, defense, None, no_report).mechanism(generator)
        public = stages.splits.public.images.to(self.fabric.device)

        def protect(faces: Tensor) -> Tensor:
            return mechanism.protect(faces, generator).representation

        found = [
            nearest(representations[:, 0], public, protect, batch_size=self.config.batch_size).cpu()
            for _, representations, _ in stages.interceptions(defense, probes, batch_size=NEAREST_BATCH)
        ]
        return torch.cat(found)

    def _recovery(self, assessments: dict[str, Assessment]) -> Recovery:
        floors = {
            name: assessment.quality
            for name, assessment in assessments.items()
            if name not in (self.config.attack, "ceiling")
        }
        own: Quality = assessments[self.config.attack].quality
        return Recovery(**own.model_dump(), floors=floors, ceiling=assessments["ceiling"].quality)

    def _throughput(self, stages: Stages, attack: Attack, defense: Defense, probes: Tensor) -> dict[str, Throughput]:
        device = self.fabric.device
        index = probes[torch.arange(self.config.batch_size) % len(probes)]
        faces = to_float(stages.splits.victims.images[index].to(device))
        generator = stages.streams.generator("throughput")
        recogniser = stages.recogniser(defense)
        sent = defense.protect(faces, generator).representation
        observation = next(iter(stages.observations(attack, defense, index)))

        if not isinstance(attack, RecoveryAttack):
            raise TypeError(f"{attack.name} recovers no faces")

        def recover(representations: Tensor) -> Tensor:
            return attack.recover(observation.first(len(representations)))

        timed = {
            "protect": measure(lambda batch: defense.protect(batch, generator).representation, faces),
            "recognise": measure(recogniser.embed, sent),
            "recover": measure(recover, observation.representations),
        }
        return {name: Throughput(**asdict(speed)) for name, speed in timed.items()}

    def _warnings(self, dataset: DatasetInfo, report: FitReport, assessments: dict[str, Assessment]) -> list[str]:
        warnings = []
        if dataset.synthetic:
            warnings.append("synthetic faces: for trying the suite and for CI, not for claims about people")
        if report.saturated is False:
            warnings.append(
                "unsaturated: the attack was still improving when its budget ended; its figure is a lower bound"
            )
        if dataset.skipped:
            warnings.append(f"{dataset.skipped} images or identities were left out; events.jsonl lists them")
        ceiling, floor = assessments["ceiling"].quality.ssim.value, assessments["mean_face"].quality.ssim.value
        if ceiling is not None and floor is not None and ceiling <= floor:
            warnings.append("the attack does not beat the mean face on unprotected faces: it is broken")
        return warnings

    def _dataset(self, stages: Stages, probes: int) -> DatasetInfo:
        source, splits = stages.source, stages.splits
        parts = {"provider": splits.provider, "public": splits.public, "victims": splits.victims}
        if splits.evaluator is not None:
            parts["evaluator"] = splits.evaluator
        skipped = [*source.faces.skipped, *(source.victims.skipped if source.victims else ()), *splits.dropped]
        for item in skipped:
            stages.log("skipped", where=item.where, reason=item.reason)
        return DatasetInfo(
            name=source.name,
            synthetic=source.synthetic,
            image_size=self.config.image_size,
            identities={name: len(part.used_names) for name, part in parts.items()},
            images={name: len(part) for name, part in parts.items()},
            pairs=len(splits.pairs),
            probes=probes,
            skipped=len(skipped),
            details=source.details,
        )

    # -- artefacts -------------------------------------------------------------------------------

    def _write_raw(self, store: RunStore, assessments: dict[str, Assessment]) -> None:
        tables = [assessment.per_image.assign(method=name) for name, assessment in assessments.items()]
        store.write_table("per_image", pd.concat(tables, ignore_index=True))

    def _write_sheet(
        self,
        store: RunStore,
        stages: Stages,
        defense: Defense,
        probes: Tensor,
        recovered: Tensor,
        unprotected: Tensor,
        assessment: Assessment,
    ) -> None:
        _, representations, _ = next(iter(stages.interceptions(defense, probes)))
        rows = min(SHEET_ROWS, len(representations))
        originals = to_float(stages.splits.victims.images[probes[:rows]])
        sent = representations[:rows, 0].float().cpu()
        table = assessment.per_image.iloc[:rows]
        captions = [
            f"SSIM {row.ssim:.3f}  PSNR {row.psnr:.1f} dB  cosine {row.cosine:.2f}" for row in table.itertuples()
        ]
        kind = "synthetic faces" if stages.source.synthetic else f"dataset {stages.source.name}"
        contact_sheet(
            store.directory / "samples" / "contact-sheet.png",
            [
                ("original", [face.numpy() for face in originals]),
                ("sent", [one.numpy() for one in sent]),
                ("recovered", [face.numpy() for face in recovered[:rows]]),
                ("ceiling", [face.numpy() for face in unprotected[:rows]]),
            ],
            captions,
            f"{self.config.defense} / {self.config.attack} ({self.config.knowledge}), {kind}",
        )

    # -- dry run ---------------------------------------------------------------------------------

    def plan(self) -> RunPlan:
        """What a run would do, what of it lies in the cache, and about how long the rest takes."""
        from bench.plan import make_plan

        return make_plan(self.config, self._stages(lambda *_, **__: None))


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of the process, and of the accelerator."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
