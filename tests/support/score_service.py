"""A service that answers score queries about hidden faces, and scores without faces: for attacks that climb scores."""

from __future__ import annotations

import torch
from torch.nn import functional

from attacks.base import Observation
from attacks.parts.eigenfaces import Eigenfaces, LatentScores

SIZE = 16
VICTIMS = 12
#: Options of a search that takes a second.
SMALL = {"components": 40, "queries": 600}


class Service:
    """Scores with the cosine to the template of a hidden face, under a fixed random linear embedding, plus noise."""

    def __init__(self, hidden, noise=0.0, seed=3):
        draws = torch.Generator().manual_seed(seed)
        self._map = torch.randn(3 * SIZE * SIZE, 12, generator=draws)
        self._templates = self._embed(hidden)
        self._noise, self._draws = noise, draws
        self.asked = torch.zeros(len(hidden), dtype=torch.int64)

    def _embed(self, faces):
        return functional.normalize((faces - 0.5).flatten(1) @ self._map)

    def truth(self, faces):
        return (self._embed(faces) * self._templates).sum(dim=1)

    def score(self, faces, persons):
        self.asked += torch.bincount(persons, minlength=len(self.asked))
        exact = (self._embed(faces) * self._templates[persons]).sum(dim=1)
        return exact + self._noise * torch.randn(len(faces), generator=self._draws)


class OnLatents(LatentScores):
    """Scores of latents from a formula, without faces."""

    def __init__(self, formula, queries, victims):
        super().__init__(Eigenfaces(1, 1), lambda faces, persons: faces, victims, queries=queries, chunk=1)
        self._formula = formula

    def __call__(self, latents):
        self.left -= latents.shape[1]
        assert self.left >= 0
        return self._formula(latents)


def observation(score, victims=VICTIMS):
    """What the attack gets: nothing to look at, and somebody to ask."""
    return Observation(torch.zeros(victims, 1, 3, SIZE, SIZE), score=score)


def recovered(attack, adversary, hidden, noise=0.0):
    """The faces that the attack, fitted, finds for the hidden ones, and the service that it asked."""
    attack.learn(adversary)
    service = Service(hidden, noise)
    return attack.recover(observation(service.score)), service
