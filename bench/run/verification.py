"""Verification figures of scored pairs, with their intervals, as they stand in the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import torch
from torch import Tensor

from bench.data.decode import shown
from bench.data.faces import PairProtocol
from bench.data.ijb import find_janus
from bench.errors import DataError
from bench.measures import KINDS
from bench.metrics.bootstrap import verification_estimates
from bench.metrics.verification import lfw_accuracy
from bench.results import Protocol, Utility, Verification
from bench.run.identification import measure_distractors, measure_templates
from bench.run.protocols import VerificationSet
from bench.run.provider import Stages
from bench.run.store import RunStore
from defenses.base import Defense

#: False acceptance rates at which the true acceptance rate is given.
FARS: Mapping[str, float] = MappingProxyType({"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3})


def verification(
    scores: Tensor,
    pairs: PairProtocol,
    labels: Tensor,
    *,
    linking: bool = False,
) -> Verification:
    """Accuracy, AUC, EER and TAR@FAR of scored pairs, with intervals over identities.

    Args:
        scores: float (P,), one per pair, higher is more alike.
        pairs: the protocol over N images.
        labels: int64 (N,), the person on each image.
        linking: whether an attack gave the scores, so that what it tells apart leaks.

    Raises:
        DataError: shapes differ, scores are not finite, a class or a second fold is absent, or pairs contradict labels.
    """
    people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
    estimates = verification_estimates(scores, pairs.same, pairs.fold, people, fars=list(FARS.values()))
    names = ("accuracy", "auc", "eer", "tar_at_far")
    if linking:
        names = ("linkage", "linkage_auc", "linkage_eer", "linkage_tar_at_far")
    accuracy, auc, eer, tar_at_far = (KINDS[name] for name in names)
    return Verification(
        accuracy=accuracy.measure(estimates.accuracy),
        auc=auc.measure(estimates.auc),
        eer=eer.measure(estimates.eer),
        tar_at_far={name: tar_at_far.measure(estimates.tar_at_far[far]) for name, far in FARS.items()},
        accuracy_std=lfw_accuracy(scores, pairs.same, pairs.fold).std,
        pairs=len(pairs),
    )


def measure_utility(
    stages: Stages, defense: Defense, plain: Defense, store: RunStore, packs: Iterable[Path] = ()
) -> tuple[Utility, list[str]]:
    """Recognition of the victims, and under each further protocol, protected and plain; and what to warn of.

    The victims' scores go to ``scores.parquet``. One pack after the other is held in memory; a benchmark of templates,
    which is a folder, and distractors stay on the disk.

    Raises:
        DataError: a damaged pack, or one that leaves no pairs of both kinds to measure.
    """
    pairs, labels = stages.splits.pairs, stages.splits.victims.labels
    scores = {
        "protected": stages.do(stages.verification_job(defense)),
        "unprotected": stages.do(stages.verification_job(plain)),
    }
    store.write_table("scores", score_table(pairs, scores))
    protected, unprotected = (verification(values, pairs, labels) for values in scores.values())
    teacher = None
    if stages.config.teacher is not None:
        teacher = verification(stages.do(stages.teacher_scores_job()), pairs, labels)
    protocols, templates, notes = {}, {}, list[str]()
    for path in packs:
        if path.is_dir():
            templates[find_janus(path) or path.name], said = measure_templates(stages, defense, plain, path)
        else:
            pack = stages.verification_set(path)
            protocols[pack.name], said = _protocol(stages, defense, plain, pack), list(pack.notes)
        notes += said
    distractors = None
    if stages.config.distractors is not None:
        distractors, said = measure_distractors(stages, defense, plain)
        notes += said
    utility = Utility(
        **protected.model_dump(),
        unprotected=unprotected,
        protocols=protocols,
        templates=templates,
        distractors=distractors,
        teacher=teacher,
    )
    return utility, notes


def _protocol(stages: Stages, defense: Defense, plain: Defense, pack: VerificationSet) -> Protocol:
    scores = [stages.do(stages.verification_job(target, pack)) for target in (defense, plain)]
    try:
        protected, unprotected = (verification(values, pack.pairs, pack.faces.labels) for values in scores)
    except DataError as error:
        raise DataError(f"pack {shown(pack.name)}: {error}") from error
    return Protocol(protected=protected, unprotected=unprotected)


def score_table(pairs: PairProtocol, scores: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per pair: whether it shows one person, its fold, and its score by each name, float (P,) each."""
    columns = {"same": pairs.same, "fold": pairs.fold, **scores}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})
