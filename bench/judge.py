"""Judges recovered faces: image quality and identity leakage per victim, with intervals over identities."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from bench.data.faceset import FaceSet, PairProtocol, to_float
from bench.errors import MissingError
from bench.metrics.bootstrap import mean_estimate
from bench.metrics.estimate import Estimate
from bench.metrics.evaluator import Evaluator
from bench.metrics.identity import identity_leakage
from bench.metrics.image_quality import ms_ssim, psnr, psnr_aligned, ssim
from bench.metrics.perceptual import Lpips
from bench.metrics.verification import lfw_accuracy, pair_scores
from bench.probes import Probes
from bench.results import Direction, EvaluatorInfo, Identity, Measure, Quality

#: Figure in the result -> per-image value that it is the mean of.
_IDENTITY = {"type1_tar": "type1", "type2_tar": "type2", "rank1": "rank1", "cosine": "cosine"}
_QUALITY = {"ssim": ssim, "psnr": psnr, "psnr_aligned": psnr_aligned, "ms_ssim": ms_ssim}


#: The schema knows two sides: a higher similarity to the original is not what privacy wants.
LEAKAGE: Direction = "utility"


def to_measure(estimate: Estimate, direction: Direction) -> Measure:
    """An :class:`Estimate` as it stands in the result."""
    return Measure(
        value=estimate.value,
        ci95=estimate.ci95,
        n=estimate.n,
        higher_is_better_for=direction,
        reason=estimate.reason,
    )


@dataclass(frozen=True, slots=True)
class Assessment:
    """What came back, per victim image (a table without faces) and in sum."""

    per_image: pd.DataFrame
    quality: Quality


class Judge:
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
            sha256=evaluator.describe().get("sha256"),
            accuracy=accuracy.mean,
            threshold=accuracy.threshold,
            far_at_threshold=float((impostors >= accuracy.threshold).double().mean()),
        )
        self._originals = embeddings[probes.attacked]
        self._gallery = embeddings[probes.gallery]
        self._gallery_labels = victims.labels[probes.gallery]
        self._labels = victims.labels[probes.attacked]

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
        leakage = identity_leakage(
            torch.cat(embeddings),
            self._originals,
            self._labels,
            self._gallery,
            self._gallery_labels,
            self.threshold,
        )
        table |= {name: getattr(leakage, column) for name, column in _IDENTITY.items()}
        quality = Quality(
            **{name: self._measure(table[name]) for name in _QUALITY},
            lpips=self._lpips_measure(table),
            identity=Identity(**{name: self._measure(table[name]) for name in _IDENTITY}),
        )
        per_image = pd.DataFrame({name: values.double().numpy() for name, values in table.items()})
        per_image.insert(0, "identity", [self._victims.names[int(label)] for label in self._labels])
        per_image.insert(0, "image", self._probes.numpy())
        return Assessment(per_image, quality)

    def _measure(self, values: Tensor, direction: Direction = LEAKAGE) -> Measure:
        generator = torch.Generator().manual_seed(self._seed)
        estimate = mean_estimate(values, self._labels, generator, replicates=self._replicates)
        return to_measure(estimate, direction)

    def _lpips_measure(self, table: dict[str, Tensor]) -> Measure:
        if isinstance(self._lpips, Lpips):
            return self._measure(table["lpips"], "privacy")
        return Measure(value=None, higher_is_better_for="privacy", reason=str(self._lpips))
