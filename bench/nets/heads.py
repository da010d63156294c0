"""Margin softmax heads: the classification loss under which embeddings become comparable by cosine.

The head holds one centre per identity. With x an L2-normalised embedding, w_j the L2-normalised centres, y the label
and cos t_j = <x, w_j>, the logits are s * cos t_j for j != y and s * psi(t_y) for j = y, where

* CosFace (Wang et al., CVPR 2018, eq. 4): psi(t) = cos t - m;
* ArcFace (Deng et al., CVPR 2019, eq. 3): psi(t) = cos(t + m);
* combined (Deng et al., CVPR 2019, eq. 4): psi(t) = cos(m1 t + m) - m3, of which both are special cases.

The loss is the cross-entropy of these logits. With m = 0 (m1 = 1, m3 = 0) all are the plain normalised softmax.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import UsageError

#: Floor of 1 - cos^2 t: sin t has an infinite slope at cos t = +-1, and this keeps its gradient finite there.
SMALLEST_SQUARED_SINE = 1e-7


def arcface_target(cosine: Tensor, margin: float) -> Tensor:
    """cos(t + m) from cos t, any shape, continued beyond t + m = pi.

    cos(t + m) rises again there, which would reward the worst embeddings. Beyond that angle psi continues as
    cos t - m sin m (the authors' 'hard' margin), which keeps falling; there is a small step down at t = pi - m.
    """
    beyond = cosine < math.cos(math.pi - margin)
    return torch.where(beyond, cosine - margin * math.sin(margin), _shifted(cosine, margin))


def combined_target(cosine: Tensor, angle_factor: float, margin: float, cosine_margin: float) -> Tensor:
    """cos(m1 t + m) - m3 from cos t, any shape, falling over all of [0, pi].

    With m1 = 1 the angular part is :func:`arcface_target`. With m1 > 1 it is continued beyond m1 t + m = pi, where the
    cosine would rise again, by a cosine of slope one: -1 - (cos t* - cos t), with t* = (pi - m) / m1.
    """
    if angle_factor == 1:
        return arcface_target(cosine, margin) - cosine_margin
    sine = (1 - cosine.square()).clamp_min(SMALLEST_SQUARED_SINE).sqrt()
    inside = torch.cos(angle_factor * torch.atan2(sine, cosine) + margin)
    turn = math.cos((math.pi - margin) / angle_factor)
    return torch.where(cosine < turn, cosine - turn - 1, inside) - cosine_margin


def _shifted(cosine: Tensor, margin: float) -> Tensor:
    sine = (1 - cosine.square()).clamp_min(SMALLEST_SQUARED_SINE).sqrt()
    return cosine * math.cos(margin) - sine * math.sin(margin)


def check_size(classes: int, scale: float) -> None:
    """Refuse a head over fewer than two identities, or of a scale that is not positive and finite (UsageError)."""
    if classes < 2:
        raise UsageError(f"a recogniser needs at least 2 identities to tell apart, got {classes}")
    if not (scale > 0 and math.isfinite(scale)):
        raise UsageError(f"scale must be positive and finite, got {scale}")


def check_margins(angle_factor: float, margin: float, cosine_margin: float) -> None:
    """Refuse margins that no embedding could meet.

    Raises:
        UsageError: m1 outside [1, 4], m outside [0, pi / 2) or m3 outside [0, 1).
    """
    for name, value, low, high in (("margin", margin, 0, math.pi / 2), ("cosine_margin", cosine_margin, 0, 1)):
        if not low <= value < high:
            raise UsageError(f"{name} must lie in [{low}, {high:.4g}), got {value}")
    if not 1 <= angle_factor <= 4:
        raise UsageError(f"angle_factor must lie in [1, 4], got {angle_factor}")


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
        check_size(classes, scale)
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
            cosine = F.linear(F.normalize(embeddings.to(self.weight.dtype)), F.normalize(self.weight))
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
        column = labels.unsqueeze(1)
        target = self.target(cosine.gather(1, column).squeeze(1))
        return self.scale * cosine.scatter(1, column, target.unsqueeze(1))

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

    Beyond t + m = pi it is continued (:func:`arcface_target`).
    """

    largest_margin = math.pi / 2

    def target(self, cosine: Tensor) -> Tensor:
        return arcface_target(cosine, self.margin)


class Combined(MarginHead):
    """Angular and cosine margins together: psi(t) = cos(m1 t + m) - m3.

    Args:
        margin: m, radians.
        angle_factor: m1, in [1, 4].
        cosine_margin: m3, in [0, 1).
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
        angle_factor: float = 1.0,
        cosine_margin: float = 0.0,
    ) -> None:
        check_margins(angle_factor, margin, cosine_margin)
        super().__init__(embedding_size, classes, scale=scale, margin=margin, label_smoothing=label_smoothing)
        self.angle_factor = angle_factor
        self.cosine_margin = cosine_margin

    def target(self, cosine: Tensor) -> Tensor:
        return combined_target(cosine, self.angle_factor, self.margin, self.cosine_margin)
