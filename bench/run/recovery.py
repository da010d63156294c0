"""The recovery attacks of a run: what comes back, beside the floors and the ceilings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from attacks.base import Capability
from bench.errors import MissingError
from bench.measures import leak
from bench.metrics.floors import grey, mean_face, nearest, noise
from bench.metrics.perceptual import Lpips, find_alexnet
from bench.results import FloorTest, Linkage, Measure, Quality, Recovery
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages, Recovered
from bench.run.findings import FLOOR_MARGINS, RECOVERY_TOLERANCE, Findings, attack_info, floor_test, strength_curve
from bench.run.linkage import assess_recovered, no_linkage, recovered_pairs
from bench.run.pictures import write_sheet
from bench.run.scorer import Assessment, Judge, Scorer, state_inference
from bench.run.speed import recovery_speed
from bench.run.store import RunStore
from bench.run.templates import assess_inversion, inverted_table
from defenses.base import Defense
from defenses.template import TemplateDefense

#: Interceptions looked up at once by the floor ``nearest``, which protects all public faces for each such batch.
NEAREST_BATCH = 1024

#: The floor of a worst case over attacks: per victim and figure the floor that gets most.
POINTWISE_WORST = "pointwise_worst"

#: An attack that is handed one of these does not look at what was sent.
_NO_PICTURE = frozenset({Capability.TEMPLATES, Capability.SCORES})


def floor_recoveries(attacks: AttackStages, defense: Defense) -> dict[str, Tensor]:
    """Floor -> float32 (V, 3, H, W) in [0, 1]; see :mod:`bench.metrics.floors`."""
    streams, probes, size = attacks.streams, attacks.selection.attacked, attacks.config.image_size
    return {
        "mean_face": mean_face(attacks.stages.splits.public.images, len(probes)),
        "grey": grey(len(probes), size),
        "noise": torch.cat([noise(1, size, streams.generator(f"floors/noise/{image}")) for image in probes.tolist()]),
        "nearest": _nearest(attacks, defense),
    }


def _nearest(attacks: AttackStages, defense: Defense) -> Tensor:
    """The public face whose representation is nearest to the intercepted one, with the adversary's knowledge."""
    generator = attacks.streams.generator("floors")
    mechanism = attacks.mechanism(defense)(generator)
    public = attacks.stages.splits.public.images.to(attacks.stages.device)

    def protect(faces: Tensor) -> Tensor:
        return mechanism.protect(faces, generator).representation

    sent = attacks.interceptions(defense, attacks.selection.attacked, 1, batch_size=NEAREST_BATCH)
    # As many public faces at once as ever, whatever the configuration says: what they draw depends on it.
    return torch.cat([nearest(first[:, 0], public, protect).cpu() for _, first, _ in sent])


def run_recovery(
    attacks: AttackStages,
    attack_configs: Mapping[str, Sequence[AttackConfig]],
    defense: Defense,
    plain: Defense,
    store: RunStore,
    findings: Findings,
) -> None:
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
        findings: take what was found out.

    Raises:
        BenchError: an attack gave up, or was trained on less than what the defence emits.
    """
    stages = attacks.stages
    # First what takes long and is kept, then what is measured on it. An attack that was mis-driven is not let loose.
    infos, recovered, unprotected, several = {}, {}, {}, len(attack_configs) > 1
    for name, configs in attack_configs.items():
        with findings.surviving(name):
            infos[name] = attack_info(attacks, configs[-1], defense)
    for name in list(infos):
        configs = attack_configs[name]
        with findings.surviving(name):
            points = [attacks.recovered(attack_config, defense) for attack_config in configs]
            unprotected[name] = attacks.recovered(configs[-1], plain)
            recovered[name] = points
    if not recovered:
        return
    scorer = make_scorer(attacks)
    stages.alone()  # nothing is trained any longer
    with stages.timed("measure", "measure what comes back", step=True) as report:
        floor_faces = floor_recoveries(attacks, defense)
        total = len(floor_faces) + sum(map(len, recovered.values())) + len(unprotected) * (defense.name != plain.name)
        counted = itertools.count(1)

        def assess(faces: Tensor) -> Assessment:
            assessment = scorer.assess(faces)
            report(next(counted), total)
            return assessment

        report(0, total)
        floors = {name: assess(faces) for name, faces in floor_faces.items()}
        assessed = {name: [assess(point.faces) for point in points] for name, points in recovered.items()}
        ceilings = {
            name: assessed[name][-1] if defense.name == plain.name else assess(ceiling.faces)
            for name, ceiling in unprotected.items()
        }
    with stages.timed("measure", "compare with other people's faces"):
        others = {name: scorer.strangers(points[-1].faces, assessed[name][-1]) for name, points in recovered.items()}
        plain_others = {
            name: others[name] if defense.name == plain.name else scorer.strangers(ceiling.faces, ceilings[name])
            for name, ceiling in unprotected.items()
        }
        linkages = link_recovered(attacks, scorer, {name: points[-1] for name, points in assessed.items()})
    tables: dict[str, Assessment] = {}
    estimates: list[pd.DataFrame] = []
    for name in recovered:
        configs = attack_configs[name]
        info, last, scored = infos[name], recovered[name][-1], assessed[name]
        if last.queries is not None:
            asked = {"queries_per_victim": int(last.queries.sum()) / len(last.faces)}
            info = info.model_copy(update={"details": info.details | asked})
        with stages.timed("measure", f"compare {name} with the floors"):
            strength = strength_curve(attacks, configs, scored, _leakage, scorer.gain, RECOVERY_TOLERANCE)
            inference = state_inference(last.right, defense, scorer)
            # Nobody finds the nearest public face without looking at what was sent; and of unprotected faces it is
            # found by the whole picture, which is no trivial guess.
            blind = {key: floor for key, floor in floors.items() if key != "nearest"}
            attack = configs[-1].make()
            looked = blind if attack.needs & _NO_PICTURE else floors
            over = over_floors(scorer, scored[-1], looked | {"others": others[name]})
            over_plain = over_floors(scorer, ceilings[name], blind | {"others": plain_others[name]})
        recovery = between(scored[-1], floors, ceilings[name].quality)
        with stages.timed("throughput", f"time {name}"):
            speed = {"recover": recovery_speed(attacks, configs[-1], defense, last)}
        inversion = None
        if isinstance(defense, TemplateDefense):
            with stages.timed("measure", f"measure what {name} makes of templates"):
                inversion = assess_inversion(attacks, configs[-1], defense)
                if (made := attacks.inverted(configs[-1], defense)) is not None:
                    estimates.append(inverted_table(attacks, made, name))
        findings.add(
            info,
            strength,
            over,
            over_plain,
            speed,
            opens=attack.opens,
            canary=defense.canary,
            recovery=recovery,
            state_inference=inference,
            inversion=inversion,
            linkage=linkages[name],
        )
        tables[name] = scored[-1]
        if several:
            tables[f"{name} ceiling"] = ceilings[name]
        if strength is not None:
            for point, assessment in zip(strength.points[:-1], scored[:-1], strict=True):
                tables[f"{name} {strength.axis}={point.budget:.10g}"] = assessment

    worst = scorer.worst([points[-1] for points in assessed.values()])
    ceiling = scorer.worst(list(ceilings.values()))
    if several:
        # A maximum over attacks is held against a maximum over guesses.
        least = scorer.worst(list(floors.values()))
        bounds = {POINTWISE_WORST: least, "others": scorer.worst(list(others.values()))}
        tables |= {"worst case": worst, POINTWISE_WORST: least}
        findings.add_worst_case(
            between(worst, floors | {POINTWISE_WORST: least}, ceiling.quality), over_floors(scorer, worst, bounds)
        )
    findings.evaluators = scorer.evaluators
    findings.warnings += scorer.warnings
    rows = [table.per_image.assign(method=name) for name, table in (tables | {"ceiling": ceiling} | floors).items()]
    store.write_table("per_image", pd.concat(rows, ignore_index=True))
    if estimates:
        store.write_table("inverted", pd.concat(estimates, ignore_index=True))
    _write_states({name: points[-1] for name, points in recovered.items()}, attacks.selection.attacked, store)
    _write_pictures(
        attacks,
        defense,
        {name: points[-1].faces for name, points in recovered.items()},
        torch.stack([ceiling.faces for ceiling in unprotected.values()]),
        torch.stack([points[-1].values["ssim"] for points in assessed.values()]),
        worst,
        store,
    )


def link_recovered(attacks: AttackStages, scorer: Scorer, assessments: Mapping[str, Assessment]) -> dict[str, Linkage]:
    """By the attack's name, how well what it recovered is linked with plain faces, under the judge that links most."""
    victims, probes, guessed = scorer.victims, scorer.probes, scorer.guessed is not None
    protocol, draws = attacks.stages.splits.pairs, attacks.streams.generator("linkage/recovered")
    pairs = recovered_pairs(probes, victims.labels, scorer.content, protocol, draws, guessed=guessed)
    withheld = "; ".join(info.withheld for info in scorer.evaluators.values() if info.withheld is not None)
    linked = {}
    for name, assessment in assessments.items():
        found = []
        for judge in scorer.judges:
            if (embeddings := assessment.embeddings.get(judge.info.name)) is None:
                continue
            found.append(
                assess_recovered(
                    embeddings,
                    judge.embeddings,
                    judge=judge.info.name,
                    labels=victims.labels,
                    pairs=pairs,
                    probes=probes,
                    rank1=assessment.quality.judges.get(judge.info.name, assessment.quality.identity).rank1,
                    seed=scorer.seed,
                )
            )
        linked[name] = max(found, key=_linked_pairs) if found else no_linkage(withheld)
    return linked


def _linked_pairs(linkage: Linkage) -> float:
    return leak("linkage", linkage.protected_plain.accuracy)


def between(assessment: Assessment, floors: Mapping[str, Assessment], ceiling: Quality) -> Recovery:
    """What an attack got, between the floors and the ceiling."""
    return Recovery(
        **assessment.quality.model_dump(),
        floors={name: floor.quality for name, floor in floors.items()},
        ceiling=ceiling,
    )


def make_scorer(attacks: AttackStages) -> Scorer:
    """What scores the faces of a run, with LPIPS where its weights are there."""
    stages, config, device = attacks.stages, attacks.config, attacks.stages.device
    lpips: Lpips | MissingError
    try:
        lpips = Lpips(find_alexnet(), device)
    except MissingError as error:
        lpips = error
    victims, pairs = stages.splits.victims, stages.splits.pairs
    evaluations = stages.evaluations()
    with stages.timed("measure", "try the evaluator on plain pairs"):
        judges = [Judge.on(*evaluation, pairs, victims.labels) for evaluation in evaluations]
    return Scorer(
        victims,
        attacks.selection,
        judges,
        stages.guessed,
        lpips=lpips,
        replicates=config.bootstrap,
        seed=attacks.streams.seed_for("bootstrap"),
        batch_size=config.batch_size,
        device=device,
    )


def _leakage(assessment: Assessment) -> Mapping[str, Measure]:
    """The figures of a strength curve."""
    quality, identity = assessment.quality, assessment.quality.identity
    return {
        "ssim": quality.ssim,
        "psnr": quality.psnr,
        "psnr_aligned": quality.psnr_aligned,
        "cosine": identity.cosine,
        "type1_tar": identity.type1_tar,
    }


def over_floors(scorer: Scorer, assessment: Assessment, floors: Mapping[str, Assessment]) -> FloorTest:
    """Whether an attack is above ``floors``, by figures of the picture or of the person."""
    gains = {
        name: {floor: scorer.gain(name, assessment, guess) for floor, guess in floors.items()} for name in FLOOR_MARGINS
    }
    return floor_test(gains, FLOOR_MARGINS)


def captions(assessment: Assessment) -> list[str]:
    """A line per victim: what came back of it."""
    forms, values = {"ssim": "SSIM {:.3f}", "psnr": "PSNR {:.1f} dB", "cosine": "cosine {:.2f}"}, assessment.values
    told = [[form.format(v) for v in values[figure].tolist()] for figure, form in forms.items() if figure in values]
    return ["  ".join(parts) for parts in zip(*told, strict=True)]


def _write_pictures(
    attacks: AttackStages,
    defense: Defense,
    recovered: Mapping[str, Tensor],
    unprotected: Tensor,
    ssim: Tensor,
    worst: Assessment,
    store: RunStore,
) -> None:
    """The contact sheet: of several attacks each victim as under the one that gets the highest SSIM.

    Args:
        attacks, defense, store: as for :func:`run_recovery`.
        recovered: by the name of each of A attacks, float (V, 3, H, W).
        unprotected: float (A, V, 3, H, W), the same of unprotected faces.
        ssim: float (A, V), of ``recovered``.
        worst: over the attacks.
    """
    names, faces, best = list(recovered), torch.stack(list(recovered.values())), ssim.argmax(dim=0)
    rows = torch.arange(len(best))
    told = captions(worst)
    if len(names) > 1:
        told = [f"{names[number]}: {caption}" for number, caption in zip(best.tolist(), told, strict=True)]
    write_sheet(
        attacks,
        defense,
        {"recovered": faces[best, rows], "ceiling": unprotected[best, rows]},
        told,
        store,
        leakage=worst.values["ssim"],
        members=recovered if len(names) > 1 else {},
    )


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
