"""The worst case of a defence: what leaks when every attack of a report has been tried on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from bench.measures import KINDS, leak
from bench.results import Measure, RunResult
from reports.cells import Cell

#: Figures that are known of each victim, so that the worst case can be taken victim by victim.
_PER_IMAGE = ("ssim", "psnr", "psnr_aligned", "ms_ssim", "lpips", "type1_tar", "type2_tar", "rank1", "cosine")

#: Resamples of its interval.
_REPLICATES = 1000


def _recovery(name: str) -> Callable[[RunResult], Measure | None]:
    return lambda result: None if result.recovery is None else getattr(result.recovery, name)


def _identity(name: str) -> Callable[[RunResult], Measure | None]:
    return lambda result: None if result.recovery is None else getattr(result.recovery.identity, name)


#: Name of a figure of leakage -> how a result gives it.
LEAKAGE: Mapping[str, Callable[[RunResult], Measure | None]] = {
    "ssim": _recovery("ssim"),
    "psnr": _recovery("psnr"),
    "psnr_aligned": _recovery("psnr_aligned"),
    "lpips": _recovery("lpips"),
    "type1_tar": _identity("type1_tar"),
    "type2_tar": _identity("type2_tar"),
    "rank1": _identity("rank1"),
    "cosine": _identity("cosine"),
    "linkage": lambda result: None if result.linkage is None else result.linkage.protected_plain.accuracy,
    "d_sys": lambda result: None if result.linkage is None else result.linkage.d_sys.get("protected_plain"),
}


@dataclass(frozen=True)
class Worst:
    """What leaks at worst by one figure.

    Attributes:
        measure: the figure; victim by victim the worst where attacks were run on the same victims.
        strongest: the attack that leaks most on average.
        unsaturated: whether the strongest was still improving, so that the figure bounds leakage from below.
    """

    measure: Measure
    strongest: Cell
    unsaturated: bool


def worst_case(cells: Sequence[Cell], name: str) -> Worst | None:
    """The worst case over the runs of one defence, by the figure ``name`` of :data:`LEAKAGE`; None if none has it.

    Runs on the same victims are combined victim by victim (the pointwise worst case); of runs on different victims
    (other seeds) the one that leaks most counts.
    """
    found = [(cell, measure) for cell in cells if (measure := LEAKAGE[name](cell.run.result)) is not None]
    found = [(cell, measure) for cell, measure in found if measure.value is not None]
    if not found:
        return None
    strongest, measure = max(found, key=lambda pair: leak(name, pair[1]))
    if name in _PER_IMAGE:
        for group in _same_victims([cell for cell, _ in found], name):
            if len(group) > 1:
                pointwise = _pointwise(group, name)
                measure = max(measure, pointwise, key=lambda one: leak(name, one))
    info = strongest.run.result.attack
    return Worst(measure, strongest, info is not None and info.saturated is False)


def own_rows(cell: Cell) -> pd.DataFrame | None:
    """The raw values of a run's own attack, one row per victim image."""
    table, info = cell.run.per_image, cell.run.result.attack
    return None if table is None or info is None else table[table["method"] == info.name]


def _same_victims(cells: Sequence[Cell], name: str) -> list[list[pd.DataFrame]]:
    """The raw values of ``cells``, put together where they are of the same victims in the same order."""
    groups: dict[tuple[int, ...], list[pd.DataFrame]] = {}
    for cell in cells:
        rows = own_rows(cell)
        if rows is not None and name in rows and len(rows):
            key = (cell.seed, *rows["image"].tolist())
            groups.setdefault(key, []).append(rows)
    return list(groups.values())


def _pointwise(tables: Sequence[pd.DataFrame], name: str) -> Measure:
    """The mean over victims of the worst value of each, with its interval over identities."""
    import torch

    from bench.metrics.bootstrap import mean_estimate

    values = pd.concat([table[name].reset_index(drop=True) for table in tables], axis=1)
    worst = values.max(axis=1) if KINDS[name].leaks > 0 else values.min(axis=1)
    people = pd.factorize(tables[0]["identity"])[0]
    estimate = mean_estimate(
        torch.tensor(worst.to_numpy(dtype="float64")),
        torch.tensor(people),
        torch.Generator().manual_seed(0),
        replicates=_REPLICATES,
    )
    return KINDS[name].measure(estimate)
