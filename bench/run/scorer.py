"""Judges recovered faces: image quality and identity leakage per victim, with intervals over identities."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from bench.data.faces import FaceSet, PairProtocol
from bench.errors import MissingError
from bench.images import to_float
from bench.measures import KINDS, Measure
from bench.metrics.bootstrap import mean_estimate
from bench.metrics.evaluator import Evaluator
from bench.metrics.identity import Probes, content_ids, identity_leakage, knn_distance
from bench.metrics.image_quality import ms_ssim, psnr, psnr_aligned, ssim
from bench.metrics.perceptual import Lpips
from bench.metrics.verification import lfw_accuracy, pair_scores
from bench.results import EvaluatorInfo, Identity, Quality, StateInference
from defenses.base import Defense

#: Figure in the result -> per-image value that it is the mean of.
_IDENTITY = {"type1_tar": "type1", "type2_tar": "type2", "rank1": "rank1", "rank5": "rank5", "cosine": "cosine"}
_QUALITY = {"ssim": ssim, "psnr": psnr, "psnr_aligned": psnr_aligned, "ms_ssim": ms_ssim}


@dataclass(frozen=True, slots=True)
class Assessment:
    """What came back, per victim image and in sum.

    Attributes:
        values: figure -> float (V,), one value per probe, NaN where it cannot be measured.
        per_image: the same as a table, with the images' numbers and the names of their people, without faces.
        quality: the means, with intervals.
    """

    values: dict[str, Tensor]
    per_image: pd.DataFrame
    quality: Quality


@dataclass(frozen=True)
class Scorer:
    """Holds the victims' originals, which no attack sees, and compares recoveries with them.

    Attributes:
        victims: all victim faces.
        pairs: their protocol, which sets the evaluator's threshold on plain faces.
        probes: which images are attacked, and which others are plain.
        evaluator: the judging recogniser.
        embeddings: its embeddings of ``victims``, float32 (N, D), unit rows.
        lpips: the LPIPS metric, or why there is none.
        replicates: of the bootstrap.
        seed: of the bootstrap; every assessment starts it anew, so that comparisons are paired.
        batch_size: faces at once.
        device: where metrics are computed.
    """

    victims: FaceSet
    pairs: PairProtocol
    probes: Probes
    evaluator: Evaluator
    embeddings: Tensor
    lpips: Lpips | MissingError
    replicates: int
    seed: int
    batch_size: int
    device: torch.device

    @functools.cached_property
    def info(self) -> EvaluatorInfo:
        """The evaluator, with its operating point on the victims' plain pairs."""
        scores = pair_scores(self.embeddings, self.pairs)
        accuracy = lfw_accuracy(scores, self.pairs.same, self.pairs.fold)
        return EvaluatorInfo(
            name=self.evaluator.name,
            sha256=self.evaluator.sha256,
            accuracy=accuracy.mean,
            threshold=accuracy.threshold,
            far_at_threshold=float((scores[~self.pairs.same] >= accuracy.threshold).double().mean()),
        )

    @functools.cached_property
    def _content(self) -> Tensor:
        return content_ids(self.victims.images)

    @property
    def _labels(self) -> Tensor:
        return self.victims.labels[self.probes.attacked]

    def assess(self, recovered: Tensor) -> Assessment:
        """Compare recovered faces, float (V, 3, H, W) in [0, 1] in the order of the probes, with the originals."""
        metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(_QUALITY)
        if isinstance(self.lpips, Lpips):
            metrics["lpips"] = self.lpips
        columns: dict[str, list[Tensor]] = {name: [] for name in (*metrics, "embedding")}
        attacked, gallery = self.probes.attacked, self.probes.gallery
        for index, batch in zip(attacked.split(self.batch_size), recovered.split(self.batch_size), strict=True):
            faces = batch.to(self.device)
            originals = to_float(self.victims.images[index].to(self.device))
            for name, metric in metrics.items():
                columns[name].append(metric(faces, originals).cpu())
            # One face that was expanded to many (the floors that know nothing of the victims) is looked at once.
            seen = faces[:1] if batch.stride(0) == 0 else faces
            columns["embedding"].append(self.evaluator.embed(seen).cpu().expand(len(batch), -1))
        values = {name: torch.cat(column) for name, column in columns.items()}
        embeddings, plain, labels = values.pop("embedding"), self.embeddings, self.victims.labels
        leakage = identity_leakage(
            embeddings, plain[attacked], self._labels, plain[gallery], labels[gallery], self.info.threshold
        )
        values |= {name: getattr(leakage, column) for name, column in _IDENTITY.items()}
        values["knn_distance"] = knn_distance(embeddings, attacked, plain, labels, self._content)
        return self._assessment(values)

    def strangers(self, recovered: Tensor) -> Assessment:
        """Recovered faces, each held against the face of somebody else.

        What an attack gets there it owes to no victim: a constant guess gets as much. NaN where nobody else is there.
        """
        labels = self._labels
        other = somebody_else(labels)
        held = self.assess(recovered[other])
        nobody = labels[other] == labels
        return replace(
            held, values={name: column.masked_fill(nobody, torch.nan) for name, column in held.values.items()}
        )

    def worst(self, assessments: Sequence[Assessment]) -> Assessment:
        """The pointwise worst case: per victim and figure, the value under the attack from which most leaks."""
        if len(assessments) == 1:
            return assessments[0]
        values = {}
        for name in assessments[0].values:
            worse = torch.fmin if KINDS[name].leaks < 0 else torch.fmax
            values[name] = functools.reduce(worse, [assessment.values[name] for assessment in assessments])
        return self._assessment(values)

    def gain(self, name: str, after: Assessment, before: Assessment) -> Measure:
        """How much more leaks by the figure ``name`` in ``after`` than in ``before``, paired over the victims."""
        more, less = (before, after) if KINDS[name].leaks < 0 else (after, before)
        generator = torch.Generator().manual_seed(self.seed)
        gained = more.values[name].double() - less.values[name].double()
        estimate = mean_estimate(gained, self._labels, generator, replicates=self.replicates)
        return Measure.of(estimate, "leakage")

    def measure(self, name: str, values: Tensor) -> Measure:
        """The figure ``name``: the mean of ``values``, float (V,) in the order of the probes, with its interval."""
        generator = torch.Generator().manual_seed(self.seed)
        return KINDS[name].measure(mean_estimate(values, self._labels, generator, replicates=self.replicates))

    def _assessment(self, values: dict[str, Tensor]) -> Assessment:
        measures = {name: self.measure(name, column) for name, column in values.items()}
        if "lpips" not in measures:
            direction = KINDS["lpips"].direction
            measures["lpips"] = Measure(value=None, direction=direction, reason=str(self.lpips))
        identity = Identity(**{name: measures.pop(name) for name in (*_IDENTITY, "knn_distance")})
        per_image = pd.DataFrame({name: column.double().numpy() for name, column in values.items()})
        per_image.insert(0, "identity", [self.victims.names[int(label)] for label in self._labels])
        per_image.insert(0, "image", self.probes.attacked.numpy())
        return Assessment(values, per_image, Quality(**measures, identity=identity))


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
