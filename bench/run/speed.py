"""How fast a run's operations are: protecting, recognising, and what the attack does with an interception."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attacks.base import LinkageAttack, RecoveryAttack
from bench.errors import DataError
from bench.images import to_float
from bench.memory import in_halves
from bench.results import Quartiles, Throughput
from bench.run.attack_config import AttackConfig
from bench.run.attacker import AttackStages, Recovered
from bench.run.machines import synchronise
from defenses.base import Defense

_MAX_REPEATS = 1000

#: Seconds below which no calls are enough, and how far apart the ends of a quartile's interval may be where they are.
_MIN_SECONDS = 0.1
_KNOWN = 0.05


def measure(
    operation: Callable[[Tensor], object],
    batch: Tensor,
    *,
    warmup: int = 2,
    max_time: float = 0.5,
    least: int = 5,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Throughput:
    """Time ``operation`` on ``batch`` and on its first element alone; on half of it where memory is full.

    Calls are repeated until the quartiles of their times are known to 5 %, for a tenth of a second at least and
    ``max_time`` at most, and at least ``least`` times (at most a thousand). Each is timed by itself between two
    synchronisations, so that a kernel still running counts for the call that launched it.

    Args:
        operation: what is measured; it runs without gradients.
        batch: (N, ...), N > 0, on the device to measure.
        warmup: calls that are not timed, for each of the two sizes; one is enough that takes a tenth of a second.
        max_time: seconds for each of the two sizes where calls differ.
        least: calls that are timed however long they take.
        clock: monotonic time in nanoseconds.

    Raises:
        DataError: an empty batch.

    Example:
        >>> import torch
        >>> result = measure(lambda x: x.square(), torch.zeros(8, 3))
        >>> result.batch, result.dtype, result.device
        (8, 'float32', 'cpu')
    """
    if not len(batch):
        raise DataError("throughput needs at least one face")

    def timed(rows: slice) -> tuple[Tensor, int]:
        return _times(operation, batch[rows], warmup, max_time, least, clock), len(batch[rows])

    whole, size = next(in_halves(timed, len(batch), len(batch), "timing"))
    single = _times(operation, batch[:1], warmup, max_time, least, clock)
    return Throughput(
        images_per_second=_quartiles(size / whole),
        latency_ms=_quartiles(single * 1e3),
        batch=size,
        repeats=len(whole),
        dtype=str(batch.dtype).removeprefix("torch."),
        device=str(batch.device),
    )


@torch.no_grad()
def _times(
    operation: Callable[[Tensor], object],
    batch: Tensor,
    warmup: int,
    max_time: float,
    least: int,
    clock: Callable[[], int],
) -> Tensor:
    """Seconds of each timed call, float64 (repeats,), ascending."""

    def call() -> int:
        start = clock()
        operation(batch)
        synchronise(batch.device)
        return clock() - start

    synchronise(batch.device)
    for _ in range(warmup):
        if call() >= _MIN_SECONDS * 1e9:
            break
    times: list[int] = []
    taken = 0.0
    while len(times) < least or (taken < max_time and len(times) < _MAX_REPEATS):
        if taken >= _MIN_SECONDS and _known(times):
            break
        bisect.insort(times, call())
        taken = sum(times) / 1e9
    # A clock that did not tick between two readings would make the rate infinite.
    return torch.tensor(times, dtype=torch.float64).clamp_min(1) / 1e9


def _known(times: Sequence[int]) -> bool:
    """Whether the 95 % interval of each quartile of ascending times, between two of them, is narrow enough.

    How many of n times are below a quantile is binomial, whatever their distribution (David and Nagaraja, Order
    Statistics, section 7.1).
    """
    for share in (0.25, 0.5, 0.75):
        expected, half = share * len(times), 1.96 * math.sqrt(share * (1 - share) * len(times))
        low, high = math.floor(expected - half), math.ceil(expected + half)
        if low < 0 or high >= len(times) or times[high] - times[low] > _KNOWN * times[low]:
            return False
    return True


def _quartiles(samples: Tensor) -> Quartiles:
    q1, median, q3 = torch.quantile(samples, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Quartiles(median=median, q1=q1, q3=q3)


#: A batch that takes longer than this many seconds is not repeated for its speed: the run itself has timed it.
SLOW = 1.0


def provider_speed(attacks: AttackStages, defense: Defense, *, recognise: bool) -> dict[str, Throughput]:
    """Speed of the client and, where a recogniser is there, of the provider."""
    faces = _some_faces(attacks)
    generator = attacks.streams.generator("throughput")
    sent = defense.protect(faces, generator).representation
    timed = {"protect": measure(lambda batch: defense.protect(batch, generator).representation, faces)}
    if recognise:
        timed["recognise"] = measure(attacks.stages.recogniser(defense).embed, sent)
    return timed


def recovery_speed(
    attacks: AttackStages, attack_config: AttackConfig, defense: Defense, recovered: Recovered
) -> Throughput:
    """Speed of recovering faces; of an attack that takes its time, as it was when the victims' were recovered."""
    attack, _ = attacks.fitted(attack_config, defense)
    if not isinstance(attack, RecoveryAttack):
        raise TypeError(f"{attack_config.name} recovers no faces")
    observed = attacks.observations(attack, defense, _some(attacks), attack_config.interceptions)
    observation = next(iter(observed)).observation
    seconds = recovered.batch_seconds
    if float(seconds.median()) < SLOW:
        return measure(lambda batch: attack.recover(observation.rows(slice(len(batch)))), observation.representations)
    device = attacks.stages.device
    synchronise(device)
    started = time.perf_counter()
    attack.recover(observation.rows(slice(1)))
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


def linkage_speed(attacks: AttackStages, attack_config: AttackConfig, defense: Defense) -> Throughput:
    """Speed of embedding intercepted representations."""
    attack, _ = attacks.fitted(attack_config, defense)
    if not isinstance(attack, LinkageAttack):
        raise TypeError(f"{attack_config.name} links no representations")
    sent = defense.protect(_some_faces(attacks), attacks.streams.generator("throughput")).representation
    return measure(attack.embed_representations, sent)


def _some(attacks: AttackStages) -> Tensor:
    """A full batch of victim images, repeated where there are fewer."""
    probes = attacks.selection.attacked
    return probes[torch.arange(attacks.config.batch_size) % len(probes)]


def _some_faces(attacks: AttackStages) -> Tensor:
    images = attacks.stages.splits.victims.images[_some(attacks)]
    return to_float(images.to(attacks.stages.device))
