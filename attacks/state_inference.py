"""Telling which state a random defence drew, from the representation alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StateClassifier(nn.Module):
    """Linear discriminant analysis over per-channel energies.

    A defence that picks and permutes channels leaves a fingerprint: each channel's energy tells which
    coefficient it holds. An attacker who knows the list of states reads the state off it and undoes the
    layout, so a secret choice that can be inferred protects nothing.

    The features are the logarithms of each channel's mean square; classes are the states, with a mean
    each and one pooled covariance (Gaussian classes of equal prior).

    Attributes:
        states: int64 (K, D) buffer, every state.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, states: int, channels: int) -> None:
        """
        Args:
            states: how many states the defence can draw.
            channels: C of the representations.
        """
        super().__init__()
        self.register_buffer("weight", torch.zeros(channels, states))
        self.register_buffer("bias", torch.zeros(states))

    @staticmethod
    def features(representations: Tensor) -> Tensor:
        """float32 (N, C) log energies of representations (N, C, h, w)."""
        return torch.log(representations.float().square().mean(dim=(2, 3)) + 1e-12)

    def fit(self, features: Tensor, classes: Tensor) -> None:
        """Estimate from examples.

        Args:
            features: float32 (N, C), from :meth:`features`.
            classes: int64 (N,), the number of the state that was drawn for each.
        """
        features, classes = features.cpu().double(), classes.cpu()
        one_hot = nn.functional.one_hot(classes, len(self.bias)).to(features.dtype)
        counts = one_hot.sum(dim=0)
        means = (one_hot.T @ features) / counts.clamp(min=1)[:, None]
        centred = features - means[classes]
        covariance = centred.T @ centred / max(1, len(features) - len(self.bias))
        # A little of the average variance on the diagonal keeps channels that always agree invertible.
        ridge = 1e-4 * covariance.diagonal().mean() + 1e-12
        covariance += ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        weight = torch.linalg.solve(covariance, means.T)
        self.weight.copy_(weight)
        self.bias.copy_(-0.5 * (means.T * weight).sum(dim=0))
        self.bias[counts.to(self.bias.device) == 0] = -torch.inf

    def predict(self, features: Tensor) -> Tensor:
        """The most likely state for each row of features (N, C): int64 (N,)."""
        return (features @ self.weight + self.bias).argmax(dim=1)

    def forward(self, representations: Tensor) -> Tensor:
        """The most likely state of each representation (N, C, h, w): int64 (N,)."""
        return self.predict(self.features(representations))
