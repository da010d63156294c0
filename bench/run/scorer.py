"""Judges recovered faces: image quality and identity leakage per victim, with intervals over identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

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


class Scorer:
    """Holds the victims' originals, which no attack sees, and compares recoveries with them.

    Args:
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

    def __init__(
        self,
        victims: FaceSet,
        pairs: PairProtocol,
        probes: Probes,
        *,
        evaluator: Evaluator,
        embeddings: Tensor,
        lpips: Lpips | MissingError,
        replicates: int,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._victims = victims
        self._probes = probes.attacked
        self._evaluator = evaluator
        self._lpips = lpips
        self._replicates = replicates
        self._seed = seed
        self._batch_size = batch_size
        self._device = device
        scores = pair_scores(embeddings, pairs)
        accuracy = lfw_accuracy(scores, pairs.same, pairs.fold)
        self.threshold = accuracy.threshold
        impostors = scores[~pairs.same]
        self.info = EvaluatorInfo(
            name=evaluator.name,
            sha256=evaluator.sha256,
            accuracy=accuracy.mean,
            threshold=accuracy.threshold,
            far_at_threshold=float((impostors >= accuracy.threshold).double().mean()),
        )
        self._originals = embeddings[probes.attacked]
        self._gallery = embeddings[probes.gallery]
        self._gallery_labels = victims.labels[probes.gallery]
        self._labels = victims.labels[probes.attacked]
        self._plain = embeddings
        self._content = content_ids(victims.images)

    def assess(self, recovered: Tensor) -> Assessment:
        """Compare recovered faces, float (V, 3, H, W) in [0, 1] in the order of the probes, with the originals."""
        columns: dict[str, list[Tensor]] = {name: [] for name in _QUALITY}
        lpips: list[Tensor] = []
        embeddings: list[Tensor] = []
        for index, batch in zip(self._probes.split(self._batch_size), recovered.split(self._batch_size), strict=True):
            faces = batch.to(self._device)
            originals = to_float(self._victims.images[index].to(self._device))
            for name, metric in _QUALITY.items():
                columns[name].append(metric(faces, originals).cpu())
            if isinstance(self._lpips, Lpips):
                lpips.append(self._lpips(faces, originals).cpu())
            embeddings.append(self._evaluator.embed(faces).cpu())
        table = {name: torch.cat(values) for name, values in columns.items()}
        if lpips:
            table["lpips"] = torch.cat(lpips)
        found = torch.cat(embeddings)
        leakage = identity_leakage(
            found,
            self._originals,
            self._labels,
            self._gallery,
            self._gallery_labels,
            self.threshold,
        )
        table |= {name: getattr(leakage, column) for name, column in _IDENTITY.items()}
        table["knn_distance"] = knn_distance(found, self._probes, self._plain, self._victims.labels, self._content)
        return self._assessment(table)

    def worst(self, assessments: Sequence[Assessment]) -> Assessment:
        """The pointwise worst case: per victim and figure, the value under the attack from which most leaks."""

        def worse(name: str, one: Tensor, other: Tensor) -> Tensor:
            return torch.fmin(one, other) if KINDS[name].leaks < 0 else torch.fmax(one, other)

        def merged(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: worse(name, values, other[name]) for name, values in one.items()}

        return self._assessment(reduce(merged, (assessment.values for assessment in assessments)))

    def gain(self, name: str, after: Assessment, before: Assessment) -> Measure:
        """How much more leaks by the figure ``name`` in ``after`` than in ``before``, paired over the victims."""
        generator = torch.Generator().manual_seed(self._seed)
        more, less = (before, after) if KINDS[name].leaks < 0 else (after, before)
        gained = more.values[name].double() - less.values[name].double()
        estimate = mean_estimate(gained, self._labels, generator, replicates=self._replicates)
        return Measure.of(estimate, "leakage")

    def measure(self, name: str, values: Tensor) -> Measure:
        """The figure ``name``: the mean of ``values``, float (V,) in the order of the probes, with its interval."""
        generator = torch.Generator().manual_seed(self._seed)
        estimate = mean_estimate(values, self._labels, generator, replicates=self._replicates)
        return KINDS[name].measure(estimate)

    def _assessment(self, values: dict[str, Tensor]) -> Assessment:
        quality = Quality(
            **{name: self.measure(name, values[name]) for name in _QUALITY},
            lpips=self._lpips_measure(values),
            identity=Identity(
                **{name: self.measure(name, values[name]) for name in (*_IDENTITY, "knn_distance")},
            ),
        )
        per_image = pd.DataFrame({name: column.double().numpy() for name, column in values.items()})
        per_image.insert(0, "identity", [self._victims.names[int(label)] for label in self._labels])
        per_image.insert(0, "image", self._probes.numpy())
        return Assessment(values, per_image, quality)

    def _lpips_measure(self, values: dict[str, Tensor]) -> Measure:
        if isinstance(self._lpips, Lpips):
            return self.measure("lpips", values["lpips"])
        return Measure(value=None, direction=KINDS["lpips"].direction, reason=str(self._lpips))


def state_inference(right: Tensor | None, defense: Defense, scorer: Scorer) -> StateInference | None:
    """Hit rates over the attacked images, with intervals over identities.

    Args:
        right: bool (V, k, C), the channels that an attack put in their place, images in the order of the probes; None
            of one that inferred no places.
        defense: the one in use.
        scorer: knows whose images they are.

    Returns:
        The rates, or None where the attack inferred nothing.
    """
    if right is None:
        return None
    states = defense.states()
    return StateInference(
        faces=scorer.measure("state_faces", right.all(dim=2).double().mean(dim=1)),
        channels=scorer.measure("state_channels", right.double().mean(dim=(1, 2))),
        chance=None if states is None else 1 / len(states),
    )
