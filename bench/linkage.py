"""Judges a linkage attack: whether its embeddings tell that a representation and a face show one person."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.data.faceset import PairProtocol
from bench.errors import DataError
from bench.judge import LEAKAGE, to_measure
from bench.metrics.bootstrap import REPLICATES, mean_estimate
from bench.metrics.identity import identity_leakage
from bench.metrics.unlinkability import chance_level, choose_bins, unlinkability_estimate
from bench.metrics.verification import pair_scores
from bench.probes import Probes
from bench.results import Linkage, Measure
from bench.verification_result import FARS, verification


def linkage_scores(first: Tensor, second: Tensor, plain: Tensor, pairs: PairProtocol) -> dict[str, Tensor]:
    """Cosines of the pairs of a protocol, by what is compared; both sides of a pair never share a draw of the defence.

    Args:
        first: float (N, D), embeddings of every image as intercepted once.
        second: float (N, D), as intercepted once more, under states drawn anew.
        plain: float (N, D), of the plain images.
        pairs: P pairs over the N images.

    Returns:
        Of each pair (i, j), float32 (P,): ``protected_plain`` the first interception of i against the plain image j,
        ``protected_protected`` the first of i against the second of j, ``plain`` both as they are.

    Raises:
        DataError: shapes differ, or the protocol indexes images that have no embedding.
    """
    if first.ndim != 2 or not first.shape == second.shape == plain.shape:
        raise DataError(
            "a linkage attack embeds every image twice protected and once plain, (N, D) each, got "
            f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(plain.shape)}"
        )
    return {
        "protected_plain": _across(first, plain, pairs),
        "protected_protected": _across(first, second, pairs),
        "plain": pair_scores(plain, pairs),
    }


def assess_linkage(
    first: Tensor,
    second: Tensor,
    plain: Tensor,
    *,
    labels: Tensor,
    pairs: PairProtocol,
    probes: Probes,
    seed: int,
    replicates: int = REPLICATES,
    fars: Mapping[str, float] = FARS,
) -> Linkage:
    """How well an attack links, from its embeddings of all N victim images.

    Every figure starts its bootstrap at ``seed``: intervals rest on the same resampled people, so that conditions
    compare.

    Args:
        first, second, plain: float (N, D), as :func:`linkage_scores`.
        labels: int64 (N,), the person on each image.
        pairs: the victims' protocol.
        probes: the intercepted images that look for their person, and the plain images that stand for the people.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        fars: name in the result -> false acceptance rate.

    Raises:
        DataError: shapes differ, embeddings are not finite, or the protocol does not suit the labels.
    """
    scores = linkage_scores(first, second, plain, pairs)
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    verified = {
        name: verification(values, pairs, labels, draws(), replicates=replicates, fars=fars)
        for name, values in scores.items()
    }
    d_sys = {
        name: to_measure(
            unlinkability_estimate(scores[name], pairs.same, people, draws(), replicates=replicates), LEAKAGE
        )
        for name in ("protected_protected", "protected_plain")
    }
    mated, non_mated = int(pairs.same.sum()), int((~pairs.same).sum())
    return Linkage(
        **verified,
        rank1=_rank1(first, plain, labels, probes, draws(), replicates),
        d_sys=d_sys,
        d_sys_chance=chance_level(choose_bins(mated, non_mated), mated, non_mated),
    )


def _across(one: Tensor, other: Tensor, pairs: PairProtocol) -> Tensor:
    """Cosines of ``one[pairs.first]`` and ``other[pairs.second]``."""
    shifted = PairProtocol(pairs.first, pairs.second + len(one), pairs.same, pairs.fold)
    if len(pairs) and int(pairs.first.max()) >= len(one):
        raise DataError(f"the verification pairs index beyond the {len(one)} embeddings")
    return pair_scores(torch.cat([one, other]), shifted)


def _rank1(
    first: Tensor, plain: Tensor, labels: Tensor, probes: Probes, generator: torch.Generator, replicates: int
) -> Measure:
    """Share of intercepted probes whose own person is the nearest in the plain gallery, among one image a person."""
    identities = labels[probes.attacked]
    leakage = identity_leakage(
        first[probes.attacked],
        plain[probes.attacked],
        identities,
        plain[probes.gallery],
        labels[probes.gallery],
        threshold=0.0,  # of acceptance, which is no part of a rank
    )
    return to_measure(mean_estimate(leakage.rank1, identities, generator, replicates=replicates), LEAKAGE)
