"""How well the provider still recognises behind the defence, beside an unprotected recogniser."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from bench.data.faceset import PairProtocol
from bench.results import Utility
from bench.stages import Stages
from bench.store import RunStore
from bench.verification_result import verification
from defenses.base import Defense


def measure_utility(stages: Stages, defense: Defense, plain: Defense, store: RunStore) -> Utility:
    """Verification of the victims' pairs, protected and plain; the scores go to ``scores.parquet``."""
    pairs, labels = stages.splits.pairs, stages.splits.victims.labels
    scores = {"protected": stages.verification_scores(defense), "unprotected": stages.verification_scores(plain)}
    store.write_table("scores", score_table(pairs, scores))
    protected, unprotected = (
        verification(values, pairs, labels, stages.streams.generator("bootstrap"), replicates=stages.config.bootstrap)
        for values in scores.values()
    )
    return Utility(**protected.model_dump(), unprotected=unprotected)


def score_table(pairs: PairProtocol, scores: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per pair: whether it shows one person, its fold, and its score by each name, float (P,) each."""
    columns = {"same": pairs.same, "fold": pairs.fold, **scores}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})
