"""Unmixing: where a defence that shuffles maps and adds them up put them, and the best linear estimate from there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, FitReport, Knowledge, Observation
from attacks.linear import Linear, LinearOptions
from attacks.parts.exposure import split_identities
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense

#: Faces at once; and public faces that say which maps are energetic, and how many maps are placed right.
_CHUNK = 32
_SURVEY = 256
_CHECKED = 16
#: Of the noise, relative to its mean variance: what rounding and clamping leave, at least.
_JITTER = 1e-4


class UnmixOptions(LinearOptions):
    """Options of :class:`Unmix`."""

    placed: int = Field(48, ge=1, le=4096, description="Maps that are looked for, the most energetic first.")
    components: int = Field(120, ge=1, le=4096, description="Principal components of faces and their maps together.")
    band: int = Field(
        16,
        ge=2,
        le=112,
        description="Frequencies a side of the cosine transform in which what was sent is compared: faces and weights "
        "are smooth.",
    )
    map_faces: int = Field(1500, ge=16, le=100_000, description="Public faces that these are fitted to.")


class Unmix(Linear):
    """Greedy search for the likeliest state, by Gaussian marginal likelihood, then the posterior mean of the face.

    For a defence whose states are too many to be listed, but whose state does no more than say which of P maps r_c of a
    face is in which place of a fixed linear mixture, z(x) = offset + sum_p w_p(x) r_state[p](x)
    (:meth:`~defenses.base.Defense.canonical_maps`). The attacker knows the w_p, and learns from public faces what the
    maps are like: face and maps are jointly Gaussian in a few principal components a. Maps are placed one after
    another, the most energetic first. A place is as likely as what was sent is, a being integrated out, while the maps
    not placed yet stand in every free place with equal probability and count as noise of their own covariance, as does
    of those placed what the components do not explain. The mean of a, given all places, gives the face.

    At ``oracle`` places are known. Of k interceptions, each is placed by itself, and one posterior combines them.
    A defence that mixes no such maps is attacked as by :class:`~attacks.linear.Linear`.
    """

    name = "unmix"
    summary = "finds where the energetic maps of a shuffled sum went, and inverts it in closed form; else as linear"
    cost = "fit: minutes (the defence's maps of public faces); recover: seconds a face on one core"
    reference = "greedy maximum likelihood under a Gaussian prior; Kay, Fundamentals of Statistical Signal Processing"
    Options = UnmixOptions
    presets: ClassVar = {
        "quick": {**Linear.presets["quick"], "placed": 24, "components": 40, "band": 12, "map_faces": 400},
        "gpu": {**Linear.presets["gpu"], "placed": 96, "components": 300, "map_faces": 6000},
    }
    options: UnmixOptions

    order: Tensor
    typical: Tensor
    directions_of_maps: Tensor
    expected: Tensor
    whitening: Tensor
    face: Tensor
    directions_of_face: Tensor

    def inapplicable(self, defense: Defense) -> str | None:
        """It needs maps that are mixed, or a linear map."""
        return None if _mixes(defense) else super().inapplicable(defense)

    def build(self, adversary: Adversary) -> None:
        """Find the weights of the mixture; or as the linear attack does."""
        self._mixing = _mixes(self.mechanism)
        if not self._mixing:
            return super().build(adversary)
        mechanism, size = self.mechanism, adversary.faces.shape[-1]
        sent = mechanism.representation_shape
        maps = self._maps_of(torch.zeros(1, 3, size, size, device=self.device))
        self.count, pixels = maps.shape[1], math.prod(sent[1:])
        self._find_weights(sent)
        planes, values = len(self._fields), len(self._sketch)
        placed = min(self.options.placed, self.count)
        rank = max(1, min(self.options.components, self.options.map_faces // 2, len(adversary.faces) // 2))
        self.register_buffer("order", torch.arange(placed))
        self.register_buffer("typical", torch.zeros(placed, pixels))
        self.register_buffer("directions_of_maps", torch.zeros(placed, pixels, rank))
        self.register_buffer("expected", torch.zeros(placed + 1, planes, values))
        self.register_buffer("whitening", torch.zeros(placed + 1, planes, values, values))
        self.register_buffer("face", torch.zeros(3, size, size))
        self.register_buffer("directions_of_face", torch.zeros(3 * size * size, rank))
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._mixing:
            # Nothing of the linear attack was built.
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _maps_of(self, faces: Tensor) -> Tensor:
        maps = self.mechanism.canonical_maps(faces)
        if maps is None:
            raise ValueError(f"{self.mechanism.name} tells no maps")
        return maps.detach().float()

    def _find_weights(self, sent: tuple[int, int, int]) -> None:
        """Offset, colour planes and fields of the mixture, read off its adjoint.

        A place adds to one mixture of the sent channels only, a plane, with a weight of its own in each pixel.

        Raises:
            ValueError: places are no such products.
        """
        channels, height, width = sent
        state, device = torch.arange(self.count)[None], self.device
        pictures = torch.eye(channels, device=device)[:, :, None, None].expand(channels, *sent)
        nothing = self.mechanism.canonical(torch.zeros(1, *sent, device=device), state)
        weights = self.mechanism.canonical(pictures, state.expand(channels, -1)) - nothing
        weights = weights.flatten(2).permute(1, 0, 2).double().cpu()  # (P, C, h w)
        left, sizes, _ = torch.linalg.svd(weights, full_matrices=False)
        colour = left[:, :, 0]
        colour = colour * colour.gather(1, colour.abs().argmax(dim=1, keepdim=True)).sign()
        groups = torch.unique((1e4 * colour).round(), dim=0, return_inverse=True)[1]
        alike = torch.bincount(groups)
        if float((sizes[:, 1:] / sizes[:, :1]).max()) > 1e-3 or len(alike) != channels or len(alike.unique()) > 1:
            raise ValueError(f"{self.mechanism.name} does not mix its maps within {channels} planes of as many places")
        self._places = torch.stack([(groups == plane).nonzero().flatten() for plane in range(channels)])  # (C, F)
        axes = torch.stack([colour[places[0]] for places in self._places], dim=1)
        unmix = torch.linalg.inv(axes)
        own = unmix[torch.arange(channels).repeat_interleave(alike[0])]
        fields = torch.einsum("pc,pcx->px", own, weights[self._places.flatten()])
        flat = weights.permute(2, 0, 1)  # (h w, P, C)
        offset = torch.linalg.lstsq(flat, -nothing[0].flatten(1).T.double().cpu()[..., None]).solution[..., 0].T
        cosines = [_cosines(min(self.options.band, side), side) for side in (height, width)]
        self._fields = fields.view(channels, -1, height * width).float().to(device)
        self._unmix, self._offset = unmix.float().to(device), offset.float().to(device)
        self._sketch = torch.kron(cosines[0], cosines[1]).float().to(device)  # (D, h w)

    def _planes(self, representations: Tensor) -> Tensor:
        """(N, C, h, w) to what its planes hold beside the offset, (N, C, D)."""
        flat = representations.to(self._offset).flatten(2) - self._offset
        return torch.einsum("kc,ncx->nkx", self._unmix, flat) @ self._sketch.T

    # -- what public faces tell -------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Fit the joint components of faces and maps, and the covariance of what is not placed."""
        if not self._mixing:
            return super().fit(adversary)
        draws = derived(self.seed, "maps")
        training, held_out = split_identities(adversary.identities, self.options.held_out, derived(self.seed, "prior"))
        share = len(held_out) / len(adversary.faces)
        most = round(share * self.options.map_faces)
        held_out = held_out[torch.randperm(len(held_out), generator=draws)[: max(8, most)]]
        training = training[torch.randperm(len(training), generator=draws)[: self.options.map_faces - most]]
        rank = self.directions_of_face.shape[1]
        energies = [maps.square().mean(dim=(0, 2, 3)) for _, maps in self._shown(training[:_SURVEY])]
        energy = torch.stack(energies).mean(dim=0)
        self.order.copy_(energy.argsort(descending=True)[: len(self.order)])
        adversary.report(1, 4)
        faces, maps, typical = self._collected(training)
        self.face.copy_(faces.mean(dim=0).view_as(self.face))
        self.typical.copy_(maps.mean(dim=0))
        faces, maps = faces - self.face.flatten(), maps.sub_(self.typical).flatten(1)
        scale = maps.std() / faces.std().clamp(min=1e-12)  # both count alike
        gram = scale.square() * (faces @ faces.T) + maps @ maps.T
        values, vectors = torch.linalg.eigh(gram.double())
        kept = values[-rank:].flip(0).clamp(min=1e-9 * float(values[-1]) + 1e-30)
        vectors = (vectors[:, -rank:].flip(1) / kept.sqrt()).to(maps)
        of_face, of_maps = scale * (faces.T @ vectors), maps.T @ vectors
        del maps
        adversary.report(2, 4)
        self._learn_rest(held_out, of_face, of_maps, float(scale), typical, draws)
        adversary.report(3, 4)
        share = self._share_placed(held_out[:_CHECKED], energy)
        adversary.report(4, 4)
        return FitReport(
            saturated=None,
            details={"energy_placed": share, "by_chance": 1 / self.count, "components": rank, "maps": len(self.order)},
        )

    def _shown(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Public faces (n, 3, H, W) and their maps (n, P, h, w), some at a time."""
        public = self.adversary.faces
        for part in index.split(_CHUNK):
            faces = to_float(public[part.to(public.device)].to(self.device))
            with torch.no_grad():
                yield faces, self._maps_of(faces)

    def _collected(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Faces (n, 3 H W), their maps to be placed (n, M, h w), and the mean of all maps (P, h w)."""
        faces, maps, total = [], [], torch.zeros((), device=self.device)
        for face, shown in self._shown(index):
            faces.append(face.flatten(1))
            maps.append(shown[:, self.order].flatten(2))
            total = total + shown.flatten(2).sum(dim=0) / len(index)
        return torch.cat(faces), torch.cat(maps), total

    def _learn_rest(
        self, index: Tensor, of_face: Tensor, of_maps: Tensor, scale: float, typical: Tensor, draws: torch.Generator
    ) -> None:
        """Variances of the components and the covariance of all else, from faces that these were not fitted to."""
        placed, rank = len(self.order), of_face.shape[1]
        rest = torch.ones(self.count, dtype=torch.bool, device=self.device)
        rest[self.order] = False
        shape = self.whitening.shape[1:]
        everything = torch.zeros(placed + 1, *shape, device=self.device)  # the last: of all that are never placed
        unexplained = torch.zeros(placed, *shape, device=self.device)
        variance = torch.zeros(rank, device=self.device)
        for faces, maps in self._shown(index):
            flat = maps.flatten(2)
            own = flat[:, self.order] - self.typical
            scores = scale * ((faces - self.face).flatten(1) @ of_face) + own.flatten(1) @ of_maps
            variance += scores.square().sum(dim=0) / len(index)
            left = own - (scores @ of_maps.T).view_as(own)
            for at, some in enumerate((flat[:, self.order], left, flat[:, rest])):
                sketches = self._anywhere(some, draws) / len(index) ** 0.5  # (n, M, C, D)
                if at < 2:
                    (everything[:placed] if at == 0 else unexplained).add_(
                        torch.einsum("nmkd,nmke->mkde", sketches, sketches)
                    )
                else:
                    everything[placed] += torch.einsum("nmkd,nmke->kde", sketches, sketches)
        self.directions_of_maps.copy_((of_maps * variance.sqrt()).view_as(self.directions_of_maps))
        self.directions_of_face.copy_(of_face * variance.sqrt() / scale)
        anywhere = self._fields.sum(dim=1) / self.count
        for done in range(placed + 1):
            noise = everything[done:].sum(dim=0) + unexplained[:done].sum(dim=0)
            jitter = _JITTER * noise.diagonal(dim1=1, dim2=2).mean() + 1e-12
            noise = noise.double() + jitter * torch.eye(shape[1], device=noise.device, dtype=torch.float64)
            identity = torch.eye(shape[1], device=noise.device, dtype=torch.float64).expand_as(noise)
            factor = torch.linalg.cholesky(noise)
            self.whitening[done] = torch.linalg.solve_triangular(factor, identity, upper=False).float()
            total = typical.sum(dim=0) - typical[self.order[:done]].sum(dim=0)
            self.expected[done] = (anywhere * total) @ self._sketch.T

    def _anywhere(self, maps: Tensor, draws: torch.Generator) -> Tensor:
        """Maps (n, M, h w) in a random place of each plane, (n, M, C, D), times the root of that plane's chance."""
        planes, places, _ = self._fields.shape
        drawn = torch.randint(places, (planes, *maps.shape[:2]), generator=draws).to(maps.device)
        parts = [(self._fields[plane][drawn[plane]] * maps) @ self._sketch.T for plane in range(planes)]
        sketches: Tensor = torch.stack(parts, dim=2) * (places / self.count) ** 0.5
        return sketches

    def _share_placed(self, index: Tensor, energy: Tensor) -> float:
        """The share of all maps' energy that is placed right, of public faces."""
        draws, public = derived(self.seed, "placed"), self.adversary.faces
        sent = self.mechanism.protect(to_float(public[index.to(public.device)].to(self.device)), draws)
        found = self._search(self._planes(sent.representation))
        right = found == self._known(sent.state, len(found)).to(found.device)
        return float((right * energy[self.order]).sum(dim=1).mean() / energy.sum())

    # -- where maps went --------------------------------------------------------------------------

    def _known(self, state: Tensor | None, count: int) -> Tensor:
        """The places of the maps in :attr:`order`, int64 (N, M), under states (N, P), None if nothing is shuffled."""
        order = self.order.cpu()
        return order.expand(count, -1) if state is None else state.cpu().argsort(dim=1)[:, order]

    def _candidates(self, number: int, places: Tensor) -> Tensor:
        """What map ``number`` of :attr:`order` would add in each of the ``places``, int64 (n,): (n, D, 1 + K).

        Its typical part and that along each component.
        """
        maps = torch.cat((self.typical[number][:, None], self.directions_of_maps[number]), dim=1)
        fields = self._fields.flatten(0, 1)[self._row[places]]
        return torch.stack([(self._sketch * field) @ maps for field in fields])

    @property
    def _row(self) -> Tensor:
        """The number of each place among the places of all planes, one plane behind the other."""
        rows: Tensor = self._places.flatten().argsort()
        return rows.to(self._fields.device)

    def _search(self, sent: Tensor) -> Tensor:
        """The places of the maps in :attr:`order`, int64 (N, M), of sent planes (N, C, D)."""
        count, planes, values = sent.shape
        rank = self.directions_of_face.shape[1]
        left, explained = sent.clone(), sent.new_zeros(count, planes, values, rank)
        found = torch.zeros(count, len(self.order), dtype=torch.int64, device=sent.device)
        places = self._places.to(sent.device)
        for number in range(len(self.order)):
            white, expected = self.whitening[number + 1], self.expected[number + 1]
            raw = torch.stack([self._candidates(number, some) for some in places])  # (C, F, D, 1 + K)
            candidates = white[:, None] @ raw
            grams = candidates.mT @ candidates
            for face in range(count):  # each with as many systems as there are places
                now = torch.einsum("kde,ke->kd", white, left[face] - expected)
                maps = torch.einsum("kde,ker->kdr", white, explained[face])
                likelihood = _likelihoods(now, maps, candidates, grams)
                taken = torch.isin(places, found[face, :number])
                best = int(likelihood.masked_fill(taken, -torch.inf).argmax())
                plane, at = divmod(best, places.shape[1])
                found[face, number] = places[plane, at]
                left[face, plane] -= raw[plane, at, :, 0]
                explained[face, plane] += raw[plane, at, :, 1:]
        return found

    def _explained(self, sent: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened planes (N, C D), less what is expected, and what each component adds, (N, C D, K)."""
        rank = self.directions_of_face.shape[1]
        left, explained = sent - self.expected[-1], sent.new_zeros(*sent.shape, rank)
        faces, planes = torch.arange(len(sent), device=sent.device), self._row // self._places.shape[1]
        for number in range(len(self.order)):
            places = found[:, number].to(sent.device)
            added = self._candidates(number, places)
            left[faces, planes[places]] -= added[..., 0]
            explained[faces, planes[places]] += added[..., 1:]
        white = self.whitening[-1]
        return torch.einsum("kde,nke->nkd", white, left).flatten(1), torch.einsum(
            "kde,nker->nkdr", white, explained
        ).flatten(1, 2)

    def run(self, observation: Observation) -> Tensor:
        """Posterior means (N, 3, H, W), not clipped."""
        if not self._mixing:
            return super().run(observation)
        knows, states, device = self.adversary.knowledge is Knowledge.ORACLE, observation.states, self.device
        shuffled = self.mechanism.draw(1, derived(self.seed, "shape")) is not None
        if knows and shuffled and states is None:
            raise ValueError("at oracle the states of the intercepted faces are needed")
        rank = self.directions_of_face.shape[1]
        out = []
        for rows in torch.arange(len(observation)).split(_CHUNK):
            precision = torch.eye(rank, device=device).repeat(len(rows), 1, 1)
            linear = torch.zeros(len(rows), rank, device=device)
            for turn, sent in enumerate(observation.representations[rows].unbind(dim=1)):
                planes = self._planes(sent)
                drawn = None if states is None else states[rows, turn]
                found = self._known(drawn, len(rows)) if knows or not shuffled else self._search(planes)
                left, explained = self._explained(planes, found)
                precision += explained.mT @ explained
                linear += (explained.mT @ left[..., None])[..., 0]
            scores = torch.linalg.solve(precision, linear)
            out.append(self.face + (scores @ self.directions_of_face.T).view(-1, *self.face.shape))
        return torch.cat(out)

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """None where maps are mixed: no sent channel is one of them."""
        return None if self._mixing else super().infer_layout(observation)

    def infer_states(self, observation: Observation) -> Tensor | None:
        """None where maps are mixed: states are too many to be numbered."""
        return None if self._mixing else super().infer_states(observation)


def _mixes(defense: Defense) -> bool:
    return type(defense).canonical_maps is not Defense.canonical_maps


def _cosines(count: int, size: int) -> Tensor:
    """The lowest ``count`` rows of the orthonormal DCT-II, float64 (count, size)."""
    k, n = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows: Tensor = (math.pi * k * (n + 0.5) / size).cos() * math.sqrt(2 / size)
    rows[0] /= 2**0.5
    return rows


def _likelihoods(left: Tensor, maps: Tensor, candidates: Tensor, grams: Tensor) -> Tensor:
    """Log likelihoods (C, F), up to a constant, of white planes with one more map in each place of each plane.

    ``left`` (C, D) is what is to be explained, by N(0, I) components along ``maps`` (C, D, K) and by N(0, I) noise;
    ``candidates`` (C, F, D, 1 + K) are taken off the one and added to the other; ``grams`` are their Gram matrices.
    """
    before = torch.cat((-left[..., None], maps), dim=2)  # (C, D, 1 + K)
    own = before.mT @ before
    planes, places, values, rank = candidates.shape
    across = (candidates.transpose(2, 3).reshape(planes, places * rank, values) @ before).unflatten(1, (places, rank))
    joint = grams + across + across.mT + own.sum(dim=0)
    precision = joint[..., 1:, 1:] + torch.eye(rank - 1, device=maps.device)
    factor = torch.linalg.cholesky(precision)
    solved = torch.linalg.solve_triangular(factor, joint[..., 1:, :1], upper=False)[..., 0]
    volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    likelihoods: Tensor = -0.5 * (joint[..., 0, 0] - solved.square().sum(dim=-1)) - volume
    return likelihoods
