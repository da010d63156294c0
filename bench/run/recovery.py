"""A run of a recovery attack, alone or composed of several: what comes back, beside the floors and the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from bench.errors import MissingError
from bench.metrics.floors import grey, mean_face, nearest, noise
from bench.metrics.perceptual import Lpips, load_lpips
from bench.results import AttackInfo, AttackResult, Measure, Quality, Recovery, StrengthCurve, Throughput
from bench.run.attack_config import AttackConfig, members
from bench.run.attacker import AttackStages, Recovered
from bench.run.config import Budget
from bench.run.findings import (
    RECOVERY_TOLERANCE,
    Findings,
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
class Outcome:
    """Recovered faces, judged.

    Attributes:
        assessment: of a composite attack the pointwise worst case.
        faces: float32 (V, 3, H, W), for looking at; of a composite attack each victim's under ``best``.
        recovered: all that the attack gave back; None of a composite one.
        members: name -> outcome, of a composite attack.
        best: of a composite attack, per victim, the member with the highest SSIM.
    """

    assessment: Assessment
    faces: Tensor
    recovered: Recovered | None = None
    members: dict[str, Outcome] = field(default_factory=dict)
    best: tuple[str, ...] = ()


def outcome(
    attacks: AttackStages, scorer: Scorer, attack_config: AttackConfig, defense: Defense, probes: Tensor
) -> Outcome:
    """Recover the victim images ``probes`` from ``defense`` and score the faces."""
    found = {}
    for name, member in members(attack_config).items():
        recovered = attacks.recovered(member, defense)
        found[name] = Outcome(scorer.assess(recovered.faces), recovered.faces, recovered)
    if set(found) == {attack_config.name}:
        return found[attack_config.name]
    names = tuple(found)
    best = torch.stack([one.assessment.values["ssim"] for one in found.values()]).argmax(dim=0)
    faces = torch.stack([one.faces for one in found.values()])[best, torch.arange(len(probes))]
    worst = scorer.worst([one.assessment for one in found.values()])
    return Outcome(worst, faces, members=found, best=tuple(names[i] for i in best.tolist()))


def run_recovery(
    attacks: AttackStages, attack_configs: Sequence[AttackConfig], defense: Defense, plain: Defense, store: RunStore
) -> Findings:
    """Let a recovery attack loose on a defence and measure what comes back.

    Args:
        attacks: hands attacks what they may have, and runs them.
        attack_configs: one per budget; the last is the run's own.
        defense: the one attacked.
        plain: the defence that does nothing, for the ceiling.
        store: takes the raw values and the contact sheet.

    Raises:
        BenchError: an attack gave up, or was trained on less than what the defence emits.
    """
    stages, own = attacks.stages, attack_configs[-1]
    probes = attacks.selection.attacked
    # First what takes long and is kept, then what is measured on it.
    infos = _infos(attacks, own, defense)
    for attack_config, target in [*((one, defense) for one in attack_configs), (own, plain)]:
        for member in members(attack_config).values():
            attacks.recovered(member, target)
    scorer = make_scorer(attacks)

    with stages.timed("measure"):
        outcomes = [outcome(attacks, scorer, attack_config, defense, probes) for attack_config in attack_configs]
        result = outcomes[-1]
        ceiling = result if defense.name == plain.name else outcome(attacks, scorer, own, plain, probes)
        floors = {name: scorer.assess(faces) for name, faces in floor_recoveries(attacks, defense, probes).items()}

        def recovery(got: Outcome, most: Outcome) -> Recovery:
            bounds = {name: floor.quality for name, floor in floors.items()}
            return Recovery(**got.assessment.quality.model_dump(), floors=bounds, ceiling=most.assessment.quality)

        parts: dict[str, AttackResult] = {}
        tables: dict[str, Assessment] = {}
        warnings: list[str] = []
        for name, info in infos.items():
            curve = [one.members.get(name, one) for one in outcomes]
            got, most = curve[-1], ceiling.members.get(name, ceiling)
            strength = _strength(attacks, scorer, attack_configs, curve) if attacks.config.budget else None
            marked, late = mark_unsaturated(info, strength)
            warnings += [f"{name}: {warning}" if result.members else warning for warning in late]
            parts[name] = AttackResult(
                attack=marked,
                recovery=recovery(got, most),
                state_inference=state_inference(got.recovered.right, defense, scorer) if got.recovered else None,
                strength=strength,
            )
            tables |= {name: got.assessment, f"{name} ceiling" if result.members else "ceiling": most.assessment}
            for point, earlier in zip(strength.points[:-1] if strength else (), curve[:-1], strict=False):
                assert strength is not None
                tables[f"{name} {strength.axis}={point.budget:.10g}"] = earlier.assessment
    if result.members:
        tables["worst case"] = result.assessment
    _write_raw(tables | floors, store)
    _write_states(own.name, result, probes, store)
    columns = {"recovered": result.faces, "ceiling": ceiling.faces}
    write_sheet(
        attacks,
        defense,
        probes,
        columns,
        _captions(result),
        store,
        leakage=result.assessment.values["ssim"],
        members={name: member.faces for name, member in result.members.items()},
    )
    with stages.timed("throughput"):
        throughput = _throughput(attacks, own, defense, result)
    worst = recovery(result, ceiling)
    warnings += _broken(worst)
    if result.members:
        return Findings(
            warnings=warnings, evaluator=scorer.info, attacks=parts, worst_case=worst, throughput=throughput
        )
    only = {name: getattr(parts[own.name], name) for name in ("attack", "recovery", "state_inference", "strength")}
    return Findings(warnings=warnings, evaluator=scorer.info, throughput=throughput, **only)


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


def _infos(attacks: AttackStages, attack_config: AttackConfig, defense: Defense) -> dict[str, AttackInfo]:
    probes = attacks.selection.attacked
    infos = {}
    for name, member in members(attack_config).items():
        # Before anything is recovered: an attack that was mis-driven is not let loose.
        infos[name] = attack_info(attacks, member, defense)
        queries = attacks.recovered(member, defense).queries
        if queries is not None:
            details = {**infos[name].details, "queries_per_victim": queries / len(probes)}
            infos[name] = infos[name].model_copy(update={"details": details})
    return infos


def _strength(
    attacks: AttackStages, scorer: Scorer, attack_configs: Sequence[AttackConfig], outcomes: Sequence[Outcome]
) -> StrengthCurve:
    budget = Budget.parse(attacks.config.budget or "")
    return strength_curve(
        budget.axis,
        spent(attacks, attack_configs, budget),
        [_leakage(one.assessment.quality) for one in outcomes],
        lambda name: scorer.gain(name, outcomes[-1].assessment, outcomes[-2].assessment),
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


def _throughput(
    attacks: AttackStages, attack_config: AttackConfig, defense: Defense, result: Outcome
) -> dict[str, Throughput]:
    probes = attacks.selection.attacked
    if result.recovered is not None:
        return {"recover": recovery_speed(attacks, attack_config, defense, probes, result.recovered)}
    found = {}
    for name, member in members(attack_config).items():
        recovered = result.members[name].recovered
        assert recovered is not None  # composite attacks do not nest
        found[f"recover {name}"] = recovery_speed(attacks, member, defense, probes, recovered)
    return found


def _captions(result: Outcome) -> list[str]:
    values = result.assessment.values
    rows = zip(values["ssim"].tolist(), values["psnr"].tolist(), values["cosine"].tolist(), strict=True)
    captions = [f"SSIM {ssim:.3f}  PSNR {psnr:.1f} dB  cosine {cosine:.2f}" for ssim, psnr, cosine in rows]
    if result.best:
        captions = [f"{name}: {caption}" for name, caption in zip(result.best, captions, strict=True)]
    return captions


def _write_raw(assessments: Mapping[str, Assessment], store: RunStore) -> None:
    tables = [assessment.per_image.assign(method=name) for name, assessment in assessments.items()]
    store.write_table("per_image", pd.concat(tables, ignore_index=True))


def _write_states(name: str, result: Outcome, probes: Tensor, store: RunStore) -> None:
    """A row per interception of every attack that named states: which was drawn, and which it named."""
    found = {name: result, **result.members}
    tables = []
    for attack, one in found.items():
        if one.recovered is None or one.recovered.named is None:
            continue
        named = one.recovered.named
        index = pd.MultiIndex.from_product([probes.tolist(), range(named.shape[1])], names=["image", "interception"])
        drawn = pd.DataFrame(named.flatten(0, 1).numpy(), index=index, columns=["drawn", "named"])
        tables.append(drawn.reset_index().assign(attack=attack))
    if tables:
        store.write_table("state_inference", pd.concat(tables, ignore_index=True))
