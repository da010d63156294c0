"""Judges recovered faces: image quality and identity leakage per victim, with intervals over identities."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import pandas as pd
import torch
from torch import Tensor

from bench.data.faces import FaceSet, PairProtocol
from bench.errors import MissingError
from bench.images import to_float
from bench.measures import KINDS, Measure, leak
from bench.memory import in_halves
from bench.metrics.bootstrap import mean_estimate, verification_estimates
from bench.metrics.evaluator import Evaluator
from bench.metrics.identity import RANKS, Probes, content_ids, identity_leakage, knn_distance
from bench.metrics.image_quality import ms_ssim, psnr_aligned, ssim_and_psnr
from bench.metrics.perceptual import Lpips
from bench.metrics.verification import far_not_measurable, lfw_accuracy, pair_scores, roc
from bench.results import LEAST_ACCURACY, EvaluatorInfo, Identity, Quality, StateInference
from defenses.base import Defense

#: Figure in the result -> per-image value that it is the mean of.
_LEAKAGE = {
    "type1_tar": "type1",
    "type2_tar": "type2",
    "type1_far_1e3": "type1_strict",
    "type2_far_1e3": "type2_strict",
    "rank1": "rank1",
    "rank5": "rank5",
    "rank20": "rank20",
    "cosine": "cosine",
}
#: All figures of identity leakage.
IDENTITY = (*_LEAKAGE, "knn_distance")
#: False acceptance rate of the stricter of a judge's two thresholds.
STRICT_FAR = 1e-3

_QUALITY = ("ssim", "psnr", "psnr_aligned", "ms_ssim")


@dataclass(frozen=True, slots=True)
class Assessment:
    """What came back, per victim image and in sum.

    Attributes:
        values: figure -> float (V,), one value per probe, NaN where it cannot be measured. Of several judges
            ``FIGURE@JUDGE``, and under ``FIGURE`` the values of the judge by whom most leaks. Figures that are null
            have none.
        per_image: the same as a table, with the images' numbers and the names of their people, without faces.
        quality: the means, with intervals.
        embeddings: by the judge's name, its embeddings of the recovered faces, float32 (V, D), unit rows, on the CPU;
            none of a judge whose figures are withheld, nor of a worst case.
    """

    values: dict[str, Tensor]
    per_image: pd.DataFrame
    quality: Quality
    embeddings: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Judge:
    """A recogniser that scores identities, with its embeddings of all victims, float32 (N, D), unit rows."""

    evaluator: Evaluator
    embeddings: Tensor
    info: EvaluatorInfo

    @classmethod
    def on(cls, evaluator: Evaluator, embeddings: Tensor, pairs: PairProtocol, labels: Tensor) -> Self:
        """Find its operating points on the victims' plain pairs, and whether it tells them apart at all.

        Args:
            evaluator, embeddings: as of the judge.
            pairs: the victims' protocol.
            labels: int64 (N,), the person on each image.
        """
        scores = pair_scores(embeddings, pairs)
        impostors = scores[~pairs.same]
        people = torch.stack([labels[pairs.first], labels[pairs.second]], dim=1)
        estimates = verification_estimates(scores, pairs.same, pairs.fold, people)
        accuracy = KINDS["accuracy"].measure(estimates.accuracy)
        threshold = lfw_accuracy(scores, pairs.same, pairs.fold).threshold
        strict = None
        if far_not_measurable(STRICT_FAR, len(impostors)) is None:
            strict = float(roc(scores, pairs.same).threshold_at_far(STRICT_FAR))
        info = EvaluatorInfo(
            **evaluator.describe(),
            accuracy=accuracy,
            threshold=threshold,
            far_at_threshold=float((impostors >= threshold).double().mean()),
            impostor_pairs=len(impostors),
            threshold_far_1e3=strict,
            accepted_far_1e3=0 if strict is None else int((impostors.double() >= strict).sum()),
            withheld=_withheld(evaluator.name, accuracy, float(pairs.same.double().mean())),
        )
        return cls(evaluator, embeddings, info)


def _withheld(name: str, accuracy: Measure, genuine: float) -> str | None:
    """Why the figures of a judge of this accuracy on plain pairs are withheld; None where it may judge.

    It must tell :data:`~bench.results.LEAST_ACCURACY` of them apart, and be surely better than to give all the same
    answer, with ``genuine`` the share of genuine pairs.
    """
    chance = max(genuine, 1 - genuine)
    assert accuracy.value is not None
    if accuracy.value >= LEAST_ACCURACY and (accuracy.ci95 is None or accuracy.ci95[0] > chance):
        return None
    ends = "" if accuracy.ci95 is None else " [{:.1%}, {:.1%}]".format(*accuracy.ci95)
    least = (
        f"fewer than {LEAST_ACCURACY:.0%}"
        if accuracy.value < LEAST_ACCURACY
        else f"an interval that reaches chance ({chance:.0%})"
    )
    return (
        f"the judge {name} tells {accuracy.value:.1%}{ends} of {accuracy.n} plain pairs of the victims apart, {least}: "
        "it says nothing of identities (are the faces aligned, and is it a recogniser of faces like these?)"
    )


@dataclass(frozen=True)
class Scorer:
    """Holds the victims' originals, which no attack sees, and compares recoveries with them.

    Attributes:
        victims: all victim faces.
        probes: which images are attacked, and which others are plain.
        judges: the judging recognisers.
        guessed: why nobody can be looked up among these victims, where who is who was guessed; else None.
        lpips: the LPIPS metric, or why there is none.
        replicates: of the bootstrap.
        seed: of the bootstrap; every assessment starts it anew, so that comparisons are paired.
        batch_size: faces at once.
        device: where metrics are computed.
    """

    victims: FaceSet
    probes: Probes
    judges: Sequence[Judge]
    guessed: str | None
    lpips: Lpips | MissingError
    replicates: int
    seed: int
    batch_size: int
    device: torch.device

    @property
    def evaluators(self) -> dict[str, EvaluatorInfo]:
        """By name, the judges with their operating points on the victims' plain pairs."""
        return {judge.info.name: judge.info for judge in self.judges}

    @property
    def warnings(self) -> list[str]:
        """Of judges that say nothing of identities."""
        withheld = (judge.info.withheld for judge in self.judges)
        return [f"figures of identity leakage are withheld: {reason}" for reason in withheld if reason is not None]

    @functools.cached_property
    def _nulls(self) -> dict[str, dict[str, str]]:
        """Judge -> figure of identity -> why it is null."""
        gallery = len(self.probes.gallery)
        ranks = {f"rank{rank}": f"the gallery holds {gallery} people: all are among {rank}" for rank in RANKS}
        common = {name: reason for name, reason in ranks.items() if gallery <= int(name.removeprefix("rank"))}
        common |= dict.fromkeys(ranks, self.guessed) if self.guessed else {}
        nulls = {}
        for name, info in self.evaluators.items():
            few = far_not_measurable(STRICT_FAR, info.impostor_pairs)
            strict = dict.fromkeys(("type1_far_1e3", "type2_far_1e3"), few) if few else {}
            nulls[name] = dict.fromkeys(IDENTITY, info.withheld) if info.withheld else common | strict
        return nulls

    def _column(self, figure: str, judge: str) -> str:
        return figure if len(self.judges) == 1 else f"{figure}@{judge}"

    @functools.cached_property
    def content(self) -> Tensor:
        return content_ids(self.victims.images)

    @property
    def _labels(self) -> Tensor:
        return self.victims.labels[self.probes.attacked]

    def assess(self, recovered: Tensor, seen: Mapping[str, Tensor] | None = None) -> Assessment:
        """Compare recovered faces, float (V, 3, H, W) in [0, 1] in the order of the probes, with the originals.

        ``seen`` are the judges' embeddings of them, where these are known (:attr:`Assessment.embeddings`).
        """
        metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr_aligned": psnr_aligned, "ms_ssim": ms_ssim}
        if isinstance(self.lpips, Lpips):
            metrics["lpips"] = self.lpips
        fit = [judge for judge in self.judges if judge.info.withheld is None]
        columns: dict[str, list[Tensor]] = {name: [] for name in ("ssim", "psnr", *metrics)}
        asked = {judge.info.name: judge.evaluator for judge in fit} if seen is None else {}
        looked_at: dict[str, list[Tensor]] = {name: [] for name in asked}
        attacked, gallery = self.probes.attacked, self.probes.gallery

        def look(rows: slice) -> None:
            batch = recovered[rows]
            faces = batch.to(self.device)
            originals = to_float(self.victims.images[attacked[rows]].to(self.device))
            found = dict(zip(("ssim", "psnr"), ssim_and_psnr(faces, originals), strict=True))
            found |= {name: metric(faces, originals) for name, metric in metrics.items()}
            # One face that was expanded to many (the floors that know nothing of the victims) is looked at once.
            looked = faces[:1] if batch.stride(0) == 0 else faces
            seen_as = {name: judge.embed(looked).cpu().expand(len(batch), -1) for name, judge in asked.items()}
            for table, part in ((columns, found), (looked_at, seen_as)):
                for name, values in part.items():
                    table[name].append(values.cpu())

        for _ in in_halves(look, len(attacked), self.batch_size, "measuring what came back"):
            pass
        values = {name: torch.cat(column) for name, column in columns.items()}
        embeddings = {name: torch.cat(batches) for name, batches in looked_at.items()} if seen is None else dict(seen)
        labels = self.victims.labels
        for judge in fit:
            name, info, plain, embedded = judge.info.name, judge.info, judge.embeddings, embeddings[judge.info.name]
            leakage = identity_leakage(
                embedded,
                plain[attacked],
                self._labels,
                plain[gallery],
                labels[gallery],
                info.threshold,
                torch.inf if info.threshold_far_1e3 is None else info.threshold_far_1e3,
            )
            found = {figure: getattr(leakage, column) for figure, column in _LEAKAGE.items()}
            found["knn_distance"] = knn_distance(embedded, attacked, plain, labels, self.content)
            values |= {self._column(f, name): found[f] for f in IDENTITY if f not in self._nulls[name]}
        return self._assessment(values, embeddings)

    def strangers(self, recovered: Tensor, assessed: Assessment) -> Assessment:
        """Recovered faces, ``assessed`` already, each held against the face of somebody else.

        What an attack gets there it owes to no victim: a constant guess gets as much. NaN where nobody else is there.
        """
        labels = self._labels
        other = somebody_else(labels)
        held = self.assess(recovered[other], {name: seen[other] for name, seen in assessed.embeddings.items()})
        nobody = labels[other] == labels
        return replace(
            held, values={name: column.masked_fill(nobody, torch.nan) for name, column in held.values.items()}
        )

    def worst(self, assessments: Sequence[Assessment]) -> Assessment:
        """The pointwise worst case: per judge, victim and figure, the value under the attack from which most leaks."""
        if len(assessments) == 1:
            return assessments[0]
        values = {}
        for column in assessments[0].values:
            name, _, judge = column.partition("@")
            if name in IDENTITY and column != self._column(name, judge):
                continue  # follows from those of the judges
            worse = torch.fmin if KINDS[name].leaks < 0 else torch.fmax
            values[column] = functools.reduce(worse, [assessment.values[column] for assessment in assessments])
        return self._assessment(values, {})

    def gain(self, name: str, after: Assessment, before: Assessment) -> Measure:
        """How much more leaks by the figure ``name`` in ``after`` than in ``before``, paired over the victims.

        Of several judges the largest gain that one finds; null where none may judge.
        """
        more, less = (before, after) if KINDS[name].leaks < 0 else (after, before)
        names = [self._column(name, judge) for judge in self.evaluators] if name in IDENTITY else [name]
        gains = []
        for column in names:
            if column in more.values:
                generator = torch.Generator().manual_seed(self.seed)
                gained = more.values[column].double() - less.values[column].double()
                estimate = mean_estimate(gained, self._labels, generator, replicates=self.replicates)
                gains.append(Measure.of(estimate, "leakage"))
        if not gains:
            return Measure(value=None, direction="leakage", reason=self._why_null(name))
        return max(gains, key=lambda gain: -torch.inf if gain.value is None else gain.value)

    def measure(self, name: str, values: Tensor) -> Measure:
        """The figure ``name``: the mean of ``values``, float (V,) in the order of the probes, with its interval."""
        generator = torch.Generator().manual_seed(self.seed)
        return KINDS[name].measure(mean_estimate(values, self._labels, generator, replicates=self.replicates))

    def _why_null(self, figure: str) -> str:
        return "; ".join(dict.fromkeys(nulls[figure] for nulls in self._nulls.values()))

    def _assessment(self, values: dict[str, Tensor], embeddings: dict[str, Tensor]) -> Assessment:
        """Means of the values, which are those of the judges where there are several."""
        measures = {name: self.measure(name, values[name]) for name in (*_QUALITY, "lpips") if name in values}
        if "lpips" not in measures:
            measures["lpips"] = _null("lpips", str(self.lpips))
        judges = {}
        for judge, nulls in self._nulls.items():
            columns = {figure: self._column(figure, judge) for figure in IDENTITY}
            judges[judge] = {
                figure: _null(figure, nulls[figure]) if figure in nulls else self.measure(figure, values[column])
                for figure, column in columns.items()
            }
        worst = {}
        for figure in IDENTITY:
            name = max(judges, key=lambda judge: leak(figure, judges[judge][figure]))
            worst[figure] = judges[name][figure]
            if figure not in self._nulls[name]:
                values = values | {figure: values[self._column(figure, name)]}
            else:
                worst[figure] = _null(figure, self._why_null(figure))
        per_image = pd.DataFrame({name: column.double().numpy() for name, column in values.items()})
        per_image.insert(0, "identity", [self.victims.names[int(label)] for label in self._labels])
        per_image.insert(0, "image", self.probes.attacked.numpy())
        several = {name: Identity(**found) for name, found in judges.items()} if len(judges) > 1 else {}
        quality = Quality(**measures, identity=Identity(**worst), judges=several)
        return Assessment(values, per_image, quality, embeddings)


def _null(figure: str, reason: str) -> Measure:
    return Measure(value=None, direction=KINDS[figure].direction, reason=reason)


def somebody_else(labels: Tensor) -> Tensor:
    """For each of V images another, int64 (V,), each taken once: of another person wherever nobody has half of them.

    Example:
        >>> import torch
        >>> somebody_else(torch.tensor([4, 4, 7, 9]))
        tensor([2, 3, 0, 1])
    """
    order = labels.argsort(stable=True)
    # Images of a person stand in a row: as far on as the longest row lies another person.
    other = torch.empty_like(order)
    other[order] = order.roll(-int(torch.unique(labels, return_counts=True)[1].max()))
    return other


def state_inference(right: Tensor | None, defense: Defense, scorer: Scorer) -> StateInference | None:
    """Hit rates over the attacked images, with intervals over identities; None of an attack that inferred no layout.

    ``right``, bool (V, k, C), are the channels whose place the attack knew, images in the order of the probes.
    """
    if right is None:
        return None
    states = defense.states()
    return StateInference(
        faces=scorer.measure("state_faces", right.all(dim=2).double().mean(dim=1)),
        channels=scorer.measure("state_channels", right.double().mean(dim=(1, 2))),
        chance=None if states is None else 1 / len(states),
    )
