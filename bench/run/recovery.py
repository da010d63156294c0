"""The recovery attacks of a run: what comes back, beside the floors and the ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from bench.errors import MissingError
from bench.metrics.floors import grey, mean_face, nearest, noise
from bench.metrics.perceptual import Lpips, load_lpips
from bench.results import AttackInfo, AttackResult, Measure, Quality, Recovery, StrengthCurve, Throughput
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages, Recovered
from bench.run.config import Budget
from bench.run.findings import (
    RECOVERY_TOLERANCE,
    Findings,
    about,
    attack_info,
    mark_unsaturated,
    spent,
    strength_curve,
)
from bench.run.pictures import write_sheet
from bench.run.scorer import Assessment, Scorer, state_inference
from bench.run.speed import recovery_speed
from bench.run.store import RunStore
from defenses.base import Defense

#: Interceptions looked up at once by the floor ``nearest``, which protects all public faces for each such batch.
NEAREST_BATCH = 1024


def floor_recoveries(attacks: AttackStages, defense: Defense, probes: Tensor) -> dict[str, Tensor]:
    """Floor -> float32 (V, 3, H, W) in [0, 1]; see :mod:`bench.metrics.floors`."""
    streams, public = attacks.streams, attacks.stages.splits.public.images
    count, size = len(probes), attacks.config.image_size
    return {
        "mean_face": mean_face(public, count),
        "grey": grey(count, size),
        "noise": torch.cat([noise(1, size, streams.generator(f"floors/noise/{image}")) for image in probes.tolist()]),
        "nearest": _nearest(attacks, defense, probes),
    }


def _nearest(attacks: AttackStages, defense: Defense, probes: Tensor) -> Tensor:
    """The public face whose representation is nearest to the intercepted one, with the adversary's knowledge."""
    generator = attacks.streams.generator("floors")
    mechanism = attacks.mechanism(defense)(generator)
    public = attacks.stages.splits.public.images.to(attacks.fabric.device)

    def protect(faces: Tensor) -> Tensor:
        return mechanism.protect(faces, generator).representation

    found = [
        nearest(representations[:, 0], public, protect, batch_size=attacks.config.batch_size).cpu()
        for _, representations, _ in attacks.interceptions(defense, probes, 1, batch_size=NEAREST_BATCH)
    ]
    return torch.cat(found)


@dataclass(frozen=True)
class ScoredRecovery:
    """What an attack recovered, beside the originals.

    Attributes:
        recovered: all that the attack gave back.
        assessment: how near it comes.
    """

    recovered: Recovered
    assessment: Assessment


def run_recovery(
    attacks: AttackStages,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    defense: Defense,
    plain: Defense,
    store: RunStore,
    *,
    several: bool,
) -> Findings:
    """Let recovery attacks loose on a defence and measure what comes back.

    Averages over attacks would hide that different victims fall to different ones, so of several attacks there is the
    pointwise worst case, too (per-example evaluation in Carlini et al., On Evaluating Adversarial Robustness, arXiv
    1902.06705).

    Args:
        attacks: hands attacks what they may have, and runs them.
        attack_configs: by the attack's name, a configuration per budget; the last is the run's own.
        defense: the one attacked.
        plain: the defence that does nothing, for the ceiling.
        store: takes the raw values and the contact sheet.
        several: whether the run has other attacks, of any kind.

    Raises:
        BenchError: an attack gave up, or was trained on less than what the defence emits.
    """
    stages, probes = attacks.stages, attacks.selection.attacked
    # First what takes long and is kept, then what is measured on it. An attack that was mis-driven is not let loose.
    infos = {name: attack_info(attacks, configs[-1], defense) for name, configs in attack_configs.items()}
    for configs in attack_configs.values():
        for attack_config, target in [*((attack_config, defense) for attack_config in configs), (configs[-1], plain)]:
            attacks.recovered(attack_config, target)
    scorer = make_scorer(attacks)

    def score(attack_config: AttackConfig, target: Defense) -> ScoredRecovery:
        recovered = attacks.recovered(attack_config, target)
        return ScoredRecovery(recovered, scorer.assess(recovered.faces))

    with stages.timed("measure"):
        floors = {name: scorer.assess(faces) for name, faces in floor_recoveries(attacks, defense, probes).items()}
        scored = {name: [score(config, defense) for config in configs] for name, configs in attack_configs.items()}
        ceilings = {name: score(configs[-1], plain) for name, configs in attack_configs.items()}
    results: dict[str, AttackResult] = {}
    warnings: list[str] = []
    throughput: dict[str, Throughput] = {}
    tables: dict[str, Assessment] = {}
    for name, configs in attack_configs.items():
        *_, last = scored[name]
        with stages.timed("measure"):
            strength = _strength(attacks, scorer, configs, scored[name]) if attacks.config.budget else None
            inference = state_inference(last.recovered.right, defense, scorer)
        info, unsaturated = mark_unsaturated(_with_queries(infos[name], last.recovered), strength)
        recovery = _recovery(last.assessment, floors, ceilings[name].assessment)
        results[name] = AttackResult(attack=info, recovery=recovery, state_inference=inference, strength=strength)
        warnings += about(name, several, [*unsaturated, *_broken(recovery)])
        with stages.timed("throughput"):
            operation = f"recover {name}" if several else "recover"
            throughput[operation] = recovery_speed(attacks, configs[-1], defense, probes, last.recovered)
        tables[name] = last.assessment
        if len(attack_configs) > 1:
            tables[f"{name} ceiling"] = ceilings[name].assessment
        if strength is not None:
            for point, earlier in zip(strength.points[:-1], scored[name][:-1], strict=True):
                tables[f"{name} {strength.axis}={point.budget:.10g}"] = earlier.assessment

    worst = scorer.worst([runs[-1].assessment for runs in scored.values()])
    ceiling = scorer.worst([run.assessment for run in ceilings.values()])
    if len(results) > 1:
        tables["worst case"] = worst
    _write_raw(tables | {"ceiling": ceiling, **floors}, store)
    _write_states({name: runs[-1].recovered for name, runs in scored.items()}, probes, store)
    _write_pictures(attacks, defense, scored, ceilings, worst, store)
    return Findings(
        results=results,
        worst_case=_recovery(worst, floors, ceiling) if len(results) > 1 else None,
        evaluator=scorer.info,
        warnings=warnings,
        throughput=throughput,
    )


def _recovery(assessment: Assessment, floors: Mapping[str, Assessment], ceiling: Assessment) -> Recovery:
    return Recovery(
        **assessment.quality.model_dump(),
        floors={name: floor.quality for name, floor in floors.items()},
        ceiling=ceiling.quality,
    )


def _with_queries(info: AttackInfo, recovered: Recovered) -> AttackInfo:
    """Also tells how often the attack asked the provider per victim, if it did."""
    if recovered.queries is None:
        return info
    details = {**info.details, "queries_per_victim": recovered.queries / len(recovered.faces)}
    return info.model_copy(update={"details": details})


def make_scorer(attacks: AttackStages) -> Scorer:
    """What scores the faces of a run, with LPIPS where its weights are there."""
    stages, config, device = attacks.stages, attacks.config, attacks.fabric.device
    lpips: Lpips | MissingError
    try:
        lpips = load_lpips(None, device)
    except MissingError as error:
        lpips = error
    return Scorer(
        stages.splits.victims,
        stages.splits.pairs,
        attacks.selection,
        evaluator=stages.evaluator,
        embeddings=stages.plain_embeddings(),
        lpips=lpips,
        replicates=config.bootstrap,
        seed=attacks.streams.seed_for("bootstrap"),
        batch_size=config.batch_size,
        device=device,
    )


def _strength(
    attacks: AttackStages, scorer: Scorer, attack_configs: Sequence[AttackConfig], scored: Sequence[ScoredRecovery]
) -> StrengthCurve:
    budget = Budget.parse(attacks.config.budget or "")
    return strength_curve(
        budget.axis,
        spent(attacks, attack_configs, budget),
        [_leakage(run.assessment.quality) for run in scored],
        lambda name: scorer.gain(name, scored[-1].assessment, scored[-2].assessment),
        RECOVERY_TOLERANCE,
    )


def _leakage(quality: Quality) -> Mapping[str, Measure]:
    """The figures of a strength curve."""
    own = {name: getattr(quality, name) for name in ("ssim", "psnr", "psnr_aligned")}
    return {**own, "cosine": quality.identity.cosine, "type1_tar": quality.identity.type1_tar}


def _broken(recovery: Recovery) -> list[str]:
    """A warning where the attack gets nothing even out of a face that nobody protects."""
    ceiling = recovery.ceiling
    # Not the nearest public face: it is looked up by the whole picture, and not every attack sees one.
    floors = [floor for name, floor in recovery.floors.items() if name != "nearest"]

    def beaten(value: float | None, others: Sequence[float | None]) -> bool:
        return value is not None and all(other is None or value > other for other in others)

    image = beaten(ceiling.ssim.value, [floor.ssim.value for floor in floors])
    identity = beaten(ceiling.identity.cosine.value, [floor.identity.cosine.value for floor in floors])
    if image or identity:
        return []
    return [
        "the attack beats no trivial guess on unprotected faces, neither as a picture nor as a person: it is broken"
    ]


def _write_pictures(
    attacks: AttackStages,
    defense: Defense,
    scored: Mapping[str, Sequence[ScoredRecovery]],
    ceilings: Mapping[str, ScoredRecovery],
    worst: Assessment,
    store: RunStore,
) -> None:
    """The contact sheet: of several attacks each victim as under the one that gets the highest SSIM."""
    probes, names = attacks.selection.attacked, list(scored)
    faces = torch.stack([runs[-1].recovered.faces for runs in scored.values()])
    unprotected = torch.stack([run.recovered.faces for run in ceilings.values()])
    best = torch.stack([runs[-1].assessment.values["ssim"] for runs in scored.values()]).argmax(dim=0)
    rows = torch.arange(len(probes))
    figures = zip(*(worst.values[name].tolist() for name in ("ssim", "psnr", "cosine")), strict=True)
    captions = [f"SSIM {ssim:.3f}  PSNR {psnr:.1f} dB  cosine {cosine:.2f}" for ssim, psnr, cosine in figures]
    if len(names) > 1:
        captions = [f"{names[number]}: {caption}" for number, caption in zip(best.tolist(), captions, strict=True)]
    write_sheet(
        attacks,
        defense,
        probes,
        {"recovered": faces[best, rows], "ceiling": unprotected[best, rows]},
        captions,
        store,
        leakage=worst.values["ssim"],
        members=dict(zip(names, faces, strict=True)) if len(names) > 1 else None,
    )


def _write_raw(assessments: Mapping[str, Assessment], store: RunStore) -> None:
    tables = [assessment.per_image.assign(method=name) for name, assessment in assessments.items()]
    store.write_table("per_image", pd.concat(tables, ignore_index=True))


def _write_states(recovered: Mapping[str, Recovered], probes: Tensor, store: RunStore) -> None:
    """A row per interception of every attack that named states: which was drawn, and which it named."""
    tables = []
    for name, faces in recovered.items():
        if (named := faces.named) is None:
            continue
        index = pd.MultiIndex.from_product([probes.tolist(), range(named.shape[1])], names=["image", "interception"])
        drawn = pd.DataFrame(named.flatten(0, 1).numpy(), index=index, columns=["drawn", "named"])
        tables.append(drawn.reset_index().assign(attack=name))
    if tables:
        store.write_table("state_inference", pd.concat(tables, ignore_index=True))
