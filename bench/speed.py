"""How fast a run's operations are: protecting, recognising, and what the attack does with an interception."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from attacks.base import LinkageAttack, RecoveryAttack
from bench.attack_stages import AttackStages, Recovered
from bench.attempt import Attempt
from bench.data.faceset import to_float
from bench.metrics.throughput import measure, synchronise
from bench.results import Quartiles, Throughput
from defenses.base import Defense

#: A batch that takes longer than this many seconds is not repeated for its speed: the run itself has timed it.
SLOW = 1.0


def provider_speed(
    attacks: AttackStages, defense: Defense, probes: Tensor, *, recognise: bool
) -> dict[str, Throughput]:
    """Speed of the client and, where a recogniser is there, of the provider."""
    faces = _some_faces(attacks, probes)
    generator = attacks.streams.generator("throughput")
    sent = defense.protect(faces, generator).representation
    timed = {"protect": _timed(lambda batch: defense.protect(batch, generator).representation, faces)}
    if recognise:
        timed["recognise"] = _timed(attacks.stages.recogniser(defense).embed, sent)
    return timed


def recovery_speed(
    attacks: AttackStages, attempt: Attempt, defense: Defense, probes: Tensor, recovered: Recovered
) -> Throughput:
    """Speed of recovering faces; of an attack that takes its time, as it was when the victims' were recovered."""
    attack, _ = attacks.fitted(attempt, defense)
    if not isinstance(attack, RecoveryAttack):
        raise TypeError(f"{attempt.name} recovers no faces")
    index = _some(attacks, probes)
    observation = next(iter(attacks.observations(attack, defense, index, attempt.interceptions))).observation
    seconds = recovered.batch_seconds
    if float(seconds.median()) < SLOW:
        return _timed(lambda batch: attack.recover(observation.first(len(batch))), observation.representations)
    device = attacks.fabric.device
    synchronise(device)
    started = time.perf_counter()
    attack.recover(observation.first(1))
    synchronise(device)
    latency = 1e3 * (time.perf_counter() - started)
    return Throughput(
        images_per_second=_quartiles(recovered.batch_faces / seconds),
        latency_ms=Quartiles(median=latency, q1=latency, q3=latency),
        batch=int(recovered.batch_faces.max()),
        repeats=len(seconds),
        dtype=str(observation.representations.dtype).removeprefix("torch."),
        device=str(device),
    )


def linkage_speed(attacks: AttackStages, attempt: Attempt, defense: Defense, probes: Tensor) -> Throughput:
    """Speed of embedding intercepted representations."""
    attack, _ = attacks.fitted(attempt, defense)
    if not isinstance(attack, LinkageAttack):
        raise TypeError(f"{attempt.name} links no representations")
    sent = defense.protect(_some_faces(attacks, probes), attacks.streams.generator("throughput")).representation
    return _timed(attack.embed_representations, sent)


def _some(attacks: AttackStages, probes: Tensor) -> Tensor:
    """A full batch of victim images, repeated where there are fewer."""
    return probes[torch.arange(attacks.config.batch_size) % len(probes)]


def _some_faces(attacks: AttackStages, probes: Tensor) -> Tensor:
    images = attacks.stages.splits.victims.images[_some(attacks, probes)]
    return to_float(images.to(attacks.fabric.device))


def _timed(operation: Callable[[Tensor], object], batch: Tensor) -> Throughput:
    return Throughput(**asdict(measure(operation, batch)))


def _quartiles(samples: Tensor) -> Quartiles:
    q1, median, q3 = torch.quantile(samples, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Quartiles(median=median, q1=q1, q3=q3)
