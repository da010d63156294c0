"""Verification and identification of templates, which are pooled of several images (IJB-B, IJB-C).

Maze et al., "IARPA Janus Benchmark - C", ICB 2018. Scores are computed in parts, so that no matrix of a large gallery
stands in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from bench.errors import DataError
from bench.measures import Estimate
from bench.metrics.bootstrap import REPLICATES, mean_estimate

#: False acceptance rates at which the field gives the true acceptance rate of templates, by their names.
TEMPLATE_FARS: Mapping[str, float] = MappingProxyType({f"1e-{n}": 10.0**-n for n in range(6, 0, -1)})

#: False positive identification rates at which the true positive identification rate is given, by their names.
FPIRS: Mapping[str, float] = MappingProxyType({"1e-1": 1e-1, "1e-2": 1e-2})

#: Compares n fresh rows with m stored ones: scores (n, m), higher is more alike.
Compare = Callable[[Tensor, Tensor], Tensor]


def pool_templates(features: Tensor, templates: Tensor, media: Tensor) -> tuple[Tensor, Tensor]:
    """Templates as the mean of the means of their media, normalised: a video counts as much as a photograph.

    Args:
        features: float (N, D), of the images, not normalised unless the recogniser does so.
        templates: int64 (N,), the template that each image is part of.
        media: int64 (N,), the photograph or video that it is from.

    Returns:
        Numbers of the T templates, int64 ascending, and their unit rows, float32 (T, D).

    Raises:
        DataError: shapes differ, or a feature is not finite.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> numbers, pooled = pool_templates(features, torch.tensor([7, 7, 7]), torch.tensor([1, 1, 2]))
        >>> numbers.tolist(), [round(value, 3) for value in pooled[0].tolist()]
        ([7], [0.707, 0.707])
    """
    if features.ndim != 2 or not templates.shape == media.shape == features.shape[:1]:
        raise DataError(
            "features, templates and media must be (N, D), (N,) and (N,), got "
            f"{', '.join(str(tuple(part.shape)) for part in (features, templates, media))}"
        )
    if not torch.isfinite(features).all():
        raise DataError("an image's feature holds NaN or infinity")
    owners, medium = torch.unique(torch.stack((templates, media), dim=1), dim=0, return_inverse=True)
    numbers, template = torch.unique(owners[:, 0], return_inverse=True)
    pooled = _means(_means(features, medium, len(owners)), template, len(numbers))
    return numbers, functional.normalize(pooled).float()


#: Rows that are summed at a time: sums are of double precision, and images there are many.
_ROWS = 1 << 14


def _means(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean row of each group, float64 (groups, D)."""
    sums = torch.zeros(groups, rows.shape[1], dtype=torch.float64)
    for part, owner in zip(rows.split(_ROWS), group.split(_ROWS), strict=True):
        sums.index_add_(0, owner, part.double())
    return sums / torch.bincount(group, minlength=groups)[:, None]


def template_scores(numbers: Tensor, pooled: Tensor, pairs: Tensor, *, chunk: int = 1 << 16) -> Tensor:
    """Cosines of pairs of templates, float32 (P,), ``chunk`` pairs at a time.

    Args:
        numbers: int64 (T,), ascending.
        pooled: unit rows (T, D).
        pairs: int64 (P, 2), numbers of templates.
        chunk: how many pairs stand in memory.

    Raises:
        DataError: a pair names a template that is not there.
    """
    place = places(numbers, pairs)
    parts = [(pooled[first] * pooled[second]).sum(dim=1) for first, second in (p.T for p in place.split(chunk))]
    return torch.cat(parts) if parts else torch.empty(0)


def places(numbers: Tensor, wanted: Tensor) -> Tensor:
    """Where templates stand among ``numbers``, int64 (T,) ascending: int64 of the shape of ``wanted``.

    Raises:
        DataError: one is not among them.
    """
    place = torch.searchsorted(numbers, wanted.contiguous()).clamp(max=max(0, len(numbers) - 1))
    absent = wanted.flatten() if not len(numbers) else wanted[numbers[place] != wanted]
    if len(absent):
        raise DataError(f"template {int(absent[0])} has no image: the lists do not belong together")
    return place


@dataclass(frozen=True, slots=True)
class Searches:
    """What N probes find in a gallery.

    Attributes:
        mate: float32 (N,), the highest score of a template of the probe's own subject; -inf where the gallery has none.
        other: float32 (N,), the highest score of a template of anybody else; -inf where there is nobody else.
        subjects: int64 (N,), whose each probe is.
    """

    mate: Tensor
    other: Tensor
    subjects: Tensor

    def further(self, more: Searches) -> Searches:
        """The same probes in this gallery and another one."""
        return Searches(torch.maximum(self.mate, more.mate), torch.maximum(self.other, more.other), self.subjects)

    @property
    def mated(self) -> Tensor:
        """Whether the subject of each probe is in the gallery, bool (N,)."""
        return self.mate > -torch.inf


def cosines(fresh: Tensor, stored: Tensor) -> Tensor:
    """Of unit rows (n, D) and (m, D): (n, m)."""
    return fresh @ stored.T


def search(
    probes: Tensor,
    subjects: Tensor,
    gallery: Tensor,
    gallery_subjects: Tensor,
    *,
    compare: Compare = cosines,
    chunk: int = 1024,
) -> Searches:
    """Every probe against every template of the gallery, ``chunk`` by ``chunk`` scores at a time.

    Args:
        probes: unit rows (N, D).
        subjects: int64 (N,).
        gallery: unit rows (G, D), or what ``compare`` takes for stored.
        gallery_subjects: int64 (G,).
        compare: scores some probes against some of the gallery.
        chunk: how many probes, and templates of the gallery, are compared at a time.

    Raises:
        DataError: shapes differ.
    """
    if probes.shape[:1] != subjects.shape or gallery.shape[:1] != gallery_subjects.shape:
        raise DataError("every template of a search needs a subject")
    if compare is cosines and probes.shape[1:] != gallery.shape[1:]:
        raise DataError(f"probes of {tuple(probes.shape)} cannot be compared with a gallery of {tuple(gallery.shape)}")
    best = torch.full((2, len(probes)), -torch.inf)
    for rows in torch.arange(len(probes)).split(chunk):
        for columns in torch.arange(len(gallery)).split(chunk):
            scores = compare(probes[rows], gallery[columns]).float()
            own = subjects[rows, None] == gallery_subjects[columns]
            for side, hidden in enumerate((~own, own)):
                found = scores.masked_fill(hidden, -torch.inf).amax(dim=1)
                best[side, rows] = torch.maximum(best[side, rows], found)
    return Searches(best[0], best[1], subjects)


def rank1(searches: Searches, generator: torch.Generator, *, replicates: int = REPLICATES) -> Estimate:
    """Share of probes with a mate that score it above everybody else (closed set); a tie is a miss.

    Args:
        searches: of one gallery.
        generator: source of the draws of the interval, over subjects.
        replicates: how many resamples.
    """
    return _share(searches, searches.mate > searches.other, generator, replicates)


def tpir_at_fpirs(
    searches: Searches,
    generator: torch.Generator,
    fpirs: Mapping[str, float] = FPIRS,
    *,
    leave_out: bool = False,
    replicates: int = REPLICATES,
) -> dict[str, Estimate]:
    """True positive identification rate at each false positive identification rate (ISO/IEC 19795-1, open set).

    FPIR is the share of probes without a mate that score anybody at the threshold or above, TPIR the share of probes
    with a mate that score it so, at whatever rank. The threshold is the lowest whose FPIR does not exceed the one asked
    for. The interval is over subjects, under that threshold.

    Args:
        searches: of one gallery.
        generator: source of the draws of the intervals.
        fpirs: name -> rate in (0, 1); one that needs more probes without a mate than there are is none, with a reason.
        leave_out: FPIR is of all probes, each searched as if its person were not enrolled.
        replicates: how many resamples.

    Raises:
        DataError: a rate is not between 0 and 1.

    Example:
        >>> import torch
        >>> mate, other = torch.tensor([0.9, 0.3, -torch.inf]), torch.tensor([0.1, 0.2, 0.4])
        >>> found = Searches(mate, other, torch.tensor([1, 2, 3]))
        >>> tpir_at_fpirs(found, torch.Generator(), {"0.5": 0.5})["0.5"].reason
        'FPIR 0.5 needs at least 2 probes without a mate, there are 1'
    """
    strangers = searches.other if leave_out else searches.other[~searches.mated]
    strangers = strangers.sort(descending=True).values
    rates = {}
    for name, fpir in fpirs.items():
        if not 0 < fpir < 1:
            raise DataError(f"FPIR must lie between 0 and 1, got {fpir}")
        # A quotient of counts: 1/10 must pass 0.1 however either is rounded.
        accepted = math.floor(fpir * len(strangers) + 1e-9)
        if not accepted:
            reason = f"FPIR {fpir:g} needs at least {round(1 / fpir)} probes without a mate, there are {len(strangers)}"
            rates[name] = Estimate(None, None, int(searches.mated.sum()), reason)
        else:
            rates[name] = _share(searches, searches.mate > strangers[accepted], generator, replicates)
    return rates


def _share(searches: Searches, hits: Tensor, generator: torch.Generator, replicates: int) -> Estimate:
    mated = searches.mated
    if not mated.any():
        return Estimate(None, None, 0, "no probe has a mate in the gallery")
    return mean_estimate(hits[mated], searches.subjects[mated], generator, replicates=replicates)
