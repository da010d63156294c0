"""Reads the state of each intercepted face, and under a black box the secret table itself, off what was intercepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, AttackOptions, Knowledge
from attacks.parts.exposure import Exposure, in_chunks
from attacks.parts.operators import Gains
from attacks.parts.plaintext import EstimatedMap, Imitation, estimate_map, helps
from attacks.parts.posterior import PriorCovariance
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense, LinearOperator, Shape
from defenses.layout import ChannelLayout, probe

#: Faces at once.
_CHUNK = 64
#: Relative to a map's mean energy, below which a row or column counts as empty.
_FLOOR = 1e-4
_RIDGE = 1e-2
#: What a layout has to gain, in units of the bits that it takes to write it down.
_PRICE = 2.0
_ROUNDS = 6
#: Values of a sketch whose likelihood is compared, about (half of them of more than a few states); and what is added to
#: its variances, relative to their mean.
_SKETCH = 256
_FEW = 128
_JITTER = 1e-6
_SWEEPS = 50
_REREADINGS = 4


class ReaderOptions(AttackOptions):
    """Options of attacks that read states."""

    state_faces: int = Field(800, ge=16, description="Public faces that the reader of states learns from.")
    traffic: int = Field(
        default=1000, ge=1, description="Intercepted faces that a secret table is inferred from at blackbox."
    )


class ChannelClassifier(nn.Module):
    """Linear discriminant analysis of maps into the channels of a canonical layout.

    Features are the logarithms of the energies of a map's rows and columns and of the whole map; classes are the
    P canonical channels, a mean each and one pooled covariance.

    Attributes:
        weight: float32 (F, P); bias: float32 (P,). The log likelihood of a canonical channel up to a constant of the
            map is ``features @ weight + bias``; channels never seen have a bias of minus infinity.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(height + width + 1, channels))
        self.register_buffer("bias", torch.zeros(channels))

    @staticmethod
    def features(representations: Tensor) -> Tensor:
        """float32 (N, C, h + w + 1) of representations (N, C, h, w)."""
        energy = representations.float().square()
        total = energy.mean(dim=(2, 3), keepdim=True)
        relative = energy / total.clamp(min=1e-20)
        rows, columns = relative.mean(dim=3), relative.mean(dim=2)
        profile = torch.cat((rows, columns), dim=2)
        return torch.cat((torch.log(profile + _FLOOR), torch.log(total[..., 0] + 1e-12)), dim=2)

    def fit(self, features: Tensor, channels: Tensor) -> None:
        """Estimate from maps, features float32 (M, F), whose canonical channel is known, int64 (M,)."""
        count = len(self.bias)
        features, channels = features.double(), channels.to(features.device)
        counts = torch.bincount(channels, minlength=count).double()
        means = torch.zeros(count, features.shape[1], dtype=torch.float64, device=features.device)
        means.index_add_(0, channels, features)
        means /= counts.clamp(min=1)[:, None]
        centred = features - means[channels]
        covariance = centred.T @ centred / max(1, len(features) - count)
        covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(covariance, means.T)
        bias = -0.5 * (means.T * weight).sum(dim=0)
        bias[counts == 0] = -torch.inf
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, representations: Tensor) -> Tensor:
        """Log likelihoods float32 (N, C, P) of representations (N, C, h, w), up to a constant of each map."""
        device = self.weight.device
        return in_chunks(lambda part: self.features(part.to(device)) @ self.weight + self.bias, representations)

    def rows(self, likelihood: Tensor, table: Tensor) -> Tensor:
        """The row of ``table`` (K, C) under which each face (N, C, P) is likeliest: int64 (N,)."""
        return _scores(likelihood, table).argmax(dim=1)


@torch.no_grad()
def fit_channels(
    classifier: ChannelClassifier,
    faces: Tensor,
    exposure: Exposure,
    layout: ChannelLayout | None,
    seed: int,
    count: int,
) -> float:
    """Fit to ``count`` public faces, uint8 (M, 3, H, W), and return the share of maps of as many more read right.

    ``layout`` is that of the mechanism in use; None asks each guess for its own.
    """
    device = classifier.weight.device
    index = torch.randint(len(faces), (2 * count,), generator=derived(seed, "places"))
    features, channels = [], []
    for number, part in enumerate(index.split(_CHUNK)):
        target = to_float(faces[part.to(faces.device)].to(device))
        for protected, drawn in exposure.protect_with_layouts(target, layout, "places", number):
            sent, state = protected.representation, protected.state
            if state is None:
                if drawn.states.shape[1]:
                    raise ValueError("the defence lists states but says of no face which was drawn")
                state = drawn.states.expand(len(sent), 0)
            features.append(classifier.features(sent).flatten(0, 1))
            channels.append(drawn.canonical[drawn.row_of(state)].flatten())
    values, truth = torch.cat(features), torch.cat(channels)
    half = len(values) // 2
    classifier.fit(values[:half], truth[:half])
    predicted = (values[half:] @ classifier.weight + classifier.bias).argmax(dim=1)
    return float((predicted == truth[half:]).float().mean())


def assign(likelihood: Tensor, distinct: bool = True) -> Tensor:
    """The likeliest assignment of the channels to canonical ones: int64 (C,) of log likelihoods (C, P).

    No canonical channel is assigned twice where they are known to be ``distinct``.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and seldom needed

    if not distinct:
        return likelihood.argmax(dim=1).cpu()
    cost = -likelihood.double().cpu().numpy()
    cost = np.where(np.isfinite(cost), cost, 1e12)
    return torch.from_numpy(linear_sum_assignment(cost)[1])


def infer_table(likelihoods: Tensor, states: int, distinct: bool = True) -> tuple[Tensor, Tensor]:
    """The layouts that a secret table of at most ``states`` holds, from log likelihoods (N, C, P) of faces.

    A layout names a canonical channel once, where they are known to be ``distinct``.

    Mixture of layouts by hard expectation-maximisation: each face goes to the layout under which it is likeliest, and
    each layout is read from the likelihoods of all its faces together, which leaves misreadings of single faces no
    chance. It starts with the faces that the layouts found so far explain worst, read by themselves (farthest-first
    traversal, Gonzalez 1985), and starts again with such faces wherever two layouts turn out to be one.

    Returns:
        int64 (K, C), K <= ``states``, the commonest first, and int64 (K,), how many faces showed each.
    """
    likelihoods = likelihoods.double().cpu()
    readings = torch.stack([assign(likelihood, distinct) for likelihood in likelihoods])
    best = likelihoods.gather(2, readings[:, :, None])[..., 0].sum(dim=1)
    table, before = readings[best.argmax()][None], 0
    for _ in range(_ROUNDS):
        while len(table) < states:
            regret = best - _scores(likelihoods, table).amax(dim=1)
            worst = regret.argmax()
            if float(regret[worst]) <= 0:
                break
            table = torch.cat((table, readings[worst][None]))
        for _ in range(_REREADINGS):
            members = _scores(likelihoods, table).argmax(dim=1)
            held = torch.unique(members)
            together = [assign(likelihoods[members == row].sum(dim=0), distinct) for row in held]
            table = torch.unique(torch.stack(together), dim=0)
        pruned = _prune(likelihoods, table)
        if len(pruned) == states or len(pruned) == before:
            table = pruned
            break
        table, before = pruned, len(pruned)
    counts = torch.bincount(_scores(likelihoods, table).argmax(dim=1), minlength=len(table))
    order = counts.argsort(descending=True, stable=True)
    return table[order], counts[order]


def _prune(likelihoods: Tensor, table: Tensor) -> Tensor:
    """``table`` without the layouts that explain hardly more than the others do: misreadings, not states.

    A layout has to gain more likelihood than it takes to write it down (minimum description length, Rissanen 1978).
    """
    price = _PRICE * likelihoods.shape[1] * math.log(likelihoods.shape[2])
    while len(table) > 1:
        best = _scores(likelihoods, table).topk(2, dim=1)
        gain = torch.zeros(len(table), dtype=torch.float64)
        gain.index_add_(0, best.indices[:, 0], best.values[:, 0] - best.values[:, 1])
        if float(gain.min()) >= price:
            break
        table = table[torch.arange(len(table)) != gain.argmin()]
    return table


def _scores(likelihoods: Tensor, table: Tensor) -> Tensor:
    """The log likelihood of each face (N, C, P) under each layout (K, C): float64 (N, K)."""
    score = torch.zeros(len(likelihoods), len(table), dtype=torch.float64, device=likelihoods.device)
    for channel, rows in enumerate(table.T.to(likelihoods.device)):
        score += likelihoods[:, channel].double()[:, rows]
    return score


class StateReader(nn.Module):
    """Which of its states a defence drew for each representation.

    * ``oracle``: told.
    * ``whitebox``: the known table's row that is likeliest under :class:`~attacks.parts.states.ChannelClassifier`.
    * ``blackbox``: as there, in a table that is inferred from intercepted traffic first, and becomes
      the :attr:`mechanism` the attack works with.

    A defence whose layout never varies (and is no secret) has one state, which needs no reading. A secret that no table
    of layouts describes is estimated from protection queries, where the reader may send some (``queries``, at most).

    Attributes:
        width: canonical channels, where layouts are to be told apart; else None.
        infers_secret: whether the table has to be inferred.
        classifier: of maps into canonical channels, where layouts are to be told apart and are not told.
        table: int64 (K, C) buffer, the layout of each state; under a black box rows of -1 stand for states not found.
        estimate: of the one secret map, where protection queries are to tell it.
    """

    table: Tensor
    estimate: EstimatedMap | None
    classifier: ChannelClassifier | None

    def __init__(self, adversary: Adversary, mechanism: Defense, queries: int = 0) -> None:
        super().__init__()
        layout = probe(mechanism, mechanism.states())
        # In a tuple: a defence is no part of an attack's weights.
        self._given = adversary, mechanism, layout
        self._imitation: tuple[Tensor, Defense] | None = None
        self._knows = adversary.knowledge is Knowledge.ORACLE
        secret = adversary.knowledge is Knowledge.BLACKBOX and bool(mechanism.secret)
        self.classifier, self.width, table = None, None, torch.zeros(0, 0, dtype=torch.int64)
        if layout is not None and (layout.varies or secret):
            self.width, table = layout.width, layout.canonical
            if not self._knows:
                self.classifier = ChannelClassifier(*mechanism.representation_shape[1:], layout.width)
        self.infers_secret = secret and self.classifier is not None
        # Of a black box this is a guess's: whether it sends a channel twice is a matter of the kind of secret.
        self._distinct = bool((table.sort(dim=1).values.diff(dim=1) != 0).all())
        self.register_buffer("table", torch.full_like(table, -1) if secret else table.clone())
        self.estimate, self._queries = None, queries
        self._estimates: tuple[Imitation, ...] = ()
        if queries and helps(adversary, mechanism) and not (self.infers_secret and self.inferable):
            shape = mechanism.representation_shape
            self.estimate = EstimatedMap(mechanism.image_size, shape)
            self._estimates = (Imitation(self.estimate, shape),)
            self.classifier, self.infers_secret = None, False

    @property
    def inferable(self) -> bool:
        """Whether the defence can be described by a table that was inferred."""
        secretive = [member for member in self._given[1].members if member.secret]
        return all(type(member).with_layouts is not Defense.with_layouts for member in secretive)

    @property
    def _known_rows(self) -> Tensor:
        return self.table[(self.table >= 0).all(dim=1)]

    @property
    def estimated(self) -> bool:
        """Whether the secret map is known from protection queries."""
        return self.estimate is not None and bool(self.estimate.found)

    @property
    def mechanism(self) -> Defense:
        """The defence in use or, under a black box, what was found out about it."""
        adversary, mechanism, _ = self._given
        if self.estimated:
            return self._estimates[0]
        if not self.infers_secret or not len(self._known_rows):
            return mechanism
        if self._imitation is None or not torch.equal(self._imitation[0], self._known_rows):
            rows = self._known_rows.clone()
            self._imitation = rows, mechanism.with_layouts(rows).to(adversary.fabric.device)
        return self._imitation[1]

    def fit(self, seed: int, options: ReaderOptions) -> dict[str, Any]:
        """Fit the classifier on public faces and, under a black box, infer the table from intercepted traffic.

        Returns:
            ``map_accuracy`` on public faces; under a black box also ``intercepted`` and ``states_found``, or what
            :func:`~attacks.parts.plaintext.estimate_map` says; nothing where there is nothing to learn.

        Raises:
            ValueError: a black box without intercepted traffic; or a secret that shows in neither traffic nor client.
        """
        adversary, mechanism, layout = self._given
        if self.estimate is not None and adversary.client is not None:
            told = estimate_map(self.estimate, adversary.client, adversary.faces, seed, self._queries)
            if not self.estimated:
                raise ValueError(
                    f"what is secret of {mechanism.name} is neither a table of layouts nor one linear map "
                    f"({told['protection_map']}): use an attack that trains on what the client sends, as unet does"
                )
            return told
        if self.classifier is None:
            return {}
        exposure, layout = Exposure(adversary, seed), None if self.infers_secret else layout
        accuracy = fit_channels(self.classifier, adversary.faces, exposure, layout, seed, options.state_faces)
        details: dict[str, Any] = {"map_accuracy": accuracy}
        if self.infers_secret:
            if not self.inferable:
                raise ValueError(f"{mechanism.name} is not described by the layouts of its channels")
            if adversary.traffic is None:
                raise ValueError("a secret table is inferred from intercepted traffic, and none was given")
            likelihoods = torch.cat([self.classifier(batch).cpu() for batch in adversary.traffic(options.traffic)])
            table, counts = infer_table(likelihoods, len(self.table), self._distinct)
            # The defence knows what layouts it can have (PartialFace: the same for every colour), a reading does not.
            imitation = mechanism.with_layouts(table.to(adversary.fabric.device))
            consistent = probe(imitation, imitation.states())
            if consistent is not None:
                table = consistent.canonical
            self.table.fill_(-1)
            self.table[: len(table)] = table.to(self.table.device)
            details |= {"intercepted": len(likelihoods), "states_found": len(table), "faces_per_state": counts.tolist()}
        return details

    def rows(self, representations: Tensor, states: Tensor | None) -> Tensor:
        """The row of :attr:`mechanism`'s states that each representation (N, C, h, w) was sent under: int64 (N,).

        ``states``, int64 (N, D), are the true ones where they are known.
        """
        adversary, mechanism, layout = self._given
        if self._knows and layout is not None and mechanism.states() is not None:
            if states is None:
                raise ValueError("at oracle the states of the intercepted faces are needed")
            return layout.row_of(states)
        if self.classifier is None:
            return torch.zeros(len(representations), dtype=torch.int64, device=adversary.fabric.device)
        known = self._known_rows
        return self.classifier.rows(self.classifier(representations), known if len(known) else self.table.clamp(min=0))

    def layouts(self, rows: Tensor) -> Tensor:
        """The canonical channel of each channel, int64 (N, C), for rows from :meth:`rows`, where layouts vary."""
        return self.table[rows.to(self.table.device)]

    def infer_layout(self, representations: Tensor) -> Tensor | None:
        """As :meth:`RecoveryAttack.infer_layout`, of (N, k, C, h, w): None where nothing is inferred."""
        if self.classifier is None:
            return None
        layouts = in_chunks(lambda part: self.layouts(self.rows(part, None)), representations.flatten(0, 1))
        return layouts.view(*representations.shape[:2], -1)


class StateLikelihood:
    """Which of K linear maps each representation was sent through, by marginal likelihood under a prior of faces.

    Under state k what is sent is Gaussian, N(A_k mean + offset_k, A_k S A_k^T + noise^2). A sketch P z of it is
    compared, the same for all states: random signed sums over each channel, which tell scales, colours and places of
    channels and pixels apart. Its covariance P A_k S A_k^T P^T is exact, by as many adjoints as the sketch has values.
    """

    def __init__(
        self, covariance: PriorCovariance, operators: Sequence[LinearOperator], noise: float, shape: Shape
    ) -> None:
        channels, height, width = shape
        mean = covariance.prior.to_faces(covariance.prior.mean[None])
        values = _SKETCH if len(operators) <= _FEW else _SKETCH // 2
        count = min(height * width, max(1, values // channels))
        generator = torch.Generator().manual_seed(0)
        if count == height * width:
            self._signs = torch.eye(count, dtype=torch.float64, device=mean.device)
        else:
            signs = torch.randint(2, (count, height * width), generator=generator)
            self._signs = (2 * signs - 1).to(mean) / math.sqrt(height * width)
        values = channels * count

        def probes() -> Iterator[Tensor]:
            """The rows of P, as representations (n, C, h, w), a few at a time: together they would fill memory."""
            for part in torch.arange(values, device=mean.device).split(_CHUNK):
                rows = torch.zeros(len(part), channels, height * width, dtype=torch.float64, device=mean.device)
                rows[torch.arange(len(part)), part // count] = self._signs[part % count]
                yield rows.view(-1, *shape)

        white = noise**2 * torch.kron(torch.eye(channels, dtype=torch.float64), (self._signs @ self._signs.T).cpu())
        whitened, means, volumes = [], [], []
        for operator in operators:
            pulled = torch.cat([operator.adjoint(part) for part in probes()])
            spread = torch.cat([covariance.times(part) for part in pulled.split(_CHUNK)])
            system = pulled.flatten(1) @ spread.flatten(1).T + white.to(mean)
            system = (system + system.T) / 2
            system.diagonal().add_(_JITTER * float(system.diagonal().mean()) + 1e-30)
            factor = torch.linalg.cholesky(system)
            identity = torch.eye(values, dtype=torch.float64, device=mean.device)
            whitened.append(torch.linalg.solve_triangular(factor, identity, upper=False).float())
            volumes.append(float(factor.diagonal().log().sum()))
            means.append(self.sketch(operator(mean) + operator.offset.to(mean))[0])
        self._whitened, self._means, self._volumes = whitened, means, volumes
        self._offset = self.sketch(operators[0].offset.expand(1, *shape))[0]

    def sketch(self, representations: Tensor) -> Tensor:
        """float64 (N, M) of representations (N, C, h, w)."""
        return (representations.to(self._signs).flatten(2) @ self._signs.T).flatten(1)

    def __call__(self, representations: Tensor) -> Tensor:
        """Log likelihoods float64 (N, K), up to a constant, of representations (N, C, h, w), float64."""
        sketches = self.sketch(representations)
        scores = [
            -0.5 * (((sketches - mean).float() @ whitened.T).double().square().sum(dim=1)) - volume
            for whitened, mean, volume in zip(self._whitened, self._means, self._volumes, strict=True)
        ]
        return torch.stack(scores, dim=1)

    def gains(self, representations: Tensor, gains: Gains) -> Tensor:
        """The likeliest gain of each channel, float64 (N, C), where the first map is scaled at random.

        With y the sketch, less that of the offset, and u = 1 / gain, the log likelihood sum(log u) -
        |W (u y - m)|^2 / 2 is concave in u; one group's u is maximised after the other's.
        """
        sketches = self.sketch(representations) - self._offset
        whitened = self._whitened[0].double()
        mean = whitened @ (self._means[0] - self._offset)
        group = gains.groups.to(sketches.device).repeat_interleave(sketches.shape[1] // len(gains.groups))
        count = len(gains.lowest)
        members = torch.nn.functional.one_hot(group, count).T.to(sketches)  # (G, M)
        turned = (sketches[:, None] * members) @ whitened.T  # (N, G, M)
        gram, linear, sizes = turned @ turned.mT, turned @ mean, members.sum(dim=1)
        inverse = (gains.lowest * gains.highest).rsqrt().to(sketches).repeat(len(sketches), 1)
        lowest, highest = 1 / gains.highest.to(sketches), 1 / gains.lowest.to(sketches)
        for index in itertools.chain(*itertools.repeat(range(count), _SWEEPS)):
            own = gram[:, index, index].clamp(min=1e-300)
            slope = linear[:, index] - (gram[:, index] * inverse).sum(dim=1) + own * inverse[:, index]
            best = (slope + (slope.square() + 4 * sizes[index] * own).sqrt()) / (2 * own)
            inverse[:, index] = best.clamp(lowest[index], highest[index])
        return 1 / inverse[:, gains.groups.to(inverse.device)]
