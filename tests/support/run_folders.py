"""Run directories as the harness writes them, with made-up figures."""

import hashlib
import json

import numpy as np
import pandas as pd
from PIL import Image

from bench.results import (
    PROTOCOL_VERSION,
    AttackInfo,
    AttackResult,
    DatasetInfo,
    DefenseInfo,
    Distractors,
    EvaluatorInfo,
    FloorTest,
    Identification,
    Identity,
    Inversion,
    LargeGallery,
    Linkage,
    Measure,
    Protocol,
    Quality,
    Quartiles,
    Recovery,
    RunResult,
    StateInference,
    StrengthCurve,
    StrengthPoint,
    TemplateProtection,
    TemplateProtocol,
    TemplateRecognition,
    Throughput,
    Utility,
    Verification,
)

VICTIMS = 8


def measure(value, spread=0.01, direction="leakage"):
    if value is None:
        return Measure(value=None, direction=direction, reason="no weights")
    return Measure(value=value, ci95=(value - spread, value + spread), n=VICTIMS, direction=direction)


def share(value):
    """A rate of which people who are all alike leave no interval."""
    alike = {"ci95": None, "reason": "no confidence interval: every resample gives the same value"}
    return measure(value).model_copy(update=alike if value in (0.0, 1.0) else {})


def quality(ssim, cosine=0.5, type2=None):
    """A recovered face's quality; ``type2`` is how many pass at FAR 1e-3, which small sets cannot tell."""
    return Quality(
        ssim=measure(ssim),
        psnr=measure(30 * ssim, 0.5),
        psnr_aligned=measure(35 * ssim, 0.5),
        ms_ssim=measure(ssim),
        lpips=measure(None, direction="privacy"),
        identity=Identity(
            type1_tar=measure(cosine, 0.1),
            type2_tar=measure(cosine),
            rank1=measure(cosine),
            cosine=measure(cosine),
            type2_far_1e3=None if type2 is None else share(type2),
        ),
    )


def verification(accuracy, direction="leakage"):
    error = "privacy" if direction == "leakage" else "cost"
    return Verification(
        accuracy=measure(accuracy, 0.02, direction),
        auc=measure(0.9, direction=direction),
        eer=measure(0.1, direction=error),
        tar_at_far={"1e-1": measure(accuracy, direction=direction), "1e-2": measure(accuracy / 2, direction=direction)},
        pairs=100,
    )


def template_protection(stolen=0.85, *, key_stored=False, d_sys=0.2, maximal=0.5):
    """A template defence under which 98 % of pairs are told apart with own keys, ``stolen`` with one key for all."""
    return TemplateProtection(
        key_stored=key_stored,
        verification={
            "own": verification(0.98, "utility"), "stolen": verification(stolen, "utility"),
            "unknown": verification(0.52),
        },
        replay_far_1e2=measure(0.011, 0.001), replay_far_1e3=measure(0.002, 0.001),
        diverse_far_1e2=measure(0.97, direction="privacy"), diverse_far_1e3=measure(0.99, direction="privacy"),
        d_sys=measure(d_sys), d_sys_chance=0.048, maximal=measure(maximal),
    )  # fmt: skip


def inversion(passed=0.6, *, records=1, key=True):
    """What an attack makes of stolen templates, of which ``passed`` pass at FAR 1e-2."""
    return Inversion(
        records=records, key=key, cosine=measure(0.71), floor=measure(0.13),
        same_far_1e2=measure(passed), same_far_1e3=measure(passed / 2), renewed_far_1e2=measure(passed - 0.05),
        renewed_far_1e3=measure(passed / 4), d_sys=measure(0.33), maximal=measure(0.25), d_sys_plain=measure(0.44),
    )  # fmt: skip


def throughput(rate):
    quartiles = Quartiles(median=rate, q1=0.9 * rate, q3=1.1 * rate)
    return Throughput(
        images_per_second=quartiles, latency_ms=quartiles, batch=64, repeats=5, dtype="float32", device="cpu"
    )


def defense_info(name="partialface", options=None, entropy=4.17, **details):
    return DefenseInfo(
        name=name, options=options or {}, representation_shape=(27, 64, 64), views=3, states=18, entropy_bits=entropy,
        bytes_per_face=442368, details=details,
    )  # fmt: skip


def dataset_info(name="synthetic", people=4, images=VICTIMS, image_size=64, *, synthetic=True, **details):
    return DatasetInfo(
        name=name, synthetic=synthetic, image_size=image_size, identities={"victims": people}, images={}, pairs=100,
        probes=images, skipped=0, details=details,
    )  # fmt: skip


def attack_info(name, knowledge="whitebox", *, saturated=True, above_floor=True):
    curve = [(100, 0.3), (200, 0.2), (400, 0.15)]
    low = 0.01 if above_floor else -0.03
    gain = Measure(value=low + 0.02, ci95=(low, low + 0.04), n=VICTIMS, direction="leakage")
    tests = {"above_floor": above_floor, "broken": False}
    if above_floor is not None:
        floors, margins = {"ssim": "mean_face"}, {"ssim": 0.01}
        tests["floor_test"] = FloorTest(above=above_floor, gains={"ssim": gain}, floors=floors, margins=margins)
    return AttackInfo(
        name=name, options={}, knowledge=knowledge, saturated=saturated, states_covered=True, curve=curve, **tests
    )


def searches(rank1, **more):
    """What is found in a gallery of 20, with a TPIR of ``rank1`` - 0.1 at FPIR 1e-1."""
    found = {"rank1": measure(rank1, direction="utility"), "tpir_at_fpir": {"1e-1": measure(rank1 - 0.1)}}
    return {**found, "gallery": 20, "probes": 50, "mated": 40, **more}


def templates_and_galleries():
    """IJB-C, and the victims among 100 distractors, of whom ten are counted apart."""

    def pooled(tar):
        rates = {"1e-6": measure(None, direction="utility"), "1e-4": measure(tar, direction="utility")}
        return TemplateRecognition(tar_at_far=rates, pairs=400, mean=Identification(**searches(tar - 0.1)))

    def among(rank1):
        parts = {"10": measure(rank1 + 0.1, direction="utility"), "100": measure(rank1, direction="utility")}
        return LargeGallery(**searches(rank1, rank1_among=parts))

    janus = TemplateProtocol(templates=60, images=400, protected=pooled(0.8), unprotected=pooled(0.95))
    large = Distractors(source="folder", distractors=100, protected=among(0.5), unprotected=among(0.9))
    return {"templates": {"ijbc": janus}, "distractors": large}


def utility(accuracy, unprotected, protocols=None, **further):
    return Utility(
        **verification(accuracy, "utility").model_dump(),
        unprotected=verification(unprotected, "utility"),
        **further,
        protocols={
            name: Protocol(protected=verification(of[0], "utility"), unprotected=verification(of[1], "utility"))
            for name, of in (protocols or {}).items()
        },
    )


def together(parts, worst_case=None):
    """The fields of a result that hold what its attacks got."""
    return dict(*parts.values()) if len(parts) == 1 else {"attacks": parts, "worst_case": worst_case}


def write_run(
    folder,
    *,
    defense="partialface",
    attack="unet",
    ssim=(0.7,) * VICTIMS,
    accuracy=0.9,
    cosine=0.5,
    synthetic=True,
    knowledge="whitebox",
    seed=0,
    protocol=PROTOCOL_VERSION,
    linkage=False,
    strength=False,
    options=None,
    details=None,
    saturated=True,
    above_floor=True,
    samples=True,
    error=None,
    image_size=64,
    dataset=None,
    training=None,
    template=None,
    inversion=None,
    protocols=None,
    galleries=False,
    type2=None,
    killed=False,
    started="2026-01-01T00:00:00+00:00",
):
    """Write one run directory and return it.

    ``ssim`` is of each victim; of several attacks, separated by commas, that of the n-th is moved on by n victims.
    ``error`` makes it a failed run, ``killed`` one that was interrupted. ``type2`` says of each victim whether what was
    recovered passes at FAR 1e-3, as 5 % of guesses and all unprotected faces do. ``template`` makes it a run of a
    template defence, which draws no states; ``inversion`` takes the place of recovery. ``protocols`` are accuracies, of
    further packs by name, behind the defence and without it; with ``galleries`` templates and a search among
    distractors were measured.
    """
    folder.mkdir(parents=True)
    run_id = folder.name
    dataset = dataset or ("synthetic" if synthetic else "insightface")
    config = {
        "defense": defense, "attack": attack, "dataset": dataset, "knowledge": knowledge, "seed": seed,
        "image_size": image_size, "preset": "quick", "evaluator": None, "evaluator_backbone": "mobilefacenet",
        "data_root": "/home/somebody/faces", "defense_options": options or {}, "attack_options": {}, "queries": 1,
        "dataset_options": {}, "training": training or {},
    }  # fmt: skip
    if error is not None or killed:
        status, error = ("cancelled", "KeyboardInterrupt") if killed else ("error", error)
        result = RunResult(run_id=run_id, protocol=protocol, status=status, error=error)
    else:
        curve = StrengthCurve(
            axis="data",
            points=[
                StrengthPoint(budget=budget, values={"ssim": measure(budget / 1000)}) for budget in (200, 400, 800)
            ],
            gain_of_last_doubling={"ssim": measure(0.4)},
            tolerance={"ssim": 0.005},
            unsaturated=True,
        )
        link = Linkage(
            protected_plain=verification(0.8),
            protected_protected=verification(0.7),
            plain=verification(0.95),
            rank1=measure(0.3),
            d_sys={"protected_plain": measure(0.4), "protected_protected": measure(0.3)},
        )
        mean = float(np.mean(ssim))
        names = attack.split(",")
        states_named = StateInference(faces=measure(0.6), channels=measure(0.9), chance=1 / 18)
        passing = (None, None, None) if type2 is None else (float(np.mean(type2)), 0.05, 1.0)
        floors = {"mean_face": quality(0.4, 0.1, passing[1]), "noise": quality(0.01, 0.0, passing[1])}
        ceiling = quality(0.99, 0.9, passing[2])
        recovery = Recovery(**quality(mean, cosine, passing[0]).model_dump(), floors=floors, ceiling=ceiling)
        parts = {
            name: AttackResult(
                attack=attack_info(name, knowledge, saturated=saturated, above_floor=above_floor),
                recovery=None if linkage or inversion else recovery,
                linkage=link if linkage else None,
                inversion=inversion,
                state_inference=None if template else states_named,
                strength=curve if strength else None,
            )
            for name in names
        }
        operation = "link" if linkage else "recover"
        result = RunResult(
            run_id=run_id,
            protocol=protocol,
            status="success",
            warnings=["synthetic faces: for trying the suite"] if synthetic else [],
            defense=defense_info(defense, options, **(details or {"kept_channels": list(range(10, 64))})),
            evaluator=EvaluatorInfo(
                name="judge", sha256="ab" * 32, accuracy=0.98, threshold=0.3, far_at_threshold=0.01
            ),
            dataset=dataset_info(dataset, image_size=image_size, synthetic=synthetic),
            utility=utility(accuracy, 0.97, protocols, **(templates_and_galleries() if galleries else {})),
            template=template,
            **together(parts, recovery),
            throughput={
                "protect": throughput(5000),
                **{operation if len(names) == 1 else f"{operation} {name}": throughput(100) for name in names},
            },
        )  # fmt: skip
        rng = np.random.default_rng(0)
        same = np.arange(100) < 50
        scores = {"same": same, "fold": np.zeros(100, dtype=int)}
        scores |= {name: same + rng.normal(0, 0.5, 100) for name in ("protected", "unprotected")}
        pd.DataFrame(scores).to_parquet(folder / "scores.parquet")
        if linkage:
            kinds = ("protected_plain", "protected_protected", "plain")
            table = {"same": same, "fold": scores["fold"], **{kind: same + rng.normal(0, 0.5, 100) for kind in kinds}}
            linked = [pd.DataFrame(table).assign(attack=name) for name in names]
            pd.concat(linked, ignore_index=True).to_parquet(folder / "linkage.parquet")
        else:
            images = len(ssim) if type2 is None else len(type2)
            people = [f"person-{number // 2}" for number in range(images)]
            rows = pd.DataFrame({"image": range(images), "identity": people, "cosine": cosine})
            if type2 is not None:
                rows["type2_far_1e3"] = np.asarray(type2, dtype=float)
                ssim = np.resize(ssim, images)
            states = pd.DataFrame({"image": range(VICTIMS), "interception": 0, "drawn": range(VICTIMS)})
            states["named"] = [-1, 0, *range(2, VICTIMS)]
            named = pd.concat([states.assign(attack=name) for name in names])
            if template is None:
                named.to_parquet(folder / "state_inference.parquet")
            tables = [rows.assign(method=name, ssim=np.roll(ssim, n)) for n, name in enumerate(names)]
            pd.concat([*tables, rows.assign(method="ceiling", ssim=0.99)]).to_parquet(folder / "per_image.parquet")
        if samples:
            write_samples(folder / "samples", linkage, names if len(names) > 1 else ())
    (folder / "metrics.json").write_text(result.to_json())
    steps = [
        {"event": "progress", "task": "train provider recogniser on x", "done": 10 * n, "loss": 3 / n}
        for n in (1, 2, 3)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    artefacts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.[jp]*")}
    artefacts.pop("events.jsonl")
    manifest = {
        "schema": "1", "protocol": protocol, "run_id": run_id, "status": result.status, "config": config,
        "started": started, "version": "0.1.0", "packages": {"torch": "2.6.0"}, "device": "cpu",
        "device_name": "x86_64", "precision": "32-true", "artefacts": artefacts,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_samples(folder, linkage=False, attacks=()):
    """Pictures of three victims: the first, who is also the worst, a median and a best one."""
    folder.mkdir()
    columns = ["original", "sent", "sent again" if linkage else "recovered", *attacks]
    victims = []
    for number, roles in enumerate((["first", "worst"], ["median"], ["best"])):
        files = {}
        for place, column in enumerate(columns):
            files[column] = f"victim-{number}-{place}.png"
            Image.new("RGB", (8, 8), (40 * number, 60 * place, 99)).save(folder / files[column])
        victims.append({"image": number, "roles": roles, "caption": "SSIM 0.700", "files": files})
    (folder / "samples.json").write_text(json.dumps({"columns": columns, "victims": victims}))
