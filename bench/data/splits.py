"""Sharing out a dataset's identities: provider, public, evaluator and victims, nobody in two of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data.faceset import FaceSet, PairProtocol, Skipped, Source
from bench.data.overlap import drop_twins, drop_victims
from bench.data.pairs import draw_pairs
from bench.errors import DataError, UsageError

#: Identities each part needs: a margin head needs two classes, pairs in two folds need two each.
MINIMUM = {"provider": 2, "public": 2, "evaluator": 2, "victims": 4}


@dataclass(frozen=True, slots=True)
class Splits:
    """Identity-disjoint parts of a dataset, each labelled 0..K-1.

    Attributes:
        provider: trains the recogniser (and the defence).
        public: is what the attacker learns from.
        evaluator: trains the second recogniser that judges identity leakage; None where none is asked for.
        victims: are verified and attacked.
        pairs: the verification protocol over ``victims``.
        dropped: identities left out because they are somebody else as well: a victim, or another learner.
    """

    provider: FaceSet
    public: FaceSet
    evaluator: FaceSet | None
    victims: FaceSet
    pairs: PairProtocol
    dropped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        parts = {"provider": self.provider, "public": self.public, "victims": self.victims}
        if self.evaluator is not None:
            parts["evaluator"] = self.evaluator
        for (one, a), (two, b) in itertools.combinations(parts.items(), 2):
            if shared := sorted(a.used_names & b.used_names):
                more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
                raise DataError(f"{one} and {two} share {len(shared)} identities: {', '.join(shared[:5])}{more}")


def split(
    source: Source,
    *,
    provider: float,
    public: float,
    evaluator: float,
    victims: float,
    generator: torch.Generator,
) -> Splits:
    """Share out the identities of a dataset at random.

    Shares are of identities. Those with several images and those with one are dealt in the same proportion. Where the
    dataset has victims of its own the victims' share is passed to the others, in proportion. Whoever would stand on
    both sides is dropped and listed (:func:`bench.data.overlap.drop_victims` and ``drop_twins``).

    Args:
        source: the dataset.
        provider, public, evaluator, victims: shares, at least 0, at most 1 together; only ``evaluator`` (and
            ``victims``, where the dataset has its own) may be 0. What is left over is not used.
        generator: source of the draws.

    Returns:
        The parts. That they are disjoint is checked, always.

    Raises:
        UsageError: shares that cannot be.
        DataError: too few identities, with the least number that would do; or parts that share someone.
    """
    shares = {"provider": provider, "public": public, "evaluator": evaluator, "victims": victims}
    _check_shares(shares, own_victims=source.victims is not None)
    faces, dropped = drop_twins(source.faces)
    if source.victims is not None:
        faces, also_victims = drop_victims(faces, source.victims)
        dropped += also_victims
        total = math.fsum(shares.values())
        shares["victims"] = 0.0
        scale = total / math.fsum(shares.values())
        shares = {name: share * scale for name, share in shares.items()}
    shares = {name: share for name, share in shares.items() if share > 0}
    images_of = torch.bincount(faces.labels, minlength=len(faces.names))
    people = int((images_of > 0).sum())
    counts = _counts(people, shares)
    if not _enough(counts):
        least = next(k for k in itertools.count(people + 1) if _enough(_counts(k, shares)))
        wanted = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
        without = f" ({len(dropped)} were left out as doubles)" if dropped else ""
        raise DataError(
            f"{people} identities{without} are too few to share out as {wanted}: at least {least} are needed"
        )
    dealt = _deal(images_of, counts, generator)
    parts = {name: faces.of_identities(identities) for name, identities in dealt.items()}
    if source.victims is not None:
        victim_set = source.victims.of_identities(torch.unique(source.victims.labels))  # same order, hence same pairs
    else:
        victim_set = parts["victims"]
    pairs = source.pairs if source.pairs is not None else draw_pairs(victim_set.labels, generator)
    return Splits(parts["provider"], parts["public"], parts.get("evaluator"), victim_set, pairs, dropped)


def _check_shares(shares: dict[str, float], *, own_victims: bool) -> None:
    for name, share in shares.items():
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise UsageError(f"the share of {name} must be between 0 and 1, got {share}")
        if share == 0 and not (name == "evaluator" or (name == "victims" and own_victims)):
            raise UsageError(f"the share of {name} cannot be 0")
    if math.fsum(shares.values()) > 1 + 1e-6:
        listed = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise UsageError(f"the shares add up to more than 1: {listed}")


def _counts(people: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers nearest to the shares (largest remainder)."""
    exact = {name: people * share for name, share in shares.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    rest = min(people, round(math.fsum(exact.values()))) - sum(counts.values())
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: max(0, rest)]:
        counts[name] += 1
    return counts


def _enough(counts: dict[str, int]) -> bool:
    return all(count >= MINIMUM[name] for name, count in counts.items())


def _deal(images_of: Tensor, counts: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Identities of each part, int64, in ascending order."""
    order = torch.randperm(len(images_of), generator=generator)
    order = torch.cat([order[images_of[order] > 1], order[images_of[order] == 1]])
    unused = len(order) - sum(counts.values())
    slots = {**counts, "": unused}
    # Evenly interleaved slots: any stretch of them, so also the identities with one image, has every part's share.
    place = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1) for n in slots.values()])
    owner = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(list(slots.values())))
    owner = owner[torch.argsort(place, stable=True)]
    return {name: order[owner == i].sort().values for i, name in enumerate(slots) if name}
