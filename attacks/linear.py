"""Linear inversion: the best linear estimate of a face from what a linear defence sent of it, without any training."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Observation, RecoveryAttack
from attacks.parts.gaussian_prior import GaussianPrior
from attacks.parts.posterior import IterativePosterior, Posterior, PriorCovariance
from attacks.parts.states import ReaderOptions, StateReader
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense, LinearOperator, SeparableSum
from defenses.layout import row_numbers

#: Faces whose representations are compared with the exact map to measure the noise.
_NOISE_FACES = 128
_NOISE_CHUNK = 32
#: Noise never counts as less than this share of what is sent: rounding of float32.
_ROUNDING = 2.0**-24


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
    with the noise that transmission adds, measured on public faces. ``whitebox`` reads the state off what is sent,
    ``blackbox`` also infers the secret table from intercepted traffic (:class:`~attacks.parts.states.StateReader`) or,
    where the secret is no such table, estimates the secret map from what the client sends of chosen pictures.
    Interceptions of one face are combined in one posterior.
    """

    name = "linear"
    summary = "closed-form inverse of a linear defence under a Gaussian prior of faces; trains nothing"
    cost = "fit: seconds (principal components); recover: a factorisation per state, then 20+ faces/s"
    reference = "linear minimum mean square error estimation; Kay, Fundamentals of Statistical Signal Processing, 1993"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC})
    uses = frozenset({Capability.PROTECTION})
    Options = LinearOptions
    presets: ClassVar = {
        "quick": {"rank": 100, "state_faces": 300, "traffic": 500},
        "gpu": {"rank": 1000, "prior_faces": 20_000},
    }
    options: LinearOptions

    noise: Tensor
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
        """It needs the linear map of each state that is drawn."""
        states = defense.states()
        state = defense.draw(1, torch.Generator()) if states is None else states
        if defense.linear_operator(None if state is None else state[0]) is None:
            return f"{defense.name} is not a linear defence"
        return None

    def build(self, adversary: Adversary) -> None:
        """Build the prior and the reader of states."""
        faces = adversary.faces
        if reason := self.inapplicable(self.mechanism):
            raise ValueError(f"{reason}: use another attack")
        self.reader = StateReader(adversary, self.mechanism, self.options.client_queries)
        self.prior = GaussianPrior(faces.shape[-1], min(self.options.rank, max(1, len(faces) // 2)))
        self.register_buffer("noise", torch.ones((), dtype=torch.float64))
        self._forget()

    def fit(self, adversary: Adversary) -> FitReport:
        """Fit the prior to public faces, measure the noise, and learn to read states."""
        seed, options = self.seed, self.options
        adversary.report(0, 3)
        details = self.reader.fit(seed, options)
        self._forget()
        adversary.report(1, 3)
        operator = self._operators()[1][0]
        colour = operator.colour if isinstance(operator, SeparableSum) else torch.eye(3, dtype=torch.float64)
        public = adversary.faces, adversary.identities
        details |= self.prior.fit(*public, colour, seed, held_out=options.held_out, most=options.prior_faces)
        adversary.report(2, 3)
        self.noise.fill_(self._measure_noise(adversary.faces, seed))
        adversary.report(3, 3)
        return FitReport(
            saturated=self._converges(),
            states_seen=self.reader.mechanism.states(),
            details=details | {"noise": float(self.noise), "rank": self.prior.rank},
        )

    def _converges(self) -> bool | None:
        """Whether conjugate gradients come to rest within their iterations; None where none are used."""
        keys, operators = self._operators()
        factored = self.options.solver == "auto" and isinstance(operators[0], SeparableSum)
        if factored or self.options.solver == "factor":
            return None
        posterior = self._posterior((keys[0],), operators[:1])
        return posterior.converges() if isinstance(posterior, IterativePosterior) else None

    def _measure_noise(self, faces: Tensor, seed: int) -> float:
        """Standard deviation of what is sent around the exact map."""
        mechanism, operators, device = self.reader.mechanism, self._operators()[1], self.prior.mean.device
        index = torch.randint(len(faces), (_NOISE_FACES,), generator=derived(seed, "noise faces"))
        generator = derived(seed, "noise")
        squares = energy = count = 0.0
        for chunk in faces[index.to(faces.device)].split(_NOISE_CHUNK):
            target = to_float(chunk.to(device))
            protected = mechanism.protect(target, generator)
            for row, members in _groups(self.rows_of(protected.state, len(target))):
                operator = operators[row]
                sent = protected.representation[members.to(device)].double()
                expected = operator(target[members.to(device)].double())
                squares += float((sent - expected - operator.offset.to(expected)).square().sum())
                energy += float(expected.square().sum())
                count += expected.numel()
        return max(math.sqrt(squares / count), _ROUNDING * math.sqrt(energy / count), 1e-12)

    def rows_of(self, states: Tensor | None, count: int) -> Tensor:
        """The number of each true state among the mechanism's, int64 (count,)."""
        listed = self.reader.mechanism.states()
        if states is None or listed is None:
            return torch.zeros(count, dtype=torch.int64)
        return row_numbers(states.cpu(), listed.cpu())

    def _forget(self) -> None:
        self._posteriors: OrderedDict[tuple[bytes, ...], Posterior | IterativePosterior] = OrderedDict()
        self._covariance: PriorCovariance | None = None
        self._keys: tuple[Defense, list[bytes], list[LinearOperator]] | None = None

    def _operators(self) -> tuple[list[bytes], list[LinearOperator]]:
        """The mechanism's operator for each state, and a key that is the same for states which say the same."""
        mechanism = self.reader.mechanism
        if self._keys is None or self._keys[0] is not mechanism:
            states = mechanism.states()
            rows = [None] if states is None else states.to(self.noise.device)
            linear = [operator for row in rows if (operator := mechanism.linear_operator(row)) is not None]
            if len(linear) < len(rows):
                raise ValueError(f"{mechanism.name} is linear in some of its states only: use another attack")
            self._keys = mechanism, [_key(operator, row) for row, operator in enumerate(linear)], linear
            self._posteriors.clear()
        return self._keys[1], self._keys[2]

    def _posterior(self, key: tuple[bytes, ...], operators: list[LinearOperator]) -> Posterior | IterativePosterior:
        """The factored posterior of a set of states, from the cache where it is there."""
        posterior = self._posteriors.pop(key, None) or self._factor(operators)
        self._posteriors[key] = posterior
        while len(self._posteriors) > 1 and self._bytes_kept() > self.options.memory * 2**20:
            self._posteriors.popitem(last=False)
        return posterior

    def _bytes_kept(self) -> int:
        return sum(kept.nbytes for kept in self._posteriors.values() if isinstance(kept, Posterior))

    def _factor(self, operators: list[LinearOperator]) -> Posterior | IterativePosterior:
        self._covariance = self._covariance or PriorCovariance(self.prior)
        separable = [operator for operator in operators if isinstance(operator, SeparableSum)]
        if self.options.solver != "cg" and len(separable) == len(operators):
            return Posterior(self._covariance, separable, float(self.noise))
        if self.options.solver == "factor":
            raise ValueError(f"{self.reader.mechanism.name} does not tell the factors of its map: use solver=cg")
        operator = operators[0] if len(operators) == 1 else _Stacked(operators)
        return IterativePosterior(self._covariance, operator, float(self.noise), self.options.iterations)

    def run(self, observation: Observation) -> Tensor:
        """Posterior means (N, 3, H, W), not clipped."""
        representations, rows = observation.representations, self.rows(observation)
        size, device = self.prior.size, self.prior.mean.device
        out = torch.empty(len(rows), 3, size, size, dtype=torch.float64, device=device)
        # Faces of one set of states come together, so that each set is factored once, however many there are.
        sets = self._sets(rows)
        for part in torch.tensor(sorted(range(len(sets)), key=sets.__getitem__)).split(self.options.batch_size):
            sent = representations[part.to(representations.device)]
            out[part.to(device)] = self.estimate(sent, rows[part.to(rows.device)])
        return out

    def rows(self, observation: Observation) -> Tensor:
        """The number of the state of each interception among the mechanism's, as far as it is known: int64 (N, k)."""
        representations, states = observation.representations, observation.states
        rows = self.reader.rows(representations.flatten(0, 1), None if states is None else states.flatten(0, 1))
        return rows.view(representations.shape[:2])

    def estimate(self, representations: Tensor, rows: Tensor) -> Tensor:
        """Posterior means float64 (N, 3, H, W) for representations (N, k, C, h, w) of states ``rows``, int64 (N, k)."""
        mean = self.mean_face()
        rows = rows.cpu()
        out = torch.empty(len(rows), *mean.shape, dtype=torch.float64, device=mean.device)
        for key, posterior, members in self._grouped(rows):
            sent = representations[members.to(representations.device)]
            if isinstance(posterior, Posterior):
                out[members.to(out.device)] = mean + self._factored(posterior, sent, rows[members])
            else:
                out[members.to(out.device)] = mean + self._iterated(posterior, sent, rows[members], key)
        return out

    def _grouped(self, rows: Tensor) -> Iterator[tuple[tuple[bytes, ...], Posterior | IterativePosterior, Tensor]]:
        """Faces whose interceptions (rows int64 (N, k), on the CPU) say the same, with their common posterior."""
        keys, operators = self._operators()
        sets = self._sets(rows)
        for key in dict.fromkeys(sets):
            members = torch.tensor([index for index, face_set in enumerate(sets) if face_set == key])
            yield key, self._posterior(key, [operators[keys.index(part)] for part in key]), members

    def _sets(self, rows: Tensor) -> list[tuple[bytes, ...]]:
        """For each face's interceptions, rows int64 (N, k), the different things that they say."""
        keys = self._operators()[0]
        return [tuple(sorted({keys[row] for row in row_list})) for row_list in rows.tolist()]

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
        start = faces.to(self.prior.mean)
        out, rows = start.clone(), rows.cpu()
        for posterior, members in self.posteriors(rows):
            at = members.to(out.device)
            sent = representations[members.to(representations.device)]
            out[at] += self._factored(posterior, sent, rows[members], start[at])
        return out

    def mean_face(self) -> Tensor:
        """The prior's mean, float64 (3, H, W)."""
        return self.prior.to_faces(self.prior.mean[None])[0]

    def residuals(self, representations: Tensor, rows: Tensor, faces: Tensor) -> Tensor:
        """A^T (z - offset - A x), averaged over interceptions whose states say the same and summed over the others.

        In RGB, float64 (N, 3, H, W), for x = ``faces``, float64 and broadcastable to it.
        """
        operators = self._operators()[1]
        n, k = rows.shape
        device = self.noise.device
        rows = rows.cpu()
        same = torch.tensor(self.kinds())[rows]
        weight = 1.0 / (same[:, :, None] == same[:, None, :]).sum(dim=2).double()
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
        adjoint = self.residuals(sent, rows, around)
        scale = prior.strengths.clamp(min=1e-300)[:, None, None]
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

    def _iterated(self, posterior: IterativePosterior, sent: Tensor, rows: Tensor, key: tuple[bytes, ...]) -> Tensor:
        keys, operators = self._operators()
        device, kinds = self.prior.mean.device, torch.tensor(self.kinds())[rows]
        parts, index = [], torch.arange(len(sent))
        for part in key:
            # One interception per kind of state: others of the kind say the same, up to rounding.
            column = (kinds == keys.index(part)).int().argmax(dim=1)
            z = sent[index.to(sent.device), column.to(sent.device)].to(device, torch.float64)
            residual = torch.empty_like(z)
            for row, members in _groups(rows[index, column]):
                operator, at = operators[row], members.to(device)
                residual[at] = z[at] - operator.offset.to(z) - operator(self.mean_face()[None])
            parts.append(residual)
        return posterior(torch.cat(parts, dim=1))

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """The canonical channel of each channel, int64 (N, k, C), where states are inferred."""
        return self.reader.infer_layout(observation.representations)


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


def _key(operator: LinearOperator, row: int) -> bytes:
    """The same for operators that differ in the order of their maps only."""
    if not isinstance(operator, SeparableSum):
        return f"state {row}".encode()
    pairs = zip(operator.row_factors.cpu(), operator.column_factors.cpu(), strict=True)
    return b"".join(sorted(hashlib.sha256(r.numpy().tobytes() + c.numpy().tobytes()).digest()[:8] for r, c in pairs))


def _groups(rows: Tensor) -> list[tuple[int, Tensor]]:
    """Each value of int64 (M,), with the positions it stands at."""
    return [(value, (rows == value).nonzero().flatten()) for value in torch.unique(rows).tolist()]
