"""Linear inversion: the best linear estimate of a face from what a linear defence sent of it, without any training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.parts.exposure import in_chunks, split_identities, tamed
from attacks.parts.gaussian_prior import GaussianPrior
from attacks.parts.noise import (
    LEAST,
    ROUNDING,
    as_product,
    chunk_of,
    few_directions,
    fresh_share,
    not_shared,
    residuals,
    sent_channels,
    spread,
)
from attacks.parts.operators import LinearMaps, Whitened, WhitenedSum, Whitening, linear_maps, why_not_linear
from attacks.parts.posterior import (
    IterativePosterior,
    JointGram,
    LocalGram,
    Posterior,
    PriorCovariance,
    factors_apart,
    is_gram,
    local_gram,
)
from attacks.parts.states import ReaderOptions, StateLikelihood, StateReader
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense, LinearOperator, SeparableSum, noise_is_shared
from defenses.layout import row_numbers

#: Faces whose representations are compared with the exact map to measure the noise.
_NOISE_FACES = 128
_NOISE_CHUNK = 32
#: Fresh noise below this share of all is none; and what else there is, beside fresh noise.
_FRESH = 0.01
#: Largest logarithm of a deviation over a product of one for its colour and one for its map that is rounding. Faces of
#: one state that show whether a product will do all the same, of so many sent; how much larger their error may be.
_IS_PRODUCT = 1e-9
_TRIED_FACES, _MOST_SENT = 64, 1024
_WILL_DO = 1.005
#: Public faces whose states are read to see how many are read right, and from where on the classifier's word is taken.
_READ_FACES = 256
_RELIABLE = 0.98
#: Relative difference of Gram matrices that is rounding.
_SAME = 1e-6
#: Noise never counts as less than this share of what is sent: rounding of float32.
_ROUNDING = 2.0**-24

#: What interceptions of a face say: the kinds of state they came in, and how often.
_Said = tuple[tuple[bytes, int], ...]


class EstimateOptions(ReaderOptions):
    """Options of a linear estimate that any attack which starts from one has."""

    rank: int = Field(400, ge=1, le=20_000, description="Principal components of the prior.")
    prior_faces: int = Field(
        default=4000, ge=2, description="Public faces, mirrored ones not counted, that the components are fitted to."
    )
    client_queries: int = Field(
        50_000,
        ge=0,
        description="At blackbox, pictures that are sent through the client at most, to estimate a secret map that no "
        "traffic tells; 0 sends none.",
    )
    memory: int = Field(
        2048, ge=64, description="MiB of factored states kept at once; others are factored anew when met again."
    )


class LinearOptions(EstimateOptions):
    """Options of :class:`Linear`."""

    held_out: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the public identities that measures the prior's variances."
    )
    solver: Literal["auto", "factor", "cg"] = Field(
        "auto",
        description="factor factors each state's system once; cg solves by conjugate gradients, for linear maps that "
        "do not tell their structure; auto factors where that can be done.",
    )
    iterations: int = Field(200, ge=1, description="Steps of conjugate gradients at most.")
    batch_size: int = Field(64, ge=1, description="Faces solved for at once.")


class Linear(RecoveryAttack):
    """Gaussian-prior least squares (LMMSE) through the defence's own linear operator.

    The estimate is the posterior mean under a Gaussian prior of public faces (:mod:`attacks.parts.gaussian_prior`),
    with the noise that transmission adds, measured on public faces. The maps are those that the defence declares or, if
    it declares none, those that numbers show (:mod:`attacks.parts.operators`).

    ``whitebox`` reads the state off what is sent: by its layout where that tells states apart
    (:class:`~attacks.parts.states.StateReader`), else by its marginal likelihood
    (:class:`~attacks.parts.states.StateLikelihood`). How often that is right is measured on held-out public faces.
    ``blackbox`` also infers the secret table from intercepted traffic or, where the secret is no such table, estimates
    the secret map from what the client sends of chosen pictures. Interceptions of one face are combined in one
    posterior. Where the noise is not the same everywhere, values count by what each of them has of it; what is drawn
    anew for every interception averages out. Noise that one batch of faces shares is estimated from their mean, about
    which more is known than about each, and taken off: their differences are free of it.
    Channels that are left out at random, and sent as zeros, are no observation: the others make the estimate, by
    conjugate gradients, as every face shows other ones.

    Attributes:
        noise: float64 () buffer, the standard deviation of what is sent around the exact map.
        spread: float64 (1, 1, 1), (C, 1, 1) or (C, h, w) buffer, that of each value in units of it.
        directions, deviations: float64 (r, C, h, w) and (r,) buffers, where the noise lies in few directions these and
            its standard deviation in each, in units of ``noise``; ``spread`` then is that in all others.
        fresh: float64 () buffer, the share of the noise's variance that is drawn anew for every interception.
        shared: float64 () buffer, the standard deviation of noise that all faces of a batch share; 0 where none do.
        seen: float64 (C,) buffer, 0 for the channels left out of the public face that showed fewest, else 1.
        by_likelihood: bool () buffer, whether states are read by likelihood although layouts could be told apart.
    """

    name = "linear"
    summary = "closed-form inverse of a linear defence under a Gaussian prior of faces; trains nothing"
    cost = "fit: seconds (principal components); recover: a factorisation per state, then 20+ faces/s"
    reference = "linear minimum mean square error estimation; Kay, Fundamentals of Statistical Signal Processing, 1993"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC})
    uses = frozenset({Capability.PROTECTION})
    opens = frozenset({"affine", "mixture", "permutation"})
    Options = LinearOptions
    presets: ClassVar = {
        "quick": {"rank": 100, "state_faces": 300, "traffic": 500},
        "gpu": {"rank": 1000, "prior_faces": 20_000},
    }
    options: LinearOptions

    noise: Tensor
    spread: Tensor
    directions: Tensor
    deviations: Tensor
    fresh: Tensor
    shared: Tensor
    seen: Tensor
    by_likelihood: Tensor
    reader: StateReader

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__(options)
        self._forget()

    @property
    def device(self) -> torch.device:
        """The adversary's, or the CPU where that has no double precision."""
        device = super().device
        return torch.device("cpu") if device.type == "mps" else device

    def inapplicable(self, defense: Defense) -> str | None:
        """It needs a linear map, declared or not: superposition is tried on a few faces."""
        return why_not_linear(defense)

    def build(self, adversary: Adversary) -> None:
        """Build the prior and the reader of states."""
        faces = adversary.faces
        if reason := self.inapplicable(self.mechanism):
            raise ValueError(f"{reason}: use another attack")
        self.reader = StateReader(adversary, self.mechanism, self.options.client_queries)
        self.prior = GaussianPrior(faces.shape[-1], min(self.options.rank, max(1, len(faces) // 2)))
        self.register_buffer("noise", torch.ones((), dtype=torch.float64))
        self.register_buffer("spread", torch.ones(1, 1, 1, dtype=torch.float64))
        self.register_buffer("directions", torch.zeros(0, 1, 1, 1, dtype=torch.float64))
        self.register_buffer("deviations", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("fresh", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shared", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.ones(self.mechanism.channels, dtype=torch.float64))
        self.register_buffer("by_likelihood", torch.tensor(False))
        self._forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Whether the noise differs from value to value is known to those who have measured it.
        for name in ("spread", "directions", "deviations"):
            if (stored := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, torch.empty_like(stored, device=self.noise.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()

    def fit(self, adversary: Adversary) -> FitReport:
        """Fit the prior to public faces, measure the noise, and learn to read states."""
        seed, options = self.seed, self.options
        adversary.report(0, 3)
        details = self.reader.fit(seed, options)
        self._forget()
        adversary.report(1, 3)
        colour = self._colour_of(self.maps.operators[0])
        self._measure_noise(adversary.faces, seed)
        details |= self._fit_prior(colour)
        adversary.report(2, 3)
        accuracy = self._learn_to_read(seed)
        adversary.report(3, 3)
        source = "estimated from protection queries" if self.reader.estimated else self.maps.source
        details |= {"linearity": source, **self.maps.details}
        details |= {"channels_seen": int(self.seen.sum())} if self.has_gaps else {}
        details |= {} if accuracy is None else {"state_accuracy": accuracy}
        return FitReport(
            saturated=self._converges(),
            states_seen=self.reader.mechanism.states(),
            states_read=accuracy,
            details=details | self._of_noise() | {"rank": self.prior.rank},
        )

    def _fit_prior(self, colour: Tensor) -> dict[str, float]:
        """Fit the prior for maps of that colour matrix, or for those that are left where noise weighs the colours.

        Where noises that are not the same everywhere are nearly a product of one for each colour and one for each of
        its maps, they are taken for one, as the planes can then be solved for one by one. Whether that will do is seen
        from what is sent of public faces.
        """
        public, options, measured = (self.adversary.faces, self.adversary.identities), self.options, self.spread

        def fitted(spread: Tensor) -> dict[str, float]:
            self._weigh(spread)
            first = self.maps.operators[0]
            wanted = first.colour if isinstance(first, WhitenedSum) else colour
            details = self.prior.fit(*public, wanted, self.seed, held_out=options.held_out, most=options.prior_faces)
            self._forget_posteriors()
            return details

        plain = [one.inner if isinstance(one, Whitened) else one for one in self.maps.operators]
        colours = self._colours_of_sums(plain) if measured.numel() > 1 and not self.shared else 0
        if not colours or isinstance(self.maps.operators[0], WhitenedSum):
            return fitted(measured)
        of_colour, of_map, _ = as_product(measured, colours)
        product = (of_colour[:, None] * of_map).flatten()[:, None, None]
        trial, details = self._trial(), fitted(product)
        near = self._error_in(trial)
        self._weigh(measured)
        if near > _WILL_DO * self._error_in(trial):
            return fitted(measured)
        self._weigh(product)
        return details

    def _weigh(self, spread: Tensor) -> None:
        if spread is not self.spread:
            self.spread = spread
            self._forget()

    def _trial(self) -> tuple[Tensor, Tensor, int]:
        """Public faces, float64 (n, 3, H, W), and what is sent of them in the state that comes up most often."""
        draws, faces = derived(self.seed, "trial of noise"), self.adversary.faces
        count = min(_TRIED_FACES * len(self.maps.operators), _MOST_SENT)
        parts, together = [], chunk_of(math.prod(self.mechanism.representation_shape))
        for index in torch.randint(len(faces), (count,), generator=draws).split(together):
            targets = to_float(faces[index.to(faces.device)].to(self.noise.device))
            parts.append((targets.double(), *self.maps.send(targets, draws)))
        rows = torch.cat([part[2].cpu() for part in parts])
        row = int(rows.mode().values)
        of_row = [part[2] == row for part in parts]
        shown, sent = (
            torch.cat([part[which][here.to(part[which].device)] for part, here in zip(parts, of_row, strict=True)])
            for which in (0, 1)
        )
        return shown, sent, row

    def _error_in(self, trial: tuple[Tensor, Tensor, int]) -> float:
        """Root mean square error of a face, as a geometric mean over faces, so that no few of them decide."""
        faces, sent, row = trial
        recovered = self.estimate(sent[:, None], torch.full((len(faces), 1), row))
        squares = (recovered - faces).square().mean(dim=(1, 2, 3))
        return float(squares.clamp(min=1e-30).log().mean().div(2).exp())

    def _colours_of_sums(self, operators: Sequence[LinearOperator]) -> int:
        """How many colours they have, where all are separable sums of the same ones that can be factored; or 0."""
        sums = [operator for operator in operators if isinstance(operator, SeparableSum)]
        if self.has_gaps or self.options.solver == "cg" or len(sums) < len(operators):
            return 0
        colour, count = sums[0].colour, len(sums[0].row_factors)
        alike = all(torch.equal(one.colour, colour) and len(one.row_factors) == count for one in sums)
        return len(colour) if alike and factors_apart(sums, self.prior.size) else 0

    def _of_noise(self) -> dict[str, float]:
        """Its standard deviation; where that differs, between which multiples of it; where some is fresh, how much."""
        told = {"noise": float(self.noise)}
        if self.spread.numel() > 1:
            told |= {"noise_least": float(self.spread.min()), "noise_most": float(self.spread.max())}
        told |= {"noise_directions": len(self.deviations)} if len(self.deviations) else {}
        told |= {"noise_fresh": float(self.fresh)} if float(self.fresh) > _FRESH else {}
        return told | ({"noise_shared": float(self.shared)} if self.shared else {})

    def _colour_of(self, operator: LinearOperator) -> Tensor:
        """The colour matrix of the map or, where it does not tell, a symmetric one with the same Gram matrix."""
        if isinstance(operator, SeparableSum):
            return operator.colour
        gram = self._grams()[0]
        if not isinstance(gram, LocalGram):
            return torch.eye(3, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(gram.colour)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root

    def _learn_to_read(self, seed: int) -> float | None:
        """The share of held-out public faces whose state is read right, in the better way; None for a single state."""
        if self._knows_states or len(self.maps.operators) < 2 or self.reader.infers_secret:
            return None
        faces, identities = self.adversary.faces, self.adversary.identities
        _, held_out = split_identities(identities, self.options.held_out, derived(seed, "prior"))
        draws = derived(seed, "reading")
        index = held_out[torch.randint(len(held_out), (_READ_FACES,), generator=draws)]
        same = torch.tensor(self._alike())
        right: dict[bool, float] = {}
        for by_likelihood in (False, True) if self.reader.classifier is not None else (True,):
            self.by_likelihood.fill_(by_likelihood)
            hits = []
            for chunk in faces[index.to(faces.device)].split(_NOISE_CHUNK):
                sent, rows = self.maps.send(to_float(chunk.to(self.noise.device)), draws)
                hits.append(same[self._read(sent).cpu()] == same[rows])
            right[by_likelihood] = float(torch.cat(hits).float().mean())
            if right[by_likelihood] >= _RELIABLE:
                break
        best = max(right, key=lambda way: right[way])
        self.by_likelihood.fill_(best)
        return right[best]

    def _alike(self) -> list[int]:
        """For each state the first that sends the same of every face."""
        generator = torch.Generator().manual_seed(0)
        face = torch.rand(1, 3, self.prior.size, self.prior.size, generator=generator, dtype=torch.float64)
        sent = [self._expected(operator, face.to(self.noise.device)) for operator in self.maps.operators]
        scale = max(float(one.abs().max()) for one in sent)
        firsts: list[int] = []
        for row, one in enumerate(sent):
            earlier = (first for first in dict.fromkeys(firsts) if _close(one, sent[first], scale))
            firsts.append(next(earlier, row))
        return firsts

    @staticmethod
    def _expected(operator: LinearOperator, faces: Tensor) -> Tensor:
        return operator(faces) + operator.offset.to(faces)

    def _converges(self) -> bool | None:
        """Whether conjugate gradients come to rest within their iterations; None where none are used."""
        keys = self._operators()[0]
        iterative = [row for row in range(len(keys)) if keys.index(keys[row]) == row and not self._factors([row])]
        if not iterative:
            return None
        posterior = self._posterior(((keys[iterative[0]], 1),))
        return posterior.converges() if isinstance(posterior, IterativePosterior) else None

    @property
    def has_gaps(self) -> bool:
        """Whether channels of what is sent are left out at random."""
        return not bool(self.seen.all())

    def _measure_noise(self, faces: Tensor, seed: int) -> None:
        """Of what is sent around the exact map: how large it is, where, and how much of it is fresh."""
        maps, device = self.maps, self.prior.mean.device
        index = torch.randint(len(faces), (_NOISE_FACES,), generator=derived(seed, "noise faces"))
        together = chunk_of(math.prod(self.mechanism.representation_shape))
        # What is drawn for a batch differs between the maps of several states: no mean has it for itself.
        shared = len(maps.operators) == 1 and noise_is_shared(self.reader.mechanism)
        chunks = faces[index.to(faces.device)].split(1 if shared else together)
        targets = (to_float(chunk.to(device)) for chunk in chunks)
        found = residuals(maps, targets, derived(seed, "noise"))
        if len(found.fewest) == len(self.seen):
            self.seen.copy_(found.fewest)
        off, whole = (math.sqrt(float(tamed(of_faces).mean())) for of_faces in (found.noise, found.energy))
        self.noise.fill_(max(off, _ROUNDING * whole, 1e-12))
        if off <= ROUNDING * whole:
            return
        again = to_float(faces[index.to(faces.device)].to(device))
        if shared:
            self.shared.copy_(self.noise)
            alone = not_shared(maps, again[: max(2, together)], derived(seed, "noise of a batch"))
            self.noise.fill_(max(alone, _ROUNDING * whole, 1e-12))
        fresh = 0.0 if shared else fresh_share(maps, again, derived(seed, "noise again"))
        self.fresh.fill_(1 if fresh > 1 - _FRESH else fresh)
        if maps.nuisance is not None or maps.gains is not None:
            return
        draws, all_fresh = derived(seed, "noise directions"), float(self.fresh) == 1
        told = faces[index.to(faces.device)] if all_fresh else faces
        if not shared and (few := few_directions(maps, found, told, all_fresh, draws)) is not None:
            self.directions, self.deviations = few[0], few[1] / self.noise
            self.spread.fill_(max(few[2] / float(self.noise), _ROUNDING * whole / float(self.noise), LEAST))
        elif (relative := spread(found)) is not None:
            self.spread = relative.to(device)
        self._forget()

    @property
    def _whitening(self) -> Whitening | None:
        """What makes the noise white, of standard deviation ``noise``; None where it is."""
        if len(self.deviations):
            return Whitening(1 / self.spread, self.directions, 1 / self.deviations)
        return Whitening(1 / self.spread) if self.spread.numel() > 1 else None

    def rehearse(self, faces: Tensor, row: int, generator: torch.Generator) -> Tensor:
        """Estimates, float64, of ``faces`` (N, 3, H, W) out of what operator ``row`` and the noise make of them."""
        sent = self._expected(self.maps.operators[row], faces.to(self.noise))
        noisy = sent + self.noise * torch.randn(sent.shape, generator=generator, dtype=sent.dtype).to(sent)
        if self.has_gaps:
            noisy *= self.seen[:, None, None]
        return self._estimate(self._levelled(noisy[:, None]), torch.full((len(faces), 1), row))

    def rows_of(self, states: Tensor | None, representations: Tensor) -> Tensor:
        """The number of each true state (N, D) among the operators, int64 (N,).

        Read off the ``representations`` (N, C, h, w) where the defence lists no states.
        """
        listed = self.reader.mechanism.states()
        if states is None or listed is None:
            return self._read(representations).cpu()
        return row_numbers(states.cpu(), listed.cpu())

    def _forget(self) -> None:
        self._forget_posteriors()
        self._maps: tuple[Defense, LinearMaps] | None = None
        self._known_grams: list[SeparableSum | LocalGram | JointGram | None] = []
        self._known_keys: list[bytes] = []

    def _forget_posteriors(self) -> None:
        """What depends on the prior and the noise."""
        self._posteriors: OrderedDict[_Said, Posterior | IterativePosterior] = OrderedDict()
        self._covariance: PriorCovariance | None = None
        self._likelihood: StateLikelihood | None = None

    @property
    def maps(self) -> LinearMaps:
        """The operators of the mechanism that the attack works with."""
        mechanism = self.reader.mechanism
        if self._maps is None or self._maps[0] is not mechanism:
            self._forget()
            maps = linear_maps(mechanism)
            # Noise that is shared is taken off first, and what it leaves is the same everywhere.
            whitening = None if self.shared else self._whitening
            self._maps = mechanism, maps if whitening is None else self._whitened(maps, whitening)
        return self._maps[1]

    def _whitened(self, maps: LinearMaps, whitening: Whitening) -> LinearMaps:
        """The maps behind ``whitening``, as separable sums where that leaves them such."""
        colours = self._colours_of_sums(maps.operators) if self.spread.numel() > 1 else 0
        whitened = maps.whitened(whitening)
        if not colours:
            return whitened
        of_colour, of_map, rest = as_product(self.spread, colours)
        if rest > _IS_PRODUCT:
            return whitened
        sums = (one for one in maps.operators if isinstance(one, SeparableSum))
        return replace(whitened, operators=[WhitenedSum(one, whitening, 1 / of_colour, 1 / of_map) for one in sums])

    def _operators(self) -> tuple[list[bytes], Sequence[LinearOperator]]:
        """The operator for each state, and a key that is the same for states which say the same."""
        maps, grams = self.maps, self._grams()
        if self._known_keys:
            return self._known_keys, maps.operators
        keys = self._known_keys
        for row, gram in enumerate(grams):
            if isinstance(gram, (LocalGram, JointGram)):
                row = next(first for first, other in enumerate(grams) if other is gram)
            keys.append(_key(gram) if isinstance(gram, SeparableSum) else f"{row:06}".encode())
        return keys, maps.operators

    def _grams(self) -> list[SeparableSum | LocalGram | JointGram | None]:
        """What tells A^T A of each operator, the same object for operators of which it is equal; None where nothing."""
        maps = self.maps
        if not self._known_grams:
            size, device = self.prior.size, self.noise.device
            generator = torch.Generator().manual_seed(1)
            trial = torch.randn(1, 3, size, size, generator=generator, dtype=torch.float64).to(device)
            found: list[LocalGram | JointGram] = []
            for operator in maps.operators:
                if isinstance(operator, SeparableSum):
                    self._known_grams.append(operator)
                    continue
                gram = next((gram for gram in found if is_gram(gram, operator, trial)), None)
                if gram is None and maps.nuisance is None:
                    gram = local_gram(operator, size, device)
                    found += [] if gram is None else [gram]
                self._known_grams.append(gram)
        return self._known_grams

    def _factors(self, rows: Sequence[int]) -> list[SeparableSum | LocalGram] | list[JointGram]:
        """A^T A of the states ``rows`` in the form that is factored; empty where one of them has none."""
        if self.has_gaps:
            return []
        prior, grams = self.prior, self._grams()
        shown = prior.planes.T * prior.strengths @ prior.planes
        factors: list[SeparableSum | LocalGram] = []
        joint = [gram for row in rows if isinstance(gram := grams[row], JointGram)]
        if joint and self.options.solver != "cg":
            return joint if len(joint) == len(rows) else []
        for row in rows:
            gram = grams[row]
            if self.options.solver == "cg" or gram is None or isinstance(gram, JointGram):
                return []
            colour = gram.colour.T @ gram.colour if isinstance(gram, SeparableSum) else gram.colour
            scale = float(colour.trace() / shown.trace())
            # Other colours than those that the prior's planes are made for.
            if not _close(colour.to(shown), scale * shown, float(colour.abs().max())):
                return []
            if isinstance(gram, LocalGram):
                gram = LocalGram(shown, scale * gram.stencil)
            elif abs(scale - 1) > _SAME:
                return []
            factors.append(gram)
        return factors

    def _posterior(self, said: _Said) -> Posterior | IterativePosterior:
        """The factored posterior of what interceptions say, from the cache where it is there."""
        posterior = self._posteriors.pop(said, None) or self._factor(said)
        self._posteriors[said] = posterior
        while len(self._posteriors) > 1 and self._bytes_kept() > self.options.memory * 2**20:
            self._posteriors.popitem(last=False)
        return posterior

    def _bytes_kept(self) -> int:
        return sum(kept.nbytes for kept in self._posteriors.values() if isinstance(kept, Posterior))

    @property
    def covariance(self) -> PriorCovariance:
        """Of the prior; what depends on that alone is made once."""
        self._covariance = self._covariance or PriorCovariance(self.prior)
        return self._covariance

    def _factor(self, said: _Said) -> Posterior | IterativePosterior:
        keys = self._operators()[0]
        rows, weights = [keys.index(key) for key, _ in said], [self._news(count) for _, count in said]
        if factors := self._factors(rows):
            return Posterior(self.covariance, factors, float(self.noise), weights)
        if self.options.solver == "factor" and self.has_gaps:
            raise ValueError(f"{self.reader.mechanism.name} leaves other channels out for every face: use solver=cg")
        if self.options.solver == "factor":
            raise ValueError(f"{self.reader.mechanism.name} does not tell the factors of its map: use solver=cg")
        operators = [
            operator if weight == 1 else Whitened(operator, Whitening(self.noise.new_tensor(weight**0.5)))
            for operator, weight in zip((self.maps.operators[row] for row in rows), weights, strict=True)
        ]
        operator = operators[0] if len(operators) == 1 else _Stacked(operators)
        return self._iterative(operator, len(rows))

    def _iterative(self, operator: LinearOperator, count: int) -> IterativePosterior:
        seen = self.seen.repeat(count) if self.has_gaps else None
        return IterativePosterior(self.covariance, operator, float(self.noise), self.options.iterations, seen)

    def _news(self, count: int) -> float:
        """How many interceptions with noises of their own ``count`` of a kind are worth, of which a part is fresh."""
        fresh = float(self.fresh)
        return 1 / (1 - fresh + fresh / count) if count > 1 else 1.0

    def run(self, observation: Observation) -> Tensor:
        """Posterior means (N, 3, H, W), not clipped."""
        observation = replace(observation, representations=self.without_shared(observation.representations))
        representations, rows = observation.representations, self.rows(observation)
        size, device = self.prior.size, self.prior.mean.device
        out = torch.empty(len(rows), 3, size, size, dtype=torch.float64, device=device)
        # Faces of one set of states come together, so that each set is factored once, however many there are.
        sets = self._sets(rows)
        for part in torch.tensor(sorted(range(len(sets)), key=sets.__getitem__)).split(self.options.batch_size):
            sent = representations[part.to(representations.device)]
            out[part.to(device)] = self.estimate(sent, rows[part.to(rows.device)])
        return out

    def without_shared(self, representations: Tensor) -> Tensor:
        """Interceptions (N, k, C, h, w) of one batch without the noise that the N faces share, if they do.

        Their mean is A times a mean face, plus that noise: the mean face is estimated as any other, but from a prior of
        1/N of the variance, and what it leaves of the mean is the noise. For differences from the mean, which are
        independent of it, nothing is lost, and the whole is the posterior mean given all N faces.
        """
        if not self.shared:
            return representations
        count, turns = representations.shape[:2]
        maps = self.maps.whitened(Whitening(1 / self.spread))
        # In units in which the prior is that of a single face.
        noise = float(self.shared) * math.sqrt(count / turns)
        posterior = IterativePosterior(self.covariance, maps.operators[0], noise, self.options.iterations)
        mean, face = representations.to(self.noise).mean(dim=0), self.mean_face()[None]
        clean = maps.clean(mean.mean(dim=0, keepdim=True))
        face = face + posterior(clean - self._expected(maps.operators[0], face))
        noises = self.maps.clean(mean) - self._expected(self.maps.operators[0], face)
        if (channels := maps.channels) is None:
            return (representations - noises).to(representations)
        out = representations.clone()
        out[:, :, channels.to(out.device)] -= noises.to(out)
        return out

    def rows(self, observation: Observation) -> Tensor:
        """The number of the state of each interception among the operators, as far as it is known: int64 (N, k)."""
        representations, states = observation.representations, observation.states
        flat = representations.flatten(0, 1)
        if self._knows_states:
            if states is None:
                raise ValueError("at oracle the states of the intercepted faces are needed")
            rows = self.rows_of(states.flatten(0, 1), flat)
        else:
            rows = self._read(flat)
        return rows.view(representations.shape[:2])

    @property
    def _knows_states(self) -> bool:
        return self.adversary.knowledge is Knowledge.ORACLE and self.mechanism.states() is not None

    def _read(self, representations: Tensor) -> Tensor:
        """The likeliest state of each representation (N, C, h, w), as a number of its operator: int64 (N,)."""
        if self.reader.classifier is not None and not self.by_likelihood:
            return self.reader.rows(representations, None)
        maps, device = self.maps, self.noise.device
        if len(maps.operators) == 1:
            return torch.zeros(len(representations), dtype=torch.int64, device=device)
        likelihood = self.likelihood
        return in_chunks(
            lambda part: likelihood(maps.clean(part.to(device, torch.float64))).argmax(dim=1), representations
        )

    @property
    def likelihood(self) -> StateLikelihood:
        """Of the operators, made when it is first asked for."""
        if self._likelihood is None:
            channels, height, width = self.reader.mechanism.representation_shape
            shape = channels if self.maps.channels is None else len(self.maps.channels), height, width
            self._likelihood = StateLikelihood(self.covariance, self.maps.operators, float(self.noise), shape)
        return self._likelihood

    def _levelled(self, representations: Tensor) -> Tensor:
        """Clean interceptions (N, k, C, h, w) without a random gain, if any, as the first operator sends them."""
        if (gains := self.maps.gains) is None:
            return representations
        flat = representations.flatten(0, 1).to(self.noise)
        offset = self.maps.operators[0].offset.to(flat)
        levelled = (flat - offset) / self.likelihood.gains(flat, gains)[:, :, None, None] + offset
        return levelled.view(representations.shape)

    def _clean(self, representations: Tensor) -> Tensor:
        """Interceptions (N, k, C, h, w) as the operators make them, of a random gain of one."""
        maps = self.maps
        if any(part is not None for part in (maps.nuisance, maps.whitening, maps.channels)):
            clean = maps.clean(representations.flatten(0, 1).to(self.noise))
            representations = clean.unflatten(0, representations.shape[:2])
        return self._levelled(representations)

    def estimate(self, representations: Tensor, rows: Tensor) -> Tensor:
        """Posterior means float64 (N, 3, H, W) for representations (N, k, C, h, w) of states ``rows``, int64 (N, k)."""
        return self._estimate(self._clean(representations), rows.cpu())

    def _estimate(self, clean: Tensor, rows: Tensor) -> Tensor:
        mean = self.mean_face()
        if self.has_gaps:
            return mean + self._from_what_is_there(clean, rows, mean.expand(len(rows), *mean.shape))
        out = torch.empty(len(rows), *mean.shape, dtype=torch.float64, device=mean.device)
        for said, posterior, members in self._grouped(rows):
            sent = clean[members.to(clean.device)]
            if isinstance(posterior, Posterior):
                out[members.to(out.device)] = mean + self._factored(posterior, sent, rows[members])
            else:
                out[members.to(out.device)] = mean + self._iterated(posterior, sent, rows[members], said)
        return out

    def _grouped(self, rows: Tensor) -> Iterator[tuple[_Said, Posterior | IterativePosterior, Tensor]]:
        """Faces whose interceptions (rows int64 (N, k), on the CPU) say the same, with their common posterior."""
        sets = self._sets(rows)
        for said in dict.fromkeys(sets):
            members = torch.tensor([index for index, face_set in enumerate(sets) if face_set == said])
            yield said, self._posterior(said), members

    def _sets(self, rows: Tensor) -> list[_Said]:
        """For each face's interceptions, rows int64 (N, k), what they say.

        Repetitions count as far as their noise is fresh.
        """
        keys, counts = self._operators()[0], float(self.fresh) > _FRESH
        said = [Counter(keys[row] for row in row_list) for row_list in rows.tolist()]
        return [tuple(sorted((key, count if counts else 1) for key, count in one.items())) for one in said]

    def kinds(self) -> list[int]:
        """For each state the first state that says the same: states that differ in the order of their maps only."""
        keys = self._operators()[0]
        return [keys.index(key) for key in keys]

    def posteriors(self, rows: Tensor) -> list[tuple[Posterior, Tensor]]:
        """The factored posteriors of interceptions in the states ``rows``, int64 (N, k), with the faces each is for.

        Empty where the defence does not tell its factors.
        """
        grouped = list(self._grouped(rows.cpu()))
        return [(posterior, members) for _, posterior, members in grouped if isinstance(posterior, Posterior)]

    def correct(self, faces: Tensor, representations: Tensor, rows: Tensor) -> Tensor:
        """The faces nearest to ``faces`` (N, 3, H, W), in the prior's metric, that would send what was intercepted.

        Arguments as for :meth:`estimate`. Returns float64 (N, 3, H, W), ``faces`` themselves where the defence does not
        tell its factors.
        """
        start, representations = faces.to(self.prior.mean), self._clean(representations)
        out, rows = start.clone(), rows.cpu()
        if self.has_gaps:
            return start + self._from_what_is_there(representations, rows, start)
        for posterior, members in self.posteriors(rows):
            at = members.to(out.device)
            sent = representations[members.to(representations.device)]
            out[at] += self._factored(posterior, sent, rows[members], start[at])
        return out

    def mean_face(self) -> Tensor:
        """The prior's mean, float64 (3, H, W)."""
        return self.prior.to_faces(self.prior.mean[None])[0]

    def _residuals(self, representations: Tensor, rows: Tensor, faces: Tensor) -> Tensor:
        """A^T (z - offset - A x), averaged over interceptions whose states say the same and summed over the others.

        In RGB, float64 (N, 3, H, W), for x = ``faces``, float64 and broadcastable to it, and clean representations.
        What was averaged counts by what it is worth (:meth:`_news`).
        """
        operators = self._operators()[1]
        n, k = rows.shape
        device = self.noise.device
        rows = rows.cpu()
        same = torch.tensor(self.kinds())[rows]
        count = (same[:, :, None] == same[:, None, :]).sum(dim=2)
        weight = 1.0 / count.double()
        if float(self.fresh) > _FRESH:
            weight *= torch.tensor([self._news(number) for number in range(1, k + 1)], dtype=torch.float64)[count - 1]
        flat = representations.flatten(0, 1)
        faces = faces.expand(n, *faces.shape[-3:])
        total = torch.zeros(n, 3, self.prior.size, self.prior.size, dtype=torch.float64, device=device)
        for row, members in _groups(rows.flatten()):
            operator, face = operators[row], members // k
            at = face.to(device)
            sent = flat[members.to(flat.device)].to(device, torch.float64)
            residual = sent - operator.offset.to(sent) - operator(faces[at].contiguous())
            weighted = operator.adjoint(residual) * weight.flatten()[members].to(device)[:, None, None, None]
            total.index_add_(0, at, weighted)
        return total

    def _factored(self, posterior: Posterior, sent: Tensor, rows: Tensor, around: Tensor | None = None) -> Tensor:
        """The posterior's change of ``around`` (N, 3, H, W), by default of the mean face."""
        prior = self.prior
        around = self.mean_face()[None] if around is None else around
        adjoint = self._residuals(sent, rows, around)
        scale = torch.ones_like(prior.strengths) if posterior.joint else prior.strengths.clamp(min=1e-300)
        scale = scale[:, None, None]
        planes = torch.einsum("cp,nchw->nphw", torch.linalg.inv(prior.planes), adjoint) / scale
        maps = None
        if posterior.needs_maps:
            operator = self._operators()[1][int(rows[0, 0])]
            assert isinstance(operator, SeparableSum)
            z = sent.double().to(prior.mean.device)
            residual = (z - operator.offset.to(z)).mean(dim=1) - operator(around)
            directions = operator.colour.to(z) @ torch.linalg.inv(prior.planes)
            maps = torch.einsum("cp,nchw->nphw", directions, residual) / scale
        return prior.to_faces(posterior(planes, maps))

    def _iterated(self, posterior: IterativePosterior, sent: Tensor, rows: Tensor, said: _Said) -> Tensor:
        keys, operators = self._operators()
        device, kinds = self.prior.mean.device, torch.tensor(self.kinds())[rows]
        parts, index = [], torch.arange(len(sent))
        for key, count in said:
            # Of a kind of state the first that was met: others say the same, up to rounding and fresh noise.
            column = (kinds == keys.index(key)).int().argmax(dim=1)
            row = rows[index, column]
            if count == 1:
                z = sent[index.to(sent.device), column.to(sent.device)].to(device, torch.float64)
            else:
                like = (rows == row[:, None]).to(device, torch.float64)
                z = torch.einsum("nk,nkchw->nchw", like / like.sum(dim=1, keepdim=True), sent.to(device, torch.float64))
            residual = torch.empty_like(z)
            for number, members in _groups(row):
                at = members.to(device)
                residual[at] = z[at] - self._expected(operators[number], self.mean_face()[None])
            parts.append(residual * self._news(count) ** 0.5)
        return posterior(torch.cat(parts, dim=1))

    def _from_what_is_there(self, clean: Tensor, rows: Tensor, around: Tensor) -> Tensor:
        """The posterior's change of ``around`` (N, 3, H, W), of interceptions some of whose channels are missing."""
        operators, update = self.maps.operators, torch.empty_like(around)
        sets = [tuple(row_list) for row_list in rows.tolist()]
        for key in dict.fromkeys(sets):
            # States that differ in the order of their maps are kept apart: what is missing is a place in that order.
            said: _Said = tuple((b"gaps %d" % row, 1) for row in key)
            stacked = operators[key[0]] if len(key) == 1 else _Stacked([operators[row] for row in key])
            posterior = self._posteriors.get(said) or self._iterative(stacked, len(key))
            assert isinstance(posterior, IterativePosterior)
            self._posteriors[said] = posterior
            members = torch.tensor([index for index, face_set in enumerate(sets) if face_set == key])
            sent = clean[members.to(clean.device)].to(update)
            faces = around[members.to(around.device)]
            residual = sent - torch.stack([self._expected(operators[row], faces) for row in key], dim=1)
            here = sent_channels(sent).to(residual)
            update[members.to(update.device)] = posterior(residual.flatten(1, 2), here.flatten(1, 2))
        return update

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """The canonical channel of each channel, int64 (N, k, C), where layouts are told apart."""
        if self.reader.classifier is None:
            return None
        rows = self.rows(observation)
        return self.reader.layouts(rows.flatten()).view(*rows.shape, -1)

    def infer_states(self, observation: Observation) -> Tensor | None:
        """The rows of the mechanism's states, int64 (N, k), where states are told apart."""
        several = len(self.maps.operators) > 1 and not self._knows_states
        return self.rows(observation) if several and self.mechanism.states() is not None else None


class _Stacked:
    """Several operators as one, their channels behind one another."""

    def __init__(self, operators: list[LinearOperator]) -> None:
        self._operators = operators

    @property
    def offset(self) -> Tensor:
        """Not asked for: residuals are made operator by operator."""
        raise NotImplementedError

    def __call__(self, faces: Tensor) -> Tensor:
        return torch.cat([operator(faces) for operator in self._operators], dim=1)

    def adjoint(self, representation: Tensor) -> Tensor:
        share = representation.shape[1] // len(self._operators)
        parts = zip(self._operators, representation.split(share, dim=1), strict=True)
        return torch.stack([operator.adjoint(part) for operator, part in parts]).sum(dim=0)


def _key(operator: SeparableSum) -> bytes:
    """The same for operators that differ in the order of their maps, or a turn of their colours, only."""
    pairs = zip(operator.row_factors.cpu(), operator.column_factors.cpu(), strict=True)
    maps = sorted(hashlib.sha256(r.numpy().tobytes() + c.numpy().tobytes()).digest()[:8] for r, c in pairs)
    gram = operator.colour.T @ operator.colour
    # Rounding that could fall either way would only have a state factored twice.
    shades = (2**20 * gram / gram.abs().max()).round().long().cpu().numpy().tobytes()
    return b"".join((*maps, hashlib.sha256(shades + f"{gram.trace():.9g}".encode()).digest()[:8]))


def _close(first: Tensor, second: Tensor, scale: float) -> bool:
    return float((first - second).abs().max()) <= _SAME * scale


def _groups(rows: Tensor) -> list[tuple[int, Tensor]]:
    """Each value of int64 (M,), with the positions it stands at."""
    return [(value, (rows == value).nonzero().flatten()) for value in torch.unique(rows).tolist()]
