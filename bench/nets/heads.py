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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Floor of 1 - cos^2 t: sin t has an infinite slope at cos t = +-1, and this keeps its gradient finite there.
SMALLEST_SQUARED_SINE = 1e-7


def margin_target(cosine: Tensor, angle_factor: float, margin: float, cosine_margin: float) -> Tensor:
    """cos(m1 t + m) - m3 from cos t, any shape, falling over all of [0, pi].

    cos(m1 t + m) rises again beyond m1 t + m = pi, which would reward the worst embeddings. Beyond that angle, with
    m1 = 1, it continues as cos t - m sin m (the authors' 'hard' margin), which keeps falling; there is a small step
    down at t = pi - m. With m1 > 1 it continues by a cosine of slope one: -1 - (cos t* - cos t), t* = (pi - m) / m1.
    """
    sine = (1 - cosine.square()).clamp_min(SMALLEST_SQUARED_SINE).sqrt()
    if angle_factor == 1:
        inside = cosine * math.cos(margin) - sine * math.sin(margin)
        beyond = cosine - margin * math.sin(margin)
    else:
        inside = torch.cos(angle_factor * torch.atan2(sine, cosine) + margin)
        beyond = cosine - math.cos((math.pi - margin) / angle_factor) - 1
    return torch.where(cosine < math.cos((math.pi - margin) / angle_factor), beyond, inside) - cosine_margin


class MarginHead(nn.Module, ABC):
    """A margin softmax over ``classes`` identities.

    Args:
        embedding_size: D.
        classes: K, identities.
        scale: s, the radius of the sphere on which logits live.
        margin: m, in cosine (CosFace) or radians (ArcFace).
        label_smoothing: share of the target spread evenly over all identities, in [0, 1).
    """

    def __init__(
        self, embedding_size: int, classes: int, *, scale: float, margin: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.scale, self.margin, self.label_smoothing = scale, margin, label_smoothing
        self.weight = nn.Parameter(torch.empty(classes, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    @property
    def constants(self) -> tuple[float, ...]:
        """What the loss depends on beside weights, embeddings and labels."""
        return self.scale, self.margin, self.label_smoothing

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
        """Mean cross-entropy, float32, and which embeddings lie nearest to their own centre (no margin), bool (N,).

        Of embeddings (N, D) of any scale and int64 labels (N,) in [0, K).

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
        # Synchronises a GPU once a step; a wrong label would kill the whole CUDA context instead. A step that is
        # captured, and replayed with other labels, cannot look at them.
        if len(labels) and not (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
            low, high = torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= len(self.weight):
                raise ValueError(f"labels must lie in [0, {len(self.weight)}), got {low} to {high}")


class CosFace(MarginHead):
    """Additive cosine margin, m in [0, 1): psi(t) = cos t - m."""

    def target(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class ArcFace(MarginHead):
    """Angular margin, and the combined one: psi(t) = cos(m1 t + m) - m3, continued as :func:`margin_target` says.

    Args:
        margin: m, radians in [0, pi / 2).
        angle_factor: m1, in [1, 4].
        cosine_margin: m3, in [0, 1).
    """

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
        super().__init__(embedding_size, classes, scale=scale, margin=margin, label_smoothing=label_smoothing)
        self.angle_factor, self.cosine_margin = angle_factor, cosine_margin

    @property
    def constants(self) -> tuple[float, ...]:
        return *super().constants, self.angle_factor, self.cosine_margin

    def target(self, cosine: Tensor) -> Tensor:
        return margin_target(cosine, self.angle_factor, self.margin, self.cosine_margin)
