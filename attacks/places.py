"""Which canonical channel a map is, told from the map alone; states and whole tables of them follow from it.

A defence that picks and permutes channels hides their order, not what they look like. How the energy of a map is spread
over its rows and columns tells which coefficient it holds: PartialFace's up-sampling moves the pixel grid slowly
against the block grid, so that every frequency fades in and out at rows and columns of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attacks.exposure import Exposure, chunks, to_float
from attacks.layout import ChannelLayout
from attacks.seeds import derived

#: Maps at once.
_CHUNK = 64
#: Relative to a map's mean energy, below which a row or column counts as empty.
_FLOOR = 1e-4
_RIDGE = 1e-2
#: What a layout has to gain, in units of the bits that it takes to write it down.
_PRICE = 2.0
_ROUNDS = 6
_REREADINGS = 4


class PlaceClassifier(nn.Module):
    """Linear discriminant analysis of maps into the places of a canonical layout.

    Features are the logarithms of the energies of a map's rows and columns and of the whole map; classes are the
    places, a mean each and one pooled covariance.

    Attributes:
        weight: float32 (F, places); bias: float32 (places,). The log likelihood of place p up to a constant of the map
            is ``features @ weight + bias``; places never seen have a bias of minus infinity.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, height: int, width: int, places: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(height + width + 1, places))
        self.register_buffer("bias", torch.zeros(places))

    @staticmethod
    def features(representations: Tensor) -> Tensor:
        """float32 (N, C, h + w + 1) of representations (N, C, h, w)."""
        energy = representations.float().square()
        total = energy.mean(dim=(2, 3), keepdim=True)
        relative = energy / total.clamp(min=1e-20)
        rows, columns = relative.mean(dim=3), relative.mean(dim=2)
        profile = torch.cat((rows, columns), dim=2)
        return torch.cat((torch.log(profile + _FLOOR), torch.log(total[..., 0] + 1e-12)), dim=2)

    def fit(self, features: Tensor, places: Tensor) -> None:
        """Estimate from maps whose place is known.

        Args:
            features: float32 (M, F).
            places: int64 (M,).
        """
        count = len(self.bias)
        features, places = features.double(), places.to(features.device)
        counts = torch.bincount(places, minlength=count).double()
        means = torch.zeros(count, features.shape[1], dtype=torch.float64, device=features.device)
        means.index_add_(0, places, features)
        means /= counts.clamp(min=1)[:, None]
        centred = features - means[places]
        covariance = centred.T @ centred / max(1, len(features) - count)
        covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(covariance, means.T)
        bias = -0.5 * (means.T * weight).sum(dim=0)
        bias[counts == 0] = -torch.inf
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def forward(self, representations: Tensor) -> Tensor:
        """Log likelihoods float32 (N, C, places) of representations (N, C, h, w), up to a constant of each map."""
        parts = [
            self.features(one.to(self.weight.device)) @ self.weight + self.bias for one in _pieces(representations)
        ]
        return torch.cat(parts) if parts else self.weight.new_zeros(0, representations.shape[1], len(self.bias))

    def rows(self, likelihood: Tensor, table: Tensor) -> Tensor:
        """The row of ``table`` (K, C) under which each face (N, C, places) is likeliest: int64 (N,)."""
        score = torch.zeros(len(likelihood), len(table), dtype=torch.float64, device=likelihood.device)
        for channel in range(likelihood.shape[1]):
            score += likelihood[:, channel].double()[:, table[:, channel].to(likelihood.device)]
        return score.argmax(dim=1)


def _pieces(representations: Tensor) -> Iterable[Tensor]:
    return (representations[start : start + _CHUNK] for start in range(0, len(representations), _CHUNK))


@torch.no_grad()
def fit_places(
    classifier: PlaceClassifier, faces: Tensor, exposure: Exposure, layout: ChannelLayout | None, seed: int, count: int
) -> float:
    """Fit ``classifier`` on ``count`` public faces, and return the share of maps of as many more that it gets right.

    Args:
        classifier: to be fitted.
        faces: uint8 (M, 3, H, W), the attacker's public faces.
        exposure: shows them through the mechanism, or through guesses of it.
        layout: of the mechanism in use, or None to ask each guess for its own.
        seed: of the draws.
        count: faces to fit on.
    """
    device = classifier.weight.device
    index = torch.randint(len(faces), (2 * count,), generator=derived(seed, "places"))
    features, places = [], []
    for number, chunk in enumerate(chunks(faces[index.to(faces.device)], _CHUNK)):
        for protected, own in exposure.protect_with_layouts(to_float(chunk.to(device)), layout, "places", number):
            if protected.state is None:
                raise ValueError("the defence lists states but says of no face which was drawn")
            features.append(classifier.features(protected.representation).flatten(0, 1))
            places.append(own.places[own.row_of(protected.state)].flatten())
    values, truth = torch.cat(features), torch.cat(places)
    half = len(values) // 2
    classifier.fit(values[:half], truth[:half])
    predicted = (values[half:] @ classifier.weight + classifier.bias).argmax(dim=1)
    return float((predicted == truth[half:]).float().mean())


def assign(likelihood: Tensor) -> Tensor:
    """The likeliest assignment of the channels to distinct places.

    Args:
        likelihood: (C, places), of one face or summed over faces that share a layout.

    Returns:
        int64 (C,).
    """
    cost = -likelihood.double().cpu().numpy()
    cost = np.where(np.isfinite(cost), cost, 1e12)
    return torch.from_numpy(linear_sum_assignment(cost)[1])


def infer_table(likelihoods: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """The layouts that a secret table holds, from faces whose layouts are unknown.

    Mixture of layouts by hard expectation-maximisation: each face goes to the layout under which it is likeliest, and
    each layout is read from the likelihoods of all its faces together, which leaves misreadings of single faces no
    chance. It starts with the faces that the layouts found so far explain worst, read by themselves (farthest-first
    traversal, Gonzalez 1985), and starts again with such faces wherever two layouts turn out to be one.

    Args:
        likelihoods: (N, C, places), from :class:`PlaceClassifier`.
        states: how many layouts there are at most.

    Returns:
        int64 (K, C), K <= ``states``, the commonest first, and int64 (K,), how many faces showed each.
    """
    likelihoods = likelihoods.double().cpu()
    own = torch.stack([assign(one) for one in likelihoods])
    best = likelihoods.gather(2, own[:, :, None])[..., 0].sum(dim=1)
    table, found = own[best.argmax()][None], 0
    for _ in range(_ROUNDS):
        while len(table) < states:
            regret = best - _scores(likelihoods, table).amax(dim=1)
            worst = regret.argmax()
            if float(regret[worst]) <= 0:
                break
            table = torch.cat((table, own[worst][None]))
        for _ in range(_REREADINGS):
            members = _scores(likelihoods, table).argmax(dim=1)
            held = torch.unique(members)
            table = torch.unique(torch.stack([assign(likelihoods[members == row].sum(dim=0)) for row in held]), dim=0)
        pruned = _prune(likelihoods, table)
        if len(pruned) == states or len(pruned) == found:
            table = pruned
            break
        table, found = pruned, len(pruned)
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
    """The log likelihood of each face (N, C, places) under each layout (K, C): float64 (N, K)."""
    score = torch.zeros(len(likelihoods), len(table), dtype=torch.float64)
    for channel in range(likelihoods.shape[1]):
        score += likelihoods[:, channel][:, table[:, channel]]
    return score
