"""Template defences by the terms of ISO/IEC 24745 and 30136: verification, irreversibility, unlinkability, renewal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from bench.measures import KINDS, Estimate, Measure
from bench.metrics.bootstrap import mean_estimate
from bench.metrics.unlinkability import (
    chance_level,
    choose_bins,
    maximal_linkability_estimate,
    unlinkability_estimate,
)
from bench.metrics.verification import far_not_measurable, roc
from bench.progress import Report
from bench.results import Inversion, TemplateProtection
from bench.run.attack_config import AttackConfig
from bench.run.attacker import RENEWED, AttackStages, Inverted
from bench.run.provider import Stages
from bench.run.stage import CODE, Job, make_key, tensor_job
from bench.run.verification import verification
from defenses.template import TemplateDefense

#: Rates at which a system accepts its own impostors, by their names in results.
_FARS: Mapping[Literal["far_1e2", "far_1e3"], float] = {"far_1e2": 1e-2, "far_1e3": 1e-3}
#: Pairs of two people at most among those who were inverted.
_IMPOSTORS = 4_000
#: Public faces whose mean embedding is the floor of an inversion.
_PUBLIC = 1024


def thresholds(stages: Stages, defense: TemplateDefense) -> dict[str, float | str]:
    """The score at which the system accepts a share of its own impostors, or why there is none, by the rate's name.

    They show the claimed person's key: those of the verification that stands in the result.
    """
    pairs = stages.splits.pairs
    curve, impostors = roc(stages.do(stages.verification_job(defense)), pairs.same), int((~pairs.same).sum())
    return {
        name: far_not_measurable(far, impostors) or float(curve.threshold_at_far(far)) for name, far in _FARS.items()
    }


def protection_job(stages: Stages, defense: TemplateDefense) -> Job[dict[str, Tensor]]:
    """The stage that scores the pairs of the victims' protocol under other keys than the claimed person's: (P,) each.

    ``own``, ``stolen`` and ``unknown`` keys are shown by who is to be verified; ``across`` compares the first face's
    template with the second's in another system, and ``alike`` with the first's own there.
    """

    def compute(resume: Path, report: Report) -> dict[str, Tensor]:
        pairs, system = stages.splits.pairs, stages.system(defense)
        first, second = stages.do(stages.embeddings_job(defense))
        own, renewed = stages.victim_keys(defense, "queries"), stages.victim_keys(defense, RENEWED)

        def of(keys: Tensor | None, images: Tensor) -> Tensor | None:
            return None if keys is None else keys[images]

        one = None if own is None else own[:1].expand(len(pairs), -1)
        old = system.enrol("old", first, of(own, pairs.first))
        again = system.enrol("again", first, of(renewed, pairs.first))
        new = system.enrol("new", second, of(renewed, pairs.second))
        scores = {
            "stolen": system.match("stolen", system.enrol("stolen", first, one), second, one),
            "unknown": system.match("unknown", old, second, of(renewed, pairs.second)),
            "across": defense.compare(old, new).double(),
            "alike": defense.compare(old, again).double(),
        }
        if defense.key_stored:  # who is to be verified has none, and the system takes the claimed person's
            return scores | {"own": stages.do(stages.verification_job(defense))}
        return scores | {"own": system.match("own", old, second, of(own, pairs.second))}

    content = {
        "verified": stages.verification_job(defense).key,
        "seed": stages.config.seed,
    }
    key, what = make_key(content, CODE["templates"]), f"verify templates of {defense.name}"
    return tensor_job(f"protection-{defense.name}", key, what, "scores.safetensors", compute, dict)


def assess_protection(stages: Stages, defense: TemplateDefense) -> TemplateProtection:
    """Verification under own, stolen and unknown keys, and what templates of two systems tell of each other.

    Args:
        stages: of the run.
        defense: ready for use.
    """
    pairs, labels = stages.splits.pairs, stages.splits.victims.labels
    scores: dict[str, Tensor] = stages.do(protection_job(stages, defense))
    across, alike = scores["across"], scores["alike"]
    limits, people = thresholds(stages, defense), torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
    genuine, draws = pairs.same.nonzero().flatten(), stages.streams.generator("templates")
    replay = {
        name: _share(f"replay{_suffix(name)}", across[genuine], limit, people[genuine, 0], draws, stages)
        for name, limit in limits.items()
    }
    diverse = {
        name: _share(f"diverse{_suffix(name)}", alike[genuine], limit, people[genuine, 0], draws, stages, below=True)
        for name, limit in limits.items()
    }
    counts = len(genuine), len(pairs) - len(genuine)
    return TemplateProtection(
        key_stored=defense.key_stored,
        verification={name: verification(scores[name], pairs, labels) for name in ("own", "stolen", "unknown")},
        **{f"replay_{name}": measure for name, measure in replay.items()},
        **{f"diverse_{name}": measure for name, measure in diverse.items()},
        d_sys=KINDS["template_d_sys"].measure(unlinkability_estimate(across, pairs.same, people)),
        d_sys_chance=chance_level(choose_bins(*counts), *counts),
        maximal=KINDS["template_maximal"].measure(maximal_linkability_estimate(across, pairs.same, people)),
    )


def assess_inversion(attacks: AttackStages, attack_config: AttackConfig, defense: TemplateDefense) -> Inversion | None:
    """What an attack's estimates of the embeddings behind stolen templates are worth; None where it makes none."""
    if (inverted := attacks.inverted(attack_config, defense)) is None:
        return None
    stages, attacked, partners = attacks.stages, attacks.selection.attacked, attacks.partners
    labels = stages.splits.victims.labels[attacked]
    system, images = stages.system(defense), stages.splits.victims.images
    true = system.embed("templates/first", images[attacked])
    other = system.embed("templates/second", images[partners])
    own, renewed = (stages.victim_keys(defense, stream) for stream in ("victims", RENEWED))

    same = system.match("same", inverted.first_stored, inverted.first, None if own is None else own[attacked])
    anew = system.match(
        "renewed", inverted.second_stored, inverted.first, None if renewed is None else renewed[partners]
    )
    draws, limits = stages.streams.generator("templates"), thresholds(stages, defense)
    passed = {
        f"{name}_{rate}": _share(f"pass_{name}{_suffix(rate)}", scores, limit, labels, draws, stages)
        for name, scores in (("same", same), ("renewed", anew))
        for rate, limit in limits.items()
    }
    public = system.embed("templates/public", stages.splits.public.images[:_PUBLIC])
    mean = functional.normalize(public.mean(dim=0), dim=0)

    def cosine(guess: Tensor) -> Measure:
        values = functional.cosine_similarity(guess, true)
        return KINDS["embedding_cosine"].measure(
            mean_estimate(values, labels, draws, replicates=stages.config.bootstrap)
        )

    pairs = _all_pairs(labels, draws)
    people = labels[pairs]
    mated = people[:, 0] == people[:, 1]

    def across(guess: Tensor) -> Tensor:
        return functional.cosine_similarity(inverted.first[pairs[:, 0]], guess[pairs[:, 1]])

    linked, plain = across(inverted.second), across(other)
    with_keys = stages.config.knowledge == "oracle" or defense.key_stored or own is None
    return Inversion(
        records=attack_config.interceptions,
        key=with_keys,
        cosine=cosine(inverted.first),
        floor=cosine(mean.expand_as(true)),
        **passed,
        d_sys=KINDS["estimate_d_sys"].measure(unlinkability_estimate(linked, mated, people)),
        maximal=KINDS["estimate_maximal"].measure(maximal_linkability_estimate(linked, mated, people)),
        d_sys_plain=KINDS["estimate_d_sys_plain"].measure(unlinkability_estimate(plain, mated, people)),
    )


def inverted_table(attacks: AttackStages, inverted: Inverted, attack: str) -> pd.DataFrame:
    """A row per attacked image: its person, and the estimates ``first`` and ``second``, float32 (D,) each."""
    victims, attacked = attacks.stages.splits.victims, attacks.selection.attacked
    columns = {name: list(getattr(inverted, name).numpy()) for name in ("first", "second")}
    people = [victims.names[int(label)] for label in victims.labels[attacked]]
    return pd.DataFrame({"image": attacked.numpy(), "identity": people, **columns}).assign(attack=attack)


def _all_pairs(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Places (P, 2): everybody's first with the own second, and some of two people."""
    count = len(labels)
    drawn = torch.randint(count, (_IMPOSTORS, 2), generator=generator)
    drawn = torch.unique(drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]], dim=0)
    return torch.cat((torch.arange(count)[:, None].expand(-1, 2), drawn))


def _share(
    kind: str,
    scores: Tensor,
    limit: float | str,
    identities: Tensor,
    draws: torch.Generator,
    stages: Stages,
    *,
    below: bool = False,
) -> Measure:
    """Share of scores (M,) that reach the limit, or stay ``below`` it, with its interval over identities."""
    if isinstance(limit, str):
        return KINDS[kind].measure(Estimate(None, None, 0, limit))
    held = scores < limit if below else scores >= limit
    return KINDS[kind].measure(mean_estimate(held.double(), identities, draws, replicates=stages.config.bootstrap))


def _suffix(rate: str) -> str:
    """What the figure of a rate is called after."""
    return "" if rate == "far_1e2" else "_1e3"
