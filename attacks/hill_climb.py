"""Hill climbing on the score: combinations of eigenfaces that evolve towards the victim's template."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from attacks.parts.eigenfaces import EigenfaceSearch, EigenfaceSearchOptions, LatentScores, directions
from bench.randomness import derived

#: Candidates this far apart, in standard deviations of the latent, show different people: no larger steps.
_LARGEST_RADIUS = 1.0
#: Differences between candidates shall carry this many times the variance that a random defence adds to them.
_SIGNAL_TO_NOISE = 5.0
#: How fast the radius follows.
_WIDEN, _NARROW = 1.15, 0.9
#: Fewer generations than this are no start worth having.
_LEAST_GENERATIONS = 4


class HillClimbOptions(EigenfaceSearchOptions):
    """Options of :class:`HillClimb`."""

    batch: int = Field(32, ge=2, le=65536, description="Candidates per generation and start, in pairs.")
    starts: int = Field(
        1, ge=1, le=1024, description="Hills to climb: the first from the mean face, the others from random faces."
    )
    pilot: float = Field(
        0.5, gt=0, lt=1, description="Share of the queries spent on all starts; the rest goes to the highest one."
    )
    step_size: float = Field(
        0.4,
        gt=0,
        le=_LARGEST_RADIUS,
        description="First radius of the candidates, in standard deviations of the latent.",
    )

    @field_validator("batch")
    @classmethod
    def _pairs(cls, value: int) -> int:
        if value % 2:
            raise ValueError("candidates come in pairs: batch must be even")
        return value


class HillClimb(EigenfaceSearch):
    """An evolution strategy over the latents of eigenfaces, after the random climbs of Razzhigaev et al.

    Accepting whatever scores higher than ever before fails where the defence is random: the luckiest draw wins. So
    nothing is accepted here. Each generation is a batch of mirrored pairs ``m + s e``, ``m - s e`` along orthogonal
    directions (Brockhoff et al. 2010), and the face moves along the sum of the directions, each weighted with the
    difference that it made (Salimans et al. 2017): luck averages out, the incumbent's score is never needed, and a
    candidate far worse tells as much as one far better. The step size follows the length of the path, as in CSA-ES
    (Hansen and Ostermeier 2001), below a bound that falls linearly to zero with the budget. Where the measured noise
    of a query drowns the differences, candidates are taken from further away than the steps are long
    (Beyer's rescaled mutations).
    """

    name = "hill-climb"
    summary = "evolves combinations of eigenfaces towards a higher verification score"
    cost = "fit: PCA of the public faces; recovery: `queries` score queries per victim"
    reference = (
        "Razzhigaev et al., Darker than Black-Box: Face Reconstruction from Similarity Queries, arXiv 2106.14290, 2021"
    )
    opens = frozenset({"mixture"})
    Options = HillClimbOptions
    presets: ClassVar = {
        "quick": {"queries": 128, "components": 64, "batch": 16},
        "cpu": {"queries": 2_000, "components": 128},
        "gpu": {"queries": 96_000, "components": 512, "batch": 64, "starts": 4},
        "paper": {"queries": 96_000, "components": 512, "batch": 64, "starts": 10},
    }
    options: HillClimbOptions

    def search(self, scores: LatentScores, start: Tensor) -> Tensor:
        options = self.options
        size = start.shape[1]
        _, noise = scores.at(start)
        # Several starts, but only so many that each gets somewhere.
        piloted = int(options.pilot * scores.left)
        starts = max(1, min(options.starts, piloted // (options.batch * _LEAST_GENERATIONS)))
        pilots = piloted // (options.batch * starts)
        generations = pilots + math.ceil((scores.left - pilots * options.batch * starts) / options.batch)

        latents = start[:, None].repeat(1, starts, 1)
        latents[:, 1:] += torch.randn(starts - 1, size, generator=derived(self.seed, "starts")).to(start)
        climb = _Climb(latents, options, noise[:, None], generations)
        for generation in range(generations):
            if generation == pilots:
                climb.keep(climb.height.argmax(dim=1))
            # The last generation makes do with what is left, in pairs.
            batch = min(options.batch, scores.left // 2 * 2)
            if batch:
                climb.step(scores, derived(self.seed, "generation", generation), batch)
        return climb.latents[:, 0]


class _Climb:
    """S climbs for each of N victims, side by side.

    Attributes:
        latents: float32 (N, S, r), where they stand.
        height: float32 (N, S), the mean objective of the last generation, whose luck has averaged out.
    """

    def __init__(self, latents: Tensor, options: HillClimbOptions, noise: Tensor, total: int) -> None:
        """``noise``, (N, 1, 1), is the variance of an answer; the best climb will have had ``total`` generations."""
        victims, starts, size = latents.shape
        self.latents = latents
        self.height = latents.new_zeros(victims, starts)
        self._options, self._noise, self._total = options, noise, total
        self._step = latents.new_full((victims, starts, 1), options.step_size)
        self._floor = latents.new_zeros(victims, starts, 1)
        self._path = torch.zeros_like(latents)
        self._generation = 0
        # E |N(0, I)| in r dimensions.
        self._expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))

    def step(self, scores: LatentScores, generator: torch.Generator, batch: int) -> None:
        """One generation of ``batch`` candidates for each climb."""
        victims, starts, size = self.latents.shape
        pairs = batch // 2
        tried = directions(starts * pairs, size, generator).to(self.latents).view(starts, pairs, size)
        radius = torch.maximum(self._step, self._floor).clamp(max=_LARGEST_RADIUS)
        moves = radius[..., None] * torch.cat((tried, -tried), dim=1)
        candidates = self.latents[:, :, None] + moves
        score = scores(candidates.flatten(1, 2)).view(victims, starts, batch)
        objective = score - self._options.penalty * candidates.square().sum(dim=-1) / 2
        self.height = objective.mean(dim=2)

        difference = objective[..., :pairs] - objective[..., pairs:]
        # The difference of two answers has twice the variance of one.
        drowned = difference.square().mean(dim=2, keepdim=True) < 2 * _SIGNAL_TO_NOISE * self._noise
        self._floor = torch.where(drowned, radius * _WIDEN, self._floor * _NARROW).clamp(max=_LARGEST_RADIUS)
        weights = difference / difference.norm(dim=2, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
        # Were the scores random, each value of this would be a draw from N(0, 1).
        drift = (weights[..., None] * tried).sum(dim=2)
        # Ranking lets about a third of the candidates decide, which is what CSA's constants are made for.
        mass = batch / 3
        self.latents = self.latents + self._step * drift / math.sqrt(mass)
        self._adapt(drift, mass)

    def _adapt(self, drift: Tensor, mass: float) -> None:
        """Cumulative step-size adaptation with its usual constants (Hansen 2016, "The CMA evolution strategy")."""
        size = drift.shape[-1]
        self._generation += 1
        rate = (mass + 2) / (size + mass + 5)
        damping = 1 + rate + 2 * max(0.0, math.sqrt(max(0.0, (mass - 1) / (size + 1))) - 1)
        self._path = (1 - rate) * self._path + math.sqrt(rate * (2 - rate)) * drift
        # A path that starts at zero is short at first, which is no sign of steps that cancel.
        grown = math.sqrt(1 - (1 - rate) ** (2 * self._generation))
        excess = self._path.norm(dim=-1, keepdim=True) / (grown * self._expected) - 1
        bound = _LARGEST_RADIUS * (1 - self._generation / self._total)
        self._step = (self._step * torch.exp(rate / damping * excess).clamp(0.5, 1.5)).clamp(max=bound)

    def keep(self, best: Tensor) -> None:
        """Go on with one climb per victim, int64 (N,)."""
        index = best[:, None, None]
        for name in ("latents", "_step", "_floor", "_path"):
            value = getattr(self, name)
            setattr(self, name, value.gather(1, index.expand(-1, 1, value.shape[-1])))
        self.height = self.height.gather(1, best[:, None])
