"""Verification figures of scored pairs, with their intervals, as they stand in the result."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from bench.data.faceset import PairProtocol
from bench.judge import to_measure
from bench.metrics.bootstrap import REPLICATES, verification_estimates
from bench.metrics.verification import lfw_accuracy
from bench.results import Verification

#: False acceptance rates at which the true acceptance rate is given.
FARS: Mapping[str, float] = MappingProxyType({"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3})


def verification(
    scores: Tensor,
    pairs: PairProtocol,
    labels: Tensor,
    generator: torch.Generator,
    *,
    replicates: int = REPLICATES,
    fars: Mapping[str, float] = FARS,
) -> Verification:
    """Accuracy, AUC, EER and TAR@FAR of scored pairs, with intervals over identities.

    Args:
        scores: float (P,), one per pair, higher is more alike.
        pairs: the protocol over N images.
        labels: int64 (N,), the person on each image.
        generator: source of the bootstrap's draws.
        replicates: of the bootstrap.
        fars: name in the result -> false acceptance rate.

    Raises:
        DataError: shapes differ, scores are not finite, a class or a second fold is absent, or pairs contradict labels.
    """
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
    estimates = verification_estimates(
        scores, pairs.same, pairs.fold, people, generator, fars=list(fars.values()), replicates=replicates
    )
    return Verification(
        accuracy=to_measure(estimates.accuracy, "utility"),
        auc=to_measure(estimates.auc, "utility"),
        eer=to_measure(estimates.eer, "privacy"),
        tar_at_far={name: to_measure(estimates.tar_at_far[far], "utility") for name, far in fars.items()},
        accuracy_std=lfw_accuracy(scores, pairs.same, pairs.fold).std,
        pairs=len(pairs),
    )
