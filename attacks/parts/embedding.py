"""From stolen templates to embeddings: constraints solved under stolen keys, or a map learnt from examples.

A template under a known key is a set of constraints on the embedding: bits say on which side of a hyperplane it lies,
indices which of several projections is largest, values what a polynomial of it gives. What fits them
(:meth:`defenses.template.TemplateDefense.misfit`) is looked for by gradients, under a Gaussian prior of the public
faces' embeddings, from a closed form where the defence has one and from public embeddings that fit best. Several
records of a person under different keys are constraints on one embedding: they add up.

Where no key is known, or a defence says nothing of constraints, a network learns the embedding from examples, as FEM
does (AAAI 2026): a perceptron or a Kolmogorov-Arnold network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.randomness import derived, seeded
from defenses.template import Misfit, TemplateDefense

#: Public embeddings at most that the prior is measured on, and those from which a search may start.
_PRIOR_FACES, _STARTS = 4096, 64
#: How many of these are held against the templates at once.
_STARTS_AT_ONCE = 8
#: People on whom an attacker tries out weights of the prior and measures how near estimates come.
_TRIED = 48
#: Weights of the prior, of which the best on public faces is taken; an infinite one leaves the closed form as it is.
_PRIORS = (math.inf, 1e-1, 1e-2, 1e-3, 1e-4)
#: Directions of the embeddings with less than this share of the largest variance are left to the mean.
_FAINTEST = 1e-4


class KanLayer(nn.Module):
    """A layer of a Kolmogorov-Arnold network, (N, inputs) to (N, outputs).

    Each edge is a function of its own: silu times a weight, plus a sum of Gaussian bumps on a fixed grid in [-2, 2] of
    the normalised input (Liu et al., ICLR 2025, with bumps for their B-splines: Li, arXiv 2405.06721).
    """

    centres: Tensor

    def __init__(self, inputs: int, outputs: int, bumps: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.register_buffer("centres", torch.linspace(-2, 2, bumps))
        self.width = 4 / (bumps - 1)
        self.base = nn.Linear(inputs, outputs)
        self.bumps = nn.Linear(inputs * bumps, outputs, bias=False)
        nn.init.normal_(self.bumps.weight, std=0.1 / math.sqrt(inputs * bumps))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        basis = torch.exp(-(((self.norm(x)[..., None] - self.centres) / self.width) ** 2))
        output: Tensor = self.base(functional.silu(x)) + self.bumps(basis.flatten(1))
        return output


def learnt_map(kind: Literal["mlp", "kan"], inputs: int, outputs: int, width: int = 512) -> nn.Sequential:
    """A network from templates (N, T), normalised, to embeddings (N, D), of two hidden layers or one."""
    if kind == "kan":
        return nn.Sequential(nn.BatchNorm1d(inputs), KanLayer(inputs, width // 2), KanLayer(width // 2, outputs))
    return nn.Sequential(
        *(nn.BatchNorm1d(inputs), nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2)),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2), nn.Linear(width, outputs)),
    )


class EmbeddingEstimator(nn.Module):
    """Estimates the embeddings behind templates of ``mechanism``, with the stolen keys or without any.

    ``with_keys`` says which; ``kind`` is that of the network where one is learnt, ``steps`` those of a search.

    Attributes:
        mean: float32 (D,), of public embeddings.
        spread: float32 (D, D), a square root of their covariance.
        bank: float32 (B, D), some of them.
        prior: weight of the prior, found out on public faces.
        near: mean cosine of estimated and true embeddings of public faces, from one template each.
    """

    mean: Tensor
    spread: Tensor
    bank: Tensor
    prior: Tensor
    near: Tensor

    def __init__(
        self,
        mechanism: TemplateDefense,
        embedding_size: int,
        *,
        with_keys: bool,
        kind: Literal["mlp", "kan"],
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.__dict__["mechanism"] = mechanism  # no part of the attack's weights
        self.mechanism: TemplateDefense
        self.steps, self.seed, size = steps, seed, embedding_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.eye(size))
        self.register_buffer("bank", torch.zeros(_STARTS, size))
        self.register_buffer("prior", torch.tensor(_PRIORS[-1]))
        self.register_buffer("near", torch.zeros(()))
        self.keyless = mechanism.draw_keys(1, derived(seed, "keyless")) is None
        self.with_keys = with_keys or self.keyless
        self.map = (
            None if self.with_keys and self._has_misfit(size) else learnt_map(kind, mechanism.template_size, size)
        )

    def _has_misfit(self, size: int) -> bool:
        """Whether the defence says what a template tells of its embedding."""
        embedding = functional.normalize(torch.ones(1, size, device=self._device_of(self.mechanism)), dim=1)
        templates, keys = self._enrolled(embedding, "misfit")
        return self.mechanism.misfit(templates, keys) is not None

    @staticmethod
    def _device_of(module: nn.Module) -> torch.device:
        return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))

    @property
    def method(self) -> str:
        """How it inverts, in a word."""
        return "constraints" if self.map is None else "learnt map"

    # -- what is learnt --------------------------------------------------------------------------

    def fit(self, embeddings: Tensor, *, epochs: int) -> Iterator[tuple[int, int]]:
        """Measure the prior on public embeddings (M, D), and learn the map where there is one.

        Yields (done, total) as it goes on.
        """
        draws = derived(self.seed, "order")
        order = torch.randperm(len(embeddings), generator=draws).to(embeddings.device)
        tried = embeddings[order[: min(_TRIED, len(order) // 4)]]
        known = embeddings[order[len(tried) : len(tried) + _PRIOR_FACES]]
        self._measure(known)
        if self.map is not None:
            yield from self._learn(known, epochs)
        self._try(tried)

    @torch.no_grad()
    def _measure(self, embeddings: Tensor) -> None:
        centred = (embeddings - embeddings.mean(dim=0)).double()
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        scales = torch.where(variances > _FAINTEST * variances[-1], variances, 0.0).clamp(min=0).sqrt()
        self.mean.copy_(embeddings.mean(dim=0))
        self.spread.copy_(directions * scales)
        self.bank.copy_(embeddings[torch.arange(_STARTS) % len(embeddings)])

    def _enrolled(self, embeddings: Tensor, *name: str | int, keys_in_all: int | None = None) -> tuple[Tensor, Tensor]:
        """Templates (N, T) of embeddings under keys that are drawn for them, int64 (N, k): (N, 0) without any."""
        draws = derived(self.seed, "enrol", *name)
        keys = self.mechanism.draw_keys(keys_in_all or len(embeddings), draws)
        if keys is not None and keys_in_all is not None:
            keys = keys[torch.randint(keys_in_all, (len(embeddings),), generator=draws)]
        with torch.no_grad():
            templates = self.mechanism.enrol(embeddings, keys, draws)
        return templates, torch.zeros(len(embeddings), 0, dtype=torch.int64) if keys is None else keys

    def _learn(self, embeddings: Tensor, epochs: int) -> Iterator[tuple[int, int]]:
        """FEM's schedule: mean squared error, AdamW at 1e-2, a factor 0.8 an epoch (AAAI 2026)."""
        assert self.map is not None
        self.map.train()
        optimiser = torch.optim.AdamW(self.map.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.8)
        scale = math.sqrt(embeddings.shape[1])  # so that a unit vector's values are about 1
        with torch.enable_grad(), seeded(self.seed, "map"):
            for epoch in range(epochs):
                # Keys are dear to expand; as many as these leave no map that knows them.
                templates, _ = self._enrolled(embeddings, "map", epoch, keys_in_all=256)
                order = torch.randperm(len(embeddings), generator=derived(self.seed, "map", epoch))
                for rows in order.to(embeddings.device).split(256):
                    if len(rows) < 2:
                        continue
                    made = self.map(templates[rows].float())
                    loss = functional.mse_loss(made, scale * embeddings[rows])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                schedule.step()
                yield epoch + 1, epochs
        self.map.eval()

    def _try(self, embeddings: Tensor) -> None:
        """Choose the weight of the prior on public faces, and note how near estimates come."""
        templates, keys = self._enrolled(embeddings, "try")
        if self.map is None:
            # All weights at once: what keys stand for is expanded once.
            found = self._solve(templates[:, None], keys[:, None], _PRIORS)
        else:
            found = self(templates[:, None], keys[:, None] if self.with_keys else None)[None]
        near = functional.cosine_similarity(found, embeddings, dim=2).mean(dim=1)
        best = int(near.argmax())
        self.prior.fill_(_PRIORS[best])
        self.near.copy_(near[best])

    # -- what it gives ---------------------------------------------------------------------------

    def forward(self, templates: Tensor, keys: Tensor | None) -> Tensor:
        """Embeddings (N, D), unit rows, from k templates each, (N, k, T), and their keys int64 (N, k, K) or None."""
        if self.map is not None:
            with torch.no_grad():
                made = self.map(templates.flatten(0, 1).float()).unflatten(0, templates.shape[:2])
            return functional.normalize(functional.normalize(made, dim=2).mean(dim=1), dim=1)
        if keys is None:
            raise ValueError(f"{self.mechanism.name} is inverted under its keys, and none were stolen")
        return self._solve(templates, keys, [float(self.prior)])[0]

    def _solve(self, templates: Tensor, keys: Tensor, priors: Sequence[float]) -> Tensor:
        """The embeddings under each of P weights of the prior, (P, N, D)."""
        misfits: list[Misfit] = []
        closed: list[Tensor] = []
        for turn in range(templates.shape[1]):
            record, key = templates[:, turn], keys[:, turn]
            misfit = self.mechanism.misfit(record, key)
            assert misfit is not None
            misfits.append(misfit)
            if (estimate := self.mechanism.estimate(record, key)) is not None:
                closed.append(estimate.float())

        def misfit_of(embeddings: Tensor) -> Tensor:
            return torch.stack([misfit(embeddings) for misfit in misfits]).mean(dim=0)

        with torch.no_grad():
            several = self.bank.expand(len(templates), -1, -1).split(_STARTS_AT_ONCE, dim=1)
            public = torch.cat([misfit_of(candidates) for candidates in several], dim=1)
            starts = [self.bank[public.argmin(dim=1)]]
            if closed:
                # A closed form may leave the sign open.
                pooled = _pooled(torch.stack(closed))
                here, there = misfit_of(torch.stack((pooled, -pooled), dim=1)).unbind(1)
                starts.append(torch.where((there < here)[:, None], -pooled, pooled))
        weights = [prior for prior in priors if math.isfinite(prior)]
        found = iter(self._descend(torch.stack(starts, dim=1), weights, misfit_of) if weights else ())
        return torch.stack([next(found) if math.isfinite(prior) else starts[-1] for prior in priors])

    def _descend(self, starts: Tensor, priors: Sequence[float], misfit: Misfit) -> Tensor:
        """Adam on the coordinates of the prior, from S starts (N, S, D): under each weight the best, (P, N, D)."""
        # Coordinates in which public embeddings have unit variance; what the prior leaves out starts at the mean.
        scales = self.spread.norm(dim=0)
        directions = self.spread / scales.clamp(min=1e-12)
        kept = scales > 0
        offset = starts - self.mean

        def embedding(codes: Tensor) -> Tensor:
            return functional.normalize(self.mean + codes @ self.spread.T, dim=2)

        codes = ((offset @ directions) / scales.clamp(min=1e-12) * kept).clamp(-4, 4).repeat(1, len(priors), 1)
        weights = codes.new_tensor(priors).repeat_interleave(starts.shape[1])

        def objective(codes: Tensor) -> Tensor:
            total: Tensor = misfit(embedding(codes)) + weights * codes.square().mean(dim=2)
            return total

        with torch.enable_grad():
            codes.requires_grad_(True)
            optimiser = torch.optim.Adam([codes], lr=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            for _ in range(self.steps):
                optimiser.zero_grad()
                (gradient,) = torch.autograd.grad(objective(codes).sum(), codes)
                codes.grad = gradient
                optimiser.step()
                schedule.step()
        with torch.no_grad():
            best = objective(codes).unflatten(1, (len(priors), -1)).argmin(dim=2)
            made = embedding(codes).unflatten(1, (len(priors), -1))
            chosen: Tensor = made.take_along_dim(best[..., None, None], dim=2)[:, :, 0].transpose(0, 1)
            return chosen


def _pooled(estimates: Tensor) -> Tensor:
    """Unit rows (N, D) out of those of k records, (k, N, D): what a record says nothing of, an exact 0, is left out."""
    unit = functional.normalize(estimates, dim=2)
    told = (unit != 0).sum(dim=0).clamp(min=1)
    return functional.normalize(unit.sum(dim=0) / told, dim=1)
