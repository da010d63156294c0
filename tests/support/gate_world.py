"""Run directories made up for the tests of the gate: small, through the real models, and without a face in them."""

import json

import numpy as np
import pandas as pd
from run_folders import attack_info, dataset_info, defense_info, together, utility, verification

from bench.results import (
    PROTOCOL_VERSION,
    AttackResult,
    Identity,
    Linkage,
    Measure,
    Quality,
    Recovery,
    RunResult,
)

PEOPLE, IMAGES = 12, 5

#: column -> mean, standard deviation between people, and between the images of one.
LEVELS = {
    "ssim": (0.70, 0.03, 0.03),
    "psnr": (18.0, 0.9, 0.8),
    "psnr_aligned": (20.0, 0.9, 0.8),
    "ms_ssim": (0.75, 0.03, 0.03),
    "cosine": (0.60, 0.05, 0.05),
}
RATES = {"type1_tar": 0.5, "type2_tar": 0.4, "rank1": 0.3}
CEILING = {"ssim": 0.97, "psnr": 36.0, "psnr_aligned": 37.0, "ms_ssim": 0.99, "cosine": 0.98}


def measure(value, ci=None, direction="leakage", n=PEOPLE * IMAGES, reason="every resample gives the same value"):
    return Measure(value=value, ci95=ci, n=n, direction=direction, reason=None if value is not None and ci else reason)


def rows(method, seed, level, shift, retrained):
    """Per-image scores: what is peculiar to a face hangs on the seed, what a training adds on ``retrained``."""
    faces, noise = np.random.default_rng([seed, 1]), np.random.default_rng([seed, retrained, 2])
    person = np.repeat(np.arange(PEOPLE), IMAGES)
    table = pd.DataFrame({"image": np.arange(len(person)), "identity": [f"person-{i:03}" for i in person]})
    for name, (mean, between, within) in LEVELS.items():
        values = faces.normal(0, between, PEOPLE)[person] + faces.normal(0, within, len(person))
        spread = 0.1 if level is CEILING else 1.0
        shared = noise.normal(0, 0.05 * between)
        table[name] = (level or {}).get(name, mean) + spread * values + shared + shift.get(name, 0.0)
    for name, rate in RATES.items():
        threshold = 0.99 if level is CEILING else rate + shift.get(name, 0.0)
        table[name] = (faces.random(len(person)) < threshold).astype(float)
    return table.assign(method=method)


def quality(table):
    def mean(name):
        return measure(float(table[name].mean()), (float(table[name].min()), float(table[name].max())))

    missing = Measure(value=None, direction="privacy", reason="LPIPS: no weights here")
    return Quality(
        **{name: mean(name) for name in ("ssim", "psnr", "psnr_aligned", "ms_ssim")},
        lpips=missing,
        identity=Identity(**{name: mean(name) for name in ("cosine", *RATES)}),
    )


def make_run(
    folder,
    *,
    seed=0,
    retrained=0,
    shift=None,
    ceiling_shift=None,
    defense="partialface",
    attack="unet",
    entropy=4.17,
    options=None,
    attack_options=None,
    resolved=None,
    protocol=PROTOCOL_VERSION,
    status="success",
    accuracy=0.8,
    linkage=None,
    warnings=(),
    above_floor=True,
    **config,
):
    """Write a run directory and return it.

    ``shift`` is added to the attack's scores, ``ceiling_shift`` to those on unprotected faces; ``linkage`` is the
    accuracy of a linkage run instead; several attacks are separated by commas; ``options`` are
    what was asked for, ``resolved`` what came of it.
    """
    folder.mkdir(parents=True)
    run_id = f"{defense}-{attack}-seed{seed}-{folder.name}"
    asked = {
        "defense": defense, "attack": attack, "knowledge": "whitebox", "dataset": "synthetic", "preset": "quick",
        "image_size": 64, "seed": seed, "out": str(folder.parent), "probes": 60, "training": {"epochs": 4},
        "defense_options": options or {}, "attack_options": attack_options or {}, **config,
    }  # fmt: skip
    manifest = {"protocol": protocol, "run_id": run_id, "status": status, "config": asked}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if status != "success":
        result = RunResult(run_id=run_id, protocol=protocol, status=status, error="disk full")
        (folder / "metrics.json").write_text(result.to_json())
        return folder
    parts, tables = {}, []
    names = attack.split(",")
    for name in names:
        info = attack_info(name, above_floor=above_floor)
        if linkage is not None:
            parts[name] = AttackResult(
                attack=attack_info(name, above_floor=above_floor), linkage=linkage_figures(linkage)
            )
            continue
        got = rows(name, seed, None, shift or {}, retrained)
        ceiling = "ceiling" if len(names) == 1 else f"{name} ceiling"
        most = rows(ceiling, seed, CEILING, ceiling_shift or {}, retrained)
        tables += [got, most]
        recovery = Recovery(**quality(got).model_dump(), floors={}, ceiling=quality(most))
        parts[name] = AttackResult(attack=info, recovery=recovery)
    if tables:
        pd.concat(tables).to_parquet(folder / "per_image.parquet")
    result = RunResult(
        run_id=run_id,
        protocol=protocol,
        status=status,
        warnings=list(warnings),
        defense=defense_info(defense, resolved or {"subset": None}, entropy),
        dataset=dataset_info(people=PEOPLE, images=PEOPLE * IMAGES, seed=seed),
        utility=None if linkage is not None else utility(accuracy, 0.9),
        **together(parts, None if linkage is not None else recovery),
    )
    (folder / "metrics.json").write_text(result.to_json())
    return folder


def linkage_figures(accuracy):
    return Linkage(
        protected_plain=verification(accuracy),
        protected_protected=verification(accuracy),
        plain=verification(0.9),
        rank1=measure(accuracy / 2, (accuracy / 2 - 0.1, accuracy / 2 + 0.1)),
        d_sys={},
    )
