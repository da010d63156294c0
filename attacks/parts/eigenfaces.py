"""Eigenfaces: a linear prior of aligned faces, and the attacks that search its latents with score queries."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Observation, RecoveryAttack, ScoreQuery
from bench.images import to_float
from bench.randomness import derived

#: Random directions beyond those asked for, and passes over the faces that sharpen them (Halko et al. 2011, section 4).
_OVERSAMPLING = 16
_PASSES = 3
#: Faces in float at once; with their mirror images twice as many.
_CHUNK = 256
#: Share of the largest variance below which a component is rounding error.
_NEGLIGIBLE = 1e-6
#: Queries of the first face, at most and as a share of the budget, that tell how noisy the scores are.
_NOISE_QUERIES = 8
_NOISE_SHARE = 1 / 16


class Eigenfaces(nn.Module):
    """``face = mean + sum_i latent_i components_i`` (Turk and Pentland 1991), a latent of a face being about N(0, I).

    The components are the principal axes of the public faces and of their mirror images, each times the standard
    deviation along it, in descending order. With the mirror images the prior prefers no side: the mean face equals its
    mirror image, and faces can be lit from or turned to either side at equal odds.

    Attributes:
        mean: float32 (3, H, W), the mean face.
        components: float32 (r, 3, H, W), orthogonal, |components_i| the standard deviation along it; zero where the
            faces vary along fewer than r axes.
        explained: float32 scalar, the share of the faces' variance that lies along the components.
    """

    mean: Tensor
    components: Tensor
    explained: Tensor

    def __init__(self, components: int, image_size: int) -> None:
        super().__init__()
        if not (image_size >= 1 and 1 <= components <= 3 * image_size**2):
            raise ValueError(f"a face of {image_size} pixels a side does not have {components} components")
        self.register_buffer("mean", torch.full((3, image_size, image_size), 0.5))
        self.register_buffer("components", torch.zeros(components, 3, image_size, image_size))
        self.register_buffer("explained", torch.zeros(()))

    @staticmethod
    def rank(faces: Tensor, components: int) -> int:
        """How many of ``components`` the faces, (M, 3, H, H), can give.

        M faces and their mirror images, less their mean, span at most 2 M - 1 dimensions.
        """
        return max(1, min(components, 2 * len(faces) - 1, faces[0].numel()))

    def __len__(self) -> int:
        return len(self.components)

    @torch.no_grad()
    def fit(self, faces: Tensor, generator: torch.Generator) -> None:
        """Principal component analysis by randomised subspace iteration (Halko et al. 2011, algorithm 4.4).

        The faces, uint8 (M, 3, H, H), are read in a few passes, some at a time, and nothing of the size of their
        covariance is made.

        Raises:
            ValueError: faces of another type or size, or none.
        """
        if faces.dtype != torch.uint8 or faces.shape[1:] != self.mean.shape or not len(faces):
            raise ValueError(
                f"eigenfaces expect faces uint8 (M, {', '.join(map(str, self.mean.shape))}), M > 0, got {faces.dtype} "
                f"{tuple(faces.shape)}"
            )
        device, rank = self.mean.device, len(self)
        # What is in float64 is small and on the CPU: not every accelerator has that type.
        mean = torch.zeros(self.mean.shape, dtype=torch.float64)
        for chunk in faces.split(_CHUNK):
            mean += to_float(chunk).sum(dim=0).cpu().double() / len(faces)
        self.mean.copy_((mean + mean.flip(-1)) / 2)

        width = min(rank + _OVERSAMPLING, self.mean.numel())
        axes = torch.randn(self.mean.numel(), width, generator=generator).to(device)
        for _ in range(_PASSES):
            axes, _ = torch.linalg.qr(self._covariance_times(faces, axes)[0])
        product, variance = self._covariance_times(faces, axes)
        small = (axes.T @ product).cpu().double()
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
        values = torch.where(values > _NEGLIGIBLE * values[0], values, torch.zeros_like(values))
        components = (axes @ (vectors * values.sqrt()).to(axes)).T
        self.components.copy_(components.reshape(self.components.shape))
        self.explained.fill_(float(values.sum()) / variance if variance > 0 else 1.0)

    def _covariance_times(self, faces: Tensor, axes: Tensor) -> tuple[Tensor, float]:
        """The covariance of the faces and their mirror images times ``axes`` (3 H W, q), and its trace."""
        product, trace = torch.zeros_like(axes), 0.0
        for chunk in faces.split(_CHUNK):
            centred = to_float(chunk.to(axes.device)) - self.mean
            both = torch.cat((centred, centred.flip(-1))).flatten(1)
            product += both.T @ (both @ axes)
            trace += float(both.square().sum())
        return product / (2 * len(faces)), trace / (2 * len(faces))

    def forward(self, latent: Tensor) -> Tensor:
        """Faces float32 (..., 3, H, W), clipped to [0, 1], of latents float32 (..., r)."""
        flat = self.mean.flatten() + latent @ self.components.flatten(1)
        faces: Tensor = flat.unflatten(-1, self.mean.shape)
        return faces.clamp(0, 1)

    def project(self, faces: Tensor) -> Tensor:
        """Latents float32 (..., r) of the combinations nearest to ``faces``, float (..., 3, H, W) in [0, 1].

        The latent of a component that is zero is zero.
        """
        basis = self.components.flatten(1)
        power = basis.square().sum(dim=1)
        inverse = torch.where(power > 0, 1 / power.clamp_min(torch.finfo(power.dtype).tiny), power)
        return (faces - self.mean).flatten(-3) @ basis.T * inverse


def directions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Gaussian directions, float32 (count, size), orthogonal to each other within every ``size`` of them.

    Each by itself is a draw from N(0, I). Orthogonal ones do not measure the same thing twice (Choromanski et al.
    2018, "Structured evolution with compact architectures").
    """
    parts = []
    for start in range(0, count, size):
        block = torch.randn(size, min(size, count - start), generator=generator)
        basis, _ = torch.linalg.qr(block)
        lengths = torch.randn(block.shape[::-1], generator=generator).norm(dim=1, keepdim=True)
        parts.append(basis.T * lengths)
    return torch.cat(parts)


class LatentScores:
    """Asks the service for the scores of latents, for all victims at once, and not once more than agreed.

    Attributes:
        left: queries left per victim, ``queries`` of them at first.
    """

    def __init__(self, prior: Eigenfaces, score: ScoreQuery, victims: int, *, queries: int, chunk: int) -> None:
        self._prior, self._score, self._victims, self.left, self._chunk = prior, score, victims, queries, chunk

    def __call__(self, latents: Tensor) -> Tensor:
        """Scores float32 (N, B) of latents float32 (N, B, r), B candidates for each victim.

        Raises:
            ValueError: B exceeds what is left of the budget, or a score is not finite.
        """
        victims, candidates = latents.shape[:2]
        if victims != self._victims or candidates > self.left:
            raise ValueError(
                f"{candidates} queries for each of {victims} victims are not within the {self.left} that are left for "
                f"each of {self._victims}"
            )
        self.left -= candidates
        persons = torch.arange(victims, device=latents.device).repeat_interleave(candidates)
        scores = [
            self._score(self._prior(some), numbers)
            for some, numbers in zip(latents.flatten(0, 1).split(self._chunk), persons.split(self._chunk), strict=True)
        ]
        answer = torch.cat(scores).to(latents)
        if not torch.isfinite(answer).all():
            raise ValueError("the service answered with scores that are not finite")
        return answer.view(victims, candidates)

    def at(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The score at one latent per victim, float32 (N, r), and the variance of a query's answer there: (N, 1) each.

        A random defence protects every query afresh, so that the same face scores differently each time. The variance
        is zero for a defence that is not random, and where the budget is too small to measure it.
        """
        count = max(1, min(_NOISE_QUERIES, int(_NOISE_SHARE * self.left)))
        scores = self(latent[:, None].expand(-1, count, -1))
        variance = scores.var(dim=1, keepdim=True) if count > 1 else torch.zeros_like(scores)
        return scores.mean(dim=1, keepdim=True), variance


class EigenfaceSearchOptions(AttackOptions):
    """What all searches share."""

    components: int = Field(
        default=128, ge=1, le=65536, description="Eigenfaces, fewer where the public faces do not give so many."
    )
    queries: int = Field(2000, ge=1, description="Score queries per victim, never exceeded.")
    penalty: float = Field(
        3e-3,
        ge=0,
        le=1,
        description="Weight of |latent|^2 / 2, the prior's negative logarithm, against the score. It keeps the "
        "recovered face among faces instead of among patterns that please the attacked recogniser alone.",
    )
    chunk: int = Field(1024, ge=1, description="Faces sent at once, which bounds the memory.")


class EigenfaceSearch(RecoveryAttack):
    """Recovers the face whose score is highest among combinations of eigenfaces: a subclass says how to search.

    It needs no recogniser, no representation and no knowledge of the defence: only the score that a verification
    service answers with, and faces of other people. All victims try the same directions, so that a victim's recovery
    does not depend on who else is attacked beside it.
    """

    needs = frozenset({Capability.PUBLIC_FACES, Capability.SCORES})
    budgets: ClassVar = {"queries": "queries"}
    Options = EigenfaceSearchOptions
    options: EigenfaceSearchOptions

    prior: Eigenfaces

    @abstractmethod
    def search(self, scores: LatentScores, start: Tensor) -> Tensor:
        """Latents float32 (N, r) of the recovered faces, from ``start``, zeros: the mean face."""

    def build(self, adversary: Adversary) -> None:
        """Build the prior for the size of the public faces."""
        faces = adversary.faces
        self.prior = Eigenfaces(Eigenfaces.rank(faces, self.options.components), faces.shape[-1])

    def fit(self, adversary: Adversary) -> FitReport:
        """Fit the prior; nothing is trained."""
        self.prior.fit(adversary.faces, derived(self.seed, "eigenfaces"))
        return FitReport(
            details={
                "components": len(self.prior),
                "explained_variance": float(self.prior.explained),
                "public_faces": len(adversary.faces),
                "queries_per_victim": self.options.queries,
            }
        )

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W); of the observation only the score queries are used."""
        options, victims = self.options, len(observation)
        assert observation.score is not None  # it is among the needs
        scores = LatentScores(self.prior, observation.score, victims, queries=options.queries, chunk=options.chunk)
        faces: Tensor = self.prior(self.search(scores, self.prior.mean.new_zeros(victims, len(self.prior))))
        return faces
