"""One run from end to end: data, defence, recognisers, attack, recovery, measures, result."""

from __future__ import annotations

import contextlib
import resource
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from attacks.base import LinkageAttack
from bench import plugins
from bench.data.loaders import DATASETS, MAIN, check_stream, check_there, parse_options
from bench.errors import BenchError, UsageError, in_words, one_line
from bench.memory import Memory, remembering
from bench.metrics.evaluator import check_evaluators, check_no_judge
from bench.nets.backbones import BACKBONES
from bench.progress import Log, ProgressBars
from bench.recognition.options import HEADS
from bench.results import DatasetInfo, DefenseInfo, RunPlan, RunResult
from bench.run.attack_config import attack_configs, check_attack
from bench.run.attacker import AttackStages
from bench.run.beside import Beside, StageKey, half_of_the_threads
from bench.run.config import SETS, RunConfig
from bench.run.launch import Launch, uncollected
from bench.run.logger import Tracker, check_logger
from bench.run.machines import ConnectedProcesses, choose_machine
from bench.run.protocols import check_packs, packs_of
from bench.run.provider import Stages, channel_energy, check_brought, unknown_training
from bench.run.stage import Job, StageCache
from bench.run.store import RunStore, alone
from defenses.base import Defense, noise_is_shared
from defenses.template import TemplateDefense

if TYPE_CHECKING:
    from bench.run.findings import Findings
    from bench.run.plan import Step


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
        self.launch = Launch.here()
        self.machine = choose_machine(config.device, config.training.precision, self.launch)
        self.store: RunStore | None = None
        self.memory = Memory()
        self._two_at_once = False

    def _check(self) -> None:
        config = self.config
        defense = plugins.make_defense(config.defense, config.defense_options, config.preset, config.image_size)
        self.attack_configs = attack_configs(config)
        check_logger(config.logger)
        check_evaluators(config.evaluator)
        if config.teacher is not None:
            check_no_judge(config.teacher, config.evaluator, "teacher")
        check_brought(config, defense)
        for configs in self.attack_configs.values():
            for attack_config in configs:
                check_attack(
                    attack_config.make(),
                    defense,
                    config.knowledge,
                    config.evaluator,
                    config.teacher,
                    config.recogniser,
                    config.plain_recogniser,
                )
        for role in SETS:
            if getattr(config, role) is not None:
                named = config.data_of(role)
                check_there(named.root, f"--{role.replace('_', '-')}")
                parse_options(named.dataset, config.options_of(role), image_size=config.image_size, seed=config.seed)
        for registry, name in (
            (DATASETS, config.dataset),
            (BACKBONES, config.backbone),
            (BACKBONES, config.evaluator_backbone),
            (HEADS, config.training.head),
        ):
            registry.get(name)
        if config.stream:
            check_stream(config.data_of("train_data" if config.train_data else MAIN).dataset)
            if config.teacher is not None:
                raise UsageError("a teacher embeds faces in memory: leave out --stream, or --teacher")
        self.packs = packs_of(config)

    @property
    def directory(self) -> Path:
        """The run's folder."""
        if self.store is None:
            raise RuntimeError("the run has not started")
        return self.store.directory

    def run(self, *, beside: bool = False) -> RunResult:
        """Compute everything and write the run's folder; two trainings at a time if one may be made ``beside``.

        A run that fails or is interrupted leaves a result that says so, and every finished stage for the next try. One
        that another process is at waits for it, and takes its stages out of the cache.
        """
        with alone(self.config, self._tell_waiting), remembering() as self.memory:
            self._two_at_once = beside
            return self._run()

    def _tell_waiting(self) -> None:
        self.console.print("bench: another process is at this run: waiting for it", markup=False, highlight=False)

    def _run(self) -> RunResult:
        config = self.config
        store = self.store = RunStore(config)
        device, precision = str(self.machine.device), self.machine.precision
        store.write_manifest("started", device, precision)
        store.log("started", run_id=store.run_id)
        tracker = Tracker(config, self._logger_lost)

        def log(event: str, **fields: Any) -> None:
            store.log(event, **fields)
            tracker.event(event, **fields)

        try:
            tracker.start(store.run_id, store.directory)
            processes = self._connect_processes()
            result = self._compute(store, processes, log)
            if processes is not None:
                processes.call(None)
        except BaseException as raised:
            error = BenchError(in_words(raised)) if isinstance(raised, SystemExit) else raised
            status = "cancelled" if isinstance(error, KeyboardInterrupt) else "error"
            message = one_line(in_words(error) if isinstance(error, Exception) else str(error)) or type(error).__name__
            failure = RunResult(run_id=store.run_id, status=status, error=message)
            with contextlib.suppress(OSError):  # on a full disk: then what went wrong is told, and not written down
                store.log(status, error=message, traceback=traceback.format_exc())
                store.write_result(failure)
                store.write_manifest(status, device, precision)
            tracker.finish(failure)
            if error is not raised:
                raise error from raised
            raise
        tracker.finish(result)
        store.write_result(result)
        store.log("success", seconds=sum(result.seconds.values()))
        store.write_manifest("success", device, precision)
        return result

    def help(self) -> None:
        """Train along with the first of several processes until it needs no more help; print and write nothing."""
        processes = self._connect_processes()
        assert processes is not None
        stages = self._stages(lambda *_, **__: None, processes)
        for order in processes.orders():
            stages.train_along(order)

    def _connect_processes(self) -> ConnectedProcesses | None:
        launch = self.launch
        return (
            ConnectedProcesses(self.config.device, self.config.training.precision, launch) if launch.size > 1 else None
        )

    def _stages(self, log: Any, processes: ConnectedProcesses | None = None) -> Stages:
        # Helpers always take the data that the first process has just stored.
        cache = StageCache(self.config.out / "cache", resume=self.config.resume or not self.launch.leads)
        console = self.console if self.launch.leads else Console(quiet=True)
        return Stages(
            self.config,
            machine=self.machine,
            cache=cache,
            bars=ProgressBars(console, log),
            log=log,
            processes=processes,
        )

    def _logger_lost(self, error: str) -> None:
        """Say that the rest of the run goes without its logger."""
        if self.store is not None:
            self.store.log("logger", error=error)
        self.console.print(f"--logger {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _compute(self, store: RunStore, processes: ConnectedProcesses | None, log: Log) -> RunResult:
        config = self.config
        check_packs(self.packs.values())
        stages = self._stages(log, processes)
        with stages.bars.task("load libraries"), uncollected():  # no plan needs them
            from bench.run.identification import open_distractors
            from bench.run.speed import provider_speed
            from bench.run.templates import assess_protection
            from bench.run.verification import measure_utility

            _ = self.machine.fabric
        if config.utility and config.distractors is not None:
            open_distractors(stages)  # else what is wrong with them was found after all training
        attacks = AttackStages(stages)
        defense, plain, missing = self._ahead(attacks)
        links = [isinstance(configs[-1].make(), LinkageAttack) for configs in self.attack_configs.values()]
        stages.bars.expect(len(missing) + sum(links) + (not all(links)))  # and measuring
        stages.ready(defense)
        utility, template, notes = None, None, list[str]()
        with stages.together:
            self._share(stages, missing)
            if config.utility:
                utility, notes = measure_utility(stages, defense, plain, store, self.packs.values())
            if config.utility and isinstance(defense, TemplateDefense):
                with stages.timed("measure", "measure the protection of templates"):
                    template = assess_protection(stages, defense)
            findings = self._attack(attacks, defense, plain, store)
        if not findings.results:
            raise BenchError("; ".join(findings.failed.values()))
        last = {name: configs[-1] for name, configs in self.attack_configs.items() if name in findings.results}
        asked = any(attacks.asks_provider(attack_config.make()) for attack_config in last.values())
        recognised = config.utility or asked or defense.level == "template"
        with stages.timed("throughput", "time the provider"):
            throughput = provider_speed(attacks, defense, recognise=recognised)
        kept: dict[str, Job[Any]] = {"defense": stages.defense_job(defense)} if defense.trainable else {}
        if recognised:
            kept["recogniser"] = stages.recogniser_job(defense, "provider")
        for name, attack_config in last.items():
            kept[f"attack-{name}" if findings.several else "attack"] = attacks.fit_job(attack_config, defense)
        for name, job in kept.items():
            file = f"{name.partition('-')[0]}.safetensors"
            store.keep_checkpoint(stages.cache.path(job.stage, job.key) / file, f"{name}.safetensors")

        results = [findings.results[name] for name in last]
        figures = {"attacks": dict(zip(last, results, strict=True))} if findings.several else dict(results[0])
        told = stages.brought_info(defense) if recognised else {}
        unknown = unknown_training(told)
        dataset = self._dataset(stages, len(attacks.selection.attacked))
        described = defense.describe()
        return RunResult(
            run_id=store.run_id,
            status="success",
            warnings=[
                *(*self.warnings(dataset, defense), *unknown, *stages.splits.notes, *notes, *findings.warnings),
                *self.memory.notes.values(),
            ],
            defense=DefenseInfo.of(described | channel_energy(described, stages.splits.public.images)),
            **findings.judges,
            teacher=stages.teacher_info() if recognised and config.teacher is not None else None,
            recognisers=told,
            dataset=dataset,
            utility=utility,
            template=template,
            failed=findings.failed,
            worst_case=findings.worst_case,
            worst_case_test=findings.worst_case_test,
            **figures,
            throughput=throughput | findings.throughput,
            seconds={stage: round(seconds, 3) for stage, seconds in stages.seconds.items()},
            cached=list(dict.fromkeys(stages.cached)),
            peak_memory=_peak_memory(self.machine.device, beside=len(stages.beside) > 1),
        )

    def _ahead(self, attacks: AttackStages) -> tuple[Defense, Defense, list[Step]]:
        """The defence, not ready yet, the one that does nothing, and the stages that are to be made with them."""
        from bench.run.plan import missing_steps

        config, stages = self.config, attacks.stages
        defense, plain = stages.unfitted(config.defense, config.defense_options), stages.defense("none", {})
        return defense, plain, missing_steps(config, self.attack_configs, attacks, defense, plain)

    def _share(self, stages: Stages, missing: Sequence[Step]) -> None:
        """Let a second process make trainings, where that may be, with half of the threads."""
        if not self._two_at_once:
            return
        _ = stages.splits  # rendered or decoded with all threads
        # Fewer threads in any case: how many are left to train must not change how one is.
        stages.together.enter_context(half_of_the_threads())
        jobs = {(step.job.stage, step.job.key): step.job for step in missing if step.trains}
        stages.beside = {key: job for key, job in jobs.items() if stages.cache.wanting(*key)}
        if len(stages.beside) > 1:
            show = stages.together.enter_context(stages.bars.beside())

            def tell(event: str, **fields: Any) -> None:
                stages.log(event, **fields)
                show(*((fields["task"], fields["done"], fields["total"]) if event == "progress" else ("", 0, None)))

            stages.together.enter_context(Beside(self.config, list(stages.beside), tell))

    def make_beside(self, wanted: Sequence[StageKey], tell: Log) -> None:
        """Make those of the ``wanted`` trainings that are not there and that nobody is at, the last first."""
        stages = self._stages(lambda *_, **__: None)
        stages.bars = ProgressBars(Console(quiet=True), tell)
        defense, _, missing = self._ahead(AttackStages(stages))
        stages.ready(defense)
        jobs = {(step.job.stage, step.job.key): step.job for step in missing}
        for key in reversed(wanted):
            if key in jobs and stages.cache.wanting(*key):
                try:
                    with remembering():
                        stages.do(jobs[key])
                except Exception as error:
                    tell("beside", stage=key[0], error=one_line(in_words(error)))

    def _attack(self, attacks: AttackStages, defense: Defense, plain: Defense, store: RunStore) -> Findings:
        """Run the recovery attacks, then the linkage attacks."""
        from bench.run.findings import Findings
        from bench.run.linkage import run_linkage
        from bench.run.recovery import run_recovery

        configs = self.attack_configs
        linkage = {name: configs[name] for name in configs if isinstance(configs[name][-1].make(), LinkageAttack)}
        recovery = {name: configs[name] for name in configs if name not in linkage}
        findings = Findings(several=len(configs) > 1)
        if recovery:
            run_recovery(attacks, recovery, defense, plain, store, findings)
        attacks.stages.alone()
        if linkage:
            run_linkage(attacks, linkage, defense, store, findings, sheet=not recovery)
        return findings

    def warnings(self, dataset: DatasetInfo, defense: Defense) -> list[str]:
        """What a reader has to know of a result on this data and this defence, whatever the attacks."""
        warnings = []
        if dataset.synthetic:
            warnings.append("synthetic faces: for trying the suite and for CI, not for claims about people")
        if self.config.limit is not None:
            warnings.append(f"limit: {self.config.limit} faces of the dataset at most were used, for a quick look")
        if not self.config.utility:
            warnings.append("utility was not measured (--no-utility): say nothing of the defence's worth from this run")
        if self.config.training.label_noise:
            share = self.config.training.label_noise
            warnings.append(
                f"{share:.0%} of the provider's training labels were wrong on purpose (training.label_noise)"
            )
        if left := dataset.details.get("public_left_on_disk"):
            warnings.append(
                f"the attacker learnt from {dataset.images['public']} of the {dataset.images['public'] + left} public "
                "images (stream_images): one who uses all may get more"
            )
        if dataset.skipped:
            warnings.append(f"{dataset.skipped} images or identities were left out; events.jsonl lists them")
        if noise_is_shared(defense):
            warnings.append(
                f"noise shared: {defense.name} draws its noise once for a batch, so up to {self.config.batch_size} "
                "victims were protected under one draw: differences between them are free of it"
            )
        return warnings

    def _dataset(self, stages: Stages, probes: int) -> DatasetInfo:
        source, splits = stages.victim_source, stages.splits
        sets = [faces for each in stages.sources.values() for faces in (each.faces, each.victims) if faces is not None]
        skipped = [*(item for faces in sets for item in faces.skipped), *splits.dropped]
        for item in skipped:
            stages.log("skipped", where=item.where, reason=item.reason)
        for name, left in splits.left_on_disk.items():
            stages.log("left_on_disk", part=name, images=left)
        return DatasetInfo(
            name=source.name,
            sources={role: each.name for role, each in stages.sources.items()} if len(stages.sources) > 1 else {},
            synthetic=any(each.synthetic for each in stages.sources.values()),
            image_size=self.config.image_size,
            identities={name: len(part.used_names) for name, part in splits.parts.items()},
            images={name: len(part) for name, part in splits.parts.items()},
            pairs=len(splits.pairs),
            probes=probes,
            skipped=len(skipped),
            details=source.details | {f"{name}_left_on_disk": left for name, left in splits.left_on_disk.items()},
        )

    # -- dry run ---------------------------------------------------------------------------------

    def plan(self, *, measure: bool = False, beside: bool = False) -> RunPlan:
        """What a run would do, what of it lies in the cache, and about how long the rest takes.

        Two trainings are made at a time if one may be made ``beside``. Nothing is computed, unless it is to ``measure``
        how long what is not cached takes: a minute at most.
        """
        from bench.run.plan import make_plan

        return make_plan(self.config, self.attack_configs, self.attack_stages(), measure=measure, beside=beside)

    def attack_stages(self) -> AttackStages:
        """What the run is made of, computed or out of the cache as it is asked for; nothing is logged."""
        return AttackStages(self._stages(lambda *_, **__: None))


def _peak_memory(device: torch.device, *, beside: bool) -> dict[str, int]:
    """Peak bytes of the process, of the one ``beside`` it if there was one, and of the accelerator."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if beside:
        peak["beside_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
