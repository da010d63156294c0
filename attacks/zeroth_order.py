"""Zeroth-order gradient ascent on the score, in the latents of a face prior."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.parts.eigenfaces import EigenfaceSearch, EigenfaceSearchOptions, LatentScores, directions
from bench.randomness import derived

#: Of Adam; one second moment for all latents, which share a scale.
_BETA1, _BETA2 = 0.9, 0.999
#: Of the filter, all relative to the length of the slope as the first answers show it. What a linear model of the score
#: leaves unexplained, as a standard deviation. Variance that the slope gains on a way: in all per unit of distance, and
#: along the way, where it falls as the top comes near, per square unit. How much of its uncertainty shortens a step.
_CURVATURE = 0.03
_DRIFT = 0.05
_BEND = 0.02
_CAUTION = 0.1
#: The least that the first answers may say about the slope, as a share of the variance of an answer.
_LEAST_SIGNAL = 0.1
#: Variance below which answers are all the same, as a single one is.
_FLAT = 1e-12
#: Answers shall vary this many times as much as a random defence makes them; radii to get there, and how fast.
_SIGNAL_TO_NOISE = 4.0
_NOISY_RADIUS, _LARGEST_RADIUS = 0.6, 1.0
_WIDEN, _NARROW = 1.15, 0.9


class ZerothOrderOptions(EigenfaceSearchOptions):
    """Options of :class:`ZerothOrder`."""

    prior: Literal["eigenfaces"] = Field("eigenfaces", description="What turns latents into faces.")
    estimator: Literal["filter", "central", "forward"] = Field(
        "filter",
        description="Estimator of the gradient: filter keeps what all queries so far told; central and forward take "
        "finite differences afresh in every step, the latter as published.",
    )
    directions: int = Field(
        16,
        ge=1,
        le=65536,
        description="Random directions per step. A step takes as many queries with filter, one more with forward, "
        "twice as many with central.",
    )
    radius: float = Field(
        0.3,
        gt=0,
        le=_LARGEST_RADIUS,
        description="Length of a difference (mu) along a direction of unit variance, in standard deviations of the "
        "latent. Where the scores are noisy, filter takes longer ones.",
    )
    step: float = Field(
        1.5, gt=0, le=100, description="Length of the first steps, in standard deviations of the latent; falls to zero."
    )


class ZerothOrder(EigenfaceSearch):
    """Estimates the gradient of the score with respect to the latent from queries, and climbs it (MAP2V).

    As published, a step spends one query on the current face and one on each random direction, follows the mean of
    the differences, and forgets them. The default remembers: a Kalman filter holds a Gaussian belief about the
    score and its slope at the current latent. Each answer updates it by what the belief did not foresee, weighted
    with the measured noise of a query, and each step moves it along and makes the slope a little less certain. It is
    the least-squares slope of all answers, the older the less. The steps are shorter where the slope is uncertain, so
    that a score without information leads nowhere.
    """

    name = "zeroth-order"
    summary = "climbs gradients of the verification score that are estimated from queries"
    cost = "fit: PCA of the public faces; recovery: `queries` score queries per victim"
    reference = "MAP2V (Zhang et al.), CVPR 2024"
    opens = frozenset({"mixture"})
    Options = ZerothOrderOptions
    presets: ClassVar = {
        "quick": {"queries": 128, "components": 64, "directions": 8},
        "cpu": {"queries": 2_000, "components": 128},
        "gpu": {"queries": 6_800, "components": 256},
        # 400 iterations of 16 directions and the face itself.
        "paper": {"queries": 6_800, "components": 512, "estimator": "forward", "radius": 0.1, "step": 2.0},
    }
    options: ZerothOrderOptions

    def search(self, scores: LatentScores, start: Tensor) -> Tensor:
        return (self._filtered if self.options.estimator == "filter" else self._differences)(scores, start)

    def _filtered(self, scores: LatentScores, latents: Tensor) -> Tensor:
        options, size = self.options, latents.shape[1]
        level, noise = scores.at(latents)
        belief: _Belief | None = None
        narrowest = torch.full_like(noise, options.radius)
        radius = torch.where(noise > 0, narrowest.clamp(min=_NOISY_RADIUS), narrowest)
        steps = math.ceil(scores.left / options.directions)
        for step in range(steps):
            count = min(options.directions, scores.left)
            moves = radius[..., None] * directions(count, size, derived(self.seed, "step", step)).to(latents)
            answers = scores(latents[:, None] + moves)
            spread = answers.var(dim=1, correction=0, keepdim=True)
            if belief is None:
                # Along a direction of unit variance the score changes by the length of the slope.
                signal = torch.maximum(spread - noise, _LEAST_SIGNAL * noise).clamp_min(_FLAT)
                belief = _Belief(level, noise, signal / radius.square(), size)
            belief.update(moves, answers)
            drowned = spread < (1 + _SIGNAL_TO_NOISE) * noise
            radius = torch.where(
                drowned, (radius * _WIDEN).clamp(max=_LARGEST_RADIUS), torch.maximum(radius * _NARROW, narrowest)
            )
            slope = belief.slope - options.penalty * latents
            scale = (slope.square().sum(dim=1, keepdim=True) + _CAUTION * belief.uncertainty).sqrt()
            move = options.step * math.sqrt(1 - step / steps) * slope / scale.clamp_min(torch.finfo(scale.dtype).tiny)
            latents = latents + move
            belief.move(move)
        return latents

    def _differences(self, scores: LatentScores, latents: Tensor) -> Tensor:
        """Adam on fresh finite differences."""
        options, size = self.options, latents.shape[1]
        central = options.estimator == "central"
        count = min(options.directions, scores.left // 2 if central else scores.left - 1)
        steps = scores.left // (2 * count if central else count + 1) if count > 0 else 0
        momentum, power = torch.zeros_like(latents), latents.new_zeros(len(latents), 1)
        for step in range(steps):
            tried = directions(count, size, derived(self.seed, "step", step)).to(latents)
            moves = options.radius * tried
            others = -moves if central else torch.zeros_like(moves[:1])
            answers = scores(latents[:, None] + torch.cat((moves, others)))
            ahead, behind = answers[:, :count], answers[:, count:]
            differences = (ahead - behind) / (options.radius * (2 if central else 1))
            # E[d d^T] = I, so that the mean of (g . d) d over random d is g.
            gradient = differences @ tried / count - options.penalty * latents
            momentum = _BETA1 * momentum + (1 - _BETA1) * gradient
            power = _BETA2 * power + (1 - _BETA2) * gradient.square().sum(dim=1, keepdim=True)
            unbiased = momentum / (1 - _BETA1 ** (step + 1))
            scale = (power / (1 - _BETA2 ** (step + 1))).sqrt().clamp_min(torch.finfo(power.dtype).tiny)
            latents = latents + options.step * (1 - step / steps) * unbiased / scale
        return latents


class _Belief:
    """A Gaussian belief about the score and its slope at one latent, for each of N victims (Kalman 1960).

    The state is (score, slope), 1 + r values; an answer at ``latent + move`` is ``score + slope . move`` plus noise.
    """

    def __init__(self, level: Tensor, noise: Tensor, slope: Tensor, size: int) -> None:
        """From the score, its answers' variance and the slope's expected square length, (N, 1) each; size is r."""
        self._variance = noise + _CURVATURE**2 * slope
        self._slope = slope
        self._mean = torch.cat((level, level.new_zeros(len(level), size)), dim=1)
        self._covariance = torch.diag_embed(torch.cat((self._variance, (slope / size).expand(-1, size)), dim=1))

    @property
    def slope(self) -> Tensor:
        """Expected slope, float32 (N, r)."""
        return self._mean[:, 1:]

    @property
    def uncertainty(self) -> Tensor:
        """Variance of the slope over all latents together, float32 (N, 1)."""
        return self._covariance.diagonal(dim1=1, dim2=2)[:, 1:].sum(dim=1, keepdim=True)

    def update(self, moves: Tensor, answers: Tensor) -> None:
        """Learn from the answers, float32 (N, B), at ``latent + moves``, float32 (N, B, r)."""
        design = torch.cat((torch.ones_like(answers)[..., None], moves), dim=2)
        cross = self._covariance @ design.mT
        seen = design @ cross + torch.diag_embed(self._variance.expand_as(answers))
        surprise = answers - (design @ self._mean[..., None])[..., 0]
        gain = torch.linalg.solve(seen, cross.mT).mT
        self._mean = self._mean + (gain @ surprise[..., None])[..., 0]
        covariance = self._covariance - gain @ cross.mT
        # Rounding must not make it lopsided.
        self._covariance = (covariance + covariance.mT) / 2

    def move(self, move: Tensor) -> None:
        """Go to ``latent + move``, float32 (N, r): the score there is ``score + slope . move``."""
        self._mean[:, :1] += (self.slope * move).sum(dim=1, keepdim=True)
        # F P F^T for F that adds slope . move to the score changes one row and one column.
        column = self._covariance[:, :, 1:] @ move[..., None]
        self._covariance[:, :, :1] += column
        row = move[:, None] @ self._covariance[:, 1:, :]
        self._covariance[:, :1, :] += row
        along = move[:, :, None] * move[:, None, :]
        self._covariance[:, 1:, 1:] += _BEND * self._slope[..., None] * along
        self._covariance.diagonal(dim1=1, dim2=2)[:, 1:] += (
            _DRIFT * self._slope / move.shape[1] * move.norm(dim=1, keepdim=True)
        )
