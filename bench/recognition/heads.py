"""Margin softmax heads: the classification loss under which embeddings become comparable by cosine.

The head holds one centre per identity. With x an L2-normalised embedding, w_j the L2-normalised centres, y the label
and cos t_j = <x, w_j>, the logits are s * cos t_j for j != y and s * psi(t_y) for j = y, where

* CosFace (Wang et al., CVPR 2018, eq. 4): psi(t) = cos t - m;
* ArcFace (Deng et al., CVPR 2019, eq. 3): psi(t) = cos(t + m).

The loss is the cross-entropy of these logits. With m = 0 both are the plain normalised softmax.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import UsageError
from bench.registry import Registry


class MarginHead(nn.Module, ABC):
    """A margin softmax over ``classes`` identities.

    Args:
        embedding_size: D.
        classes: K, identities.
        scale: s, the radius of the sphere on which logits live.
        margin: m, in cosine (CosFace) or radians (ArcFace).
        label_smoothing: share of the target spread evenly over all identities, in [0, 1).

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(
        self, embedding_size: int, classes: int, *, scale: float, margin: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if classes < 2:
            raise UsageError(f"a recogniser needs at least 2 identities to tell apart, got {classes}")
        if not (scale > 0 and math.isfinite(scale)):
            raise UsageError(f"scale must be positive and finite, got {scale}")
        if not 0 <= margin < self.largest_margin:
            raise UsageError(f"margin must lie in [0, {self.largest_margin:.4g}), got {margin}")
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label smoothing must lie in [0, 1), got {label_smoothing}")
        self.scale = scale
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(classes, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    #: Margins at and beyond this one push the target below every angle it can reach.
    largest_margin: ClassVar[float]

    @abstractmethod
    def target(self, cosine: Tensor) -> Tensor:
        """psi(t) from cos t, both (N,), float32: non-increasing in t over [0, pi]."""

    def cosines(self, embeddings: Tensor) -> Tensor:
        """cos t_j of (N, D) embeddings to the K centres: float32 (N, K) in [-1, 1]."""
        # float32 whatever autocast says: with s = 64, bfloat16's 8 bits of mantissa put steps of 0.25 into the logits.
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = F.linear(F.normalize(embeddings.float()), F.normalize(self.weight.float()))
        return cosine.clamp(-1.0, 1.0)

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Margin logits: float32 (N, K) from embeddings (N, D) and int64 labels (N,).

        Raises:
            ValueError: labels of another type or shape, or outside [0, K).
        """
        self._check(embeddings, labels)
        return self._with_margin(self.cosines(embeddings), labels)

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and which embeddings lie nearest to their own centre (no margin).

        Args:
            embeddings: (N, D), any scale.
            labels: int64 (N,) in [0, K).

        Returns:
            The loss, a float32 scalar, and bool (N,).

        Raises:
            ValueError: labels of another type or shape, or outside [0, K).
        """
        self._check(embeddings, labels)
        cosine = self.cosines(embeddings)
        hits = cosine.detach().argmax(1) == labels
        loss = F.cross_entropy(self._with_margin(cosine, labels), labels, label_smoothing=self.label_smoothing)
        return loss, hits

    def _with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        own = labels.unsqueeze(1)
        return self.scale * cosine.scatter(1, own, self.target(cosine.gather(1, own).squeeze(1)).unsqueeze(1))

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(embeddings)},), got {labels.dtype} {tuple(labels.shape)}")
        # Synchronises a GPU once a step; a wrong label would kill the whole CUDA context instead.
        if len(labels):
            low, high = torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= len(self.weight):
                raise ValueError(f"labels must lie in [0, {len(self.weight)}), got {low} to {high}")


class CosFace(MarginHead):
    """Additive cosine margin: psi(t) = cos t - m."""

    largest_margin = 1.0

    def target(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class ArcFace(MarginHead):
    """Additive angular margin: psi(t) = cos(t + m).

    cos(t + m) rises again once t + m > pi, which would reward the worst embeddings. Beyond that angle psi continues as
    cos t - m sin m (the authors' 'hard' margin), which keeps falling; there is a small step down at
    t = pi - m. The authors' alternative, ``easy_margin``, applies the margin only where t < pi / 2.

    Args:
        easy_margin: apply the margin only to embeddings within 90 degrees of their centre.
    """

    largest_margin = math.pi / 2

    def __init__(
        self,
        embedding_size: int,
        classes: int,
        *,
        scale: float,
        margin: float,
        label_smoothing: float = 0.0,
        easy_margin: bool = False,
    ) -> None:
        super().__init__(embedding_size, classes, scale=scale, margin=margin, label_smoothing=label_smoothing)
        self.easy_margin = easy_margin

    def target(self, cosine: Tensor) -> Tensor:
        # sin t has an infinite slope at cos t = +-1; the floor keeps its gradient finite there.
        sine = (1 - cosine.square()).clamp_min(1e-7).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        if self.easy_margin:
            return torch.where(cosine > 0, shifted, cosine)
        beyond = cosine < math.cos(math.pi - self.margin)
        return torch.where(beyond, cosine - self.margin * math.sin(self.margin), shifted)


#: Margin heads by name.
HEADS: Registry[type[MarginHead]] = Registry("head")
HEADS.add("arcface", lambda: ArcFace)
HEADS.add("cosface", lambda: CosFace)
