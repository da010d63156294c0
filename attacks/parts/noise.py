"""What a linear defence adds to its map: how much of it in each channel and place, and how much of that is fresh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.parts.exposure import tamed
from attacks.parts.operators import LinearMaps
from bench.images import to_float

#: Faces at once, and values of what is sent of them.
_CHUNK, _VALUES = 32, 2**24
#: Noise below this share of what is sent is rounding: it is the same everywhere, and never fresh.
ROUNDING = 1e-5
#: How much more elements differ than they would by chance, before they count as different, beside five standard errors
#: of that; and relative spread of channels that matters.
_BEYOND_CHANCE = 1.2
_MATTERS = 0.05
#: The least standard deviation of an element, relative to that of all.
LEAST = 1e-5
#: Noise of fewer dimensions may lie in a space of few, which so many faces show, of so many values in all; they have to
#: be four times as many as its directions, the last of which stands so far out of what is left.
_FEW, _SEEN, _SEEN_VALUES, _TIMES_SEEN, _APART = 256, 1024, 2**26, 4, 1e3
#: The share of what is sent on average, below which a map that is zero is not one that is left out.
_NEXT_TO_ZERO = 1e-7
#: Faces that are sent several times, and times, to see what is drawn anew.
_AGAIN_FACES, _TIMES = 16, 8


@dataclass(frozen=True, slots=True)
class Residuals:
    """What is sent around the exact maps, over the public faces looked at.

    Attributes:
        noise: mean square of a value, float64 (N,), face by face; ``energy`` likewise of what is sent itself.
        square, fourth: float64 (C, h, w), mean second and fourth power of each element over the faces.
        some: float64 (n, C, h, w), what is left of the faces of the first batch.
        fewest: bool (C,), the channels that were there of the face of which fewest were; all where none is left out.
    """

    noise: Tensor
    energy: Tensor
    square: Tensor
    fourth: Tensor
    fewest: Tensor
    some: Tensor

    @property
    def dimensions(self) -> float:
        """Of how many dimensions the noise seems to be: (tr V)^2 / tr V^2 for its covariance V."""
        rows = (self.some - self.some.mean(dim=0)).flatten(1)
        gram = rows @ rows.T
        others = gram.square().sum() - gram.diagonal().square().sum()
        pairs = len(rows) * (len(rows) - 1)
        return float(gram.diagonal().mean().square() * pairs / others.clamp(min=1e-300)) if pairs else math.inf


@torch.no_grad()
def residuals(maps: LinearMaps, faces: Iterator[Tensor], generator: torch.Generator) -> Residuals:
    """Send ``faces``, float32 (n, 3, H, W) batch by batch, and compare with the maps."""
    noise, energy, shown, some = [], [], [], list[Tensor]()
    square, fourth = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for number, target in enumerate(faces):
        for left, sent, _, here in _sent(maps, target, generator):
            some += [] if number else [left]
            shown.append(here)
            noise.append(left.square().flatten(1).mean(dim=1))
            energy.append(sent.square().flatten(1).mean(dim=1))
            square = square.to(left.device) + left.square().sum(dim=0)
            fourth = fourth.to(left.device) + left.pow(4).sum(dim=0)
    count = sum(map(len, noise))
    everywhere = torch.cat(shown)
    fewest = everywhere[everywhere.sum(dim=1).argmin()]
    return Residuals(torch.cat(noise), torch.cat(energy), square / count, fourth / count, fewest, torch.cat(some))


def chunk_of(values: int) -> int:
    """Faces to send at once, of so many values each."""
    return max(1, min(_CHUNK, _VALUES // values))


def _sent(maps: LinearMaps, target: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int, Tensor]]:
    """Operator by operator what is left of faces beside their map, and what was sent of them (float64).

    With the number of the operator, and the channels that are there, bool (n, C): not all zeros.
    """
    everything, drawn = maps.send(target, generator)
    for row in torch.unique(drawn).tolist():
        members = (drawn == row).nonzero().flatten()
        operator, at = maps.operators[row], members.to(target.device)
        sent = everything[at].double()
        expected = operator(target[at].double())
        clean = maps.clean(sent)
        here = sent_channels(clean) | _hardly(expected := expected + operator.offset.to(expected))
        left = clean - expected
        if not bool(here.all()):
            # What was left out of a face says nothing of noise; the other channels stand for it.
            left = left * here / here.double().mean(dim=1, keepdim=True).clamp(min=1 / here.shape[1]).sqrt()
        yield left, sent, row, here[..., 0, 0]


def sent_channels(representations: Tensor) -> Tensor:
    """Of representations (..., C, h, w), bool (..., C, 1, 1): the maps that are not all zeros."""
    return (representations != 0).flatten(-2).any(dim=-1)[..., None, None]


def _hardly(expected: Tensor) -> Tensor:
    """The maps, bool (N, C, 1, 1), that should be next to zero anyhow."""
    energy = expected.square().mean(dim=(2, 3), keepdim=True)
    return energy <= _NEXT_TO_ZERO**2 * energy.mean(dim=1, keepdim=True)


def spread(found: Residuals) -> Tensor | None:
    """Standard deviations, float64 (C, 1, 1) or (C, h, w), relative to their root mean square over all elements.

    None where the noise is the same everywhere, as far as can be told. Channels have their own where they differ; so
    have elements of a channel, drawn towards the channel's by the share of their differences that chance explains
    (empirical Bayes; Efron and Morris, JASA 70, 1975).
    """
    faces, (_, height, width) = len(found.noise), found.square.shape
    if faces < 2 or not torch.equal(tamed(found.noise), found.noise):
        return None
    whole = float(found.square.mean())
    if whole <= ROUNDING**2 * float(found.energy.mean()):
        return None
    # Of a mean of squares the relative sampling variance, whatever the law of the noise.
    square = found.square.clamp(min=LEAST**2 * whole)
    chance = ((found.fourth / square.square() - 1).clamp(min=0) / (faces - 1)).mean(dim=(1, 2))
    own = square.mean(dim=(1, 2))
    by_chance = (own.square() * chance).mean() / (height * width)
    if not _stands_out(own.var(correction=1), by_chance, len(own)) or float(own.std()) <= _MATTERS * whole:
        own = torch.full_like(own, whole)
    logarithm = square.log()
    between = logarithm.flatten(1).var(dim=1, correction=1) if height * width > 1 else torch.zeros_like(own)
    share = (1 - chance / between.clamp(min=1e-300)) * _stands_out(between, chance, height * width)
    if not share.any():
        return None if float(own.max()) == float(own.min()) else _relative(own[:, None, None])
    drawn = (share[:, None, None] * (logarithm - logarithm.mean(dim=(1, 2), keepdim=True))).exp()
    return _relative(drawn * (own / drawn.mean(dim=(1, 2)))[:, None, None])


def as_product(deviations: Tensor, colours: int) -> tuple[Tensor, Tensor, float]:
    """Standard deviations (C, h, w), or broadcastable to it, as nearly as can be a product of two.

    Of float64 (P,) for each of P = ``colours`` and (K,) for each of the K = C / P maps of a colour, of geometric mean
    1, in the colour-major order of a :class:`~defenses.base.SeparableSum`: by least squares in the logarithm. With the
    largest ratio, in logarithm, of what they should be to what they are.
    """
    logarithm = deviations.log()
    by_channel = logarithm.mean(dim=(1, 2)).view(colours, -1)
    of_colour = by_channel.mean(dim=1)
    of_map = by_channel.mean(dim=0) - by_channel.mean()
    fitted = (of_colour[:, None] + of_map).flatten()[:, None, None]
    return of_colour.exp(), of_map.exp(), float((logarithm - fitted).abs().max())


@torch.no_grad()
def few_directions(
    maps: LinearMaps, found: Residuals, faces: Tensor, fresh: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, float] | None:
    """Noise that lies in a space of few dimensions, as where it is added before something is put together again.

    Principal components of what is left of ``faces``, uint8 (M, 3, H, W), which are sent again and again if all of the
    noise is ``fresh``, and otherwise once each, as the same faces would leave the same: orthonormal directions float64
    (r, C, h, w), the standard deviation in each, (r,), and that in any other direction. None where the noise is of no
    such kind.
    """
    values = found.square.numel()
    count = min(_SEEN, _SEEN_VALUES // values)
    count = count if fresh else min(count, len(faces))
    if found.dimensions > min(_FEW, count / _TIMES_SEEN, values / _TIMES_SEEN):
        return None
    rows = []
    if fresh:
        drawn = torch.randint(len(faces), (count,), generator=generator)
    else:
        drawn = torch.randperm(len(faces), generator=generator)[:count]
    for index in drawn.split(chunk_of(values)):
        sample = to_float(faces[index.to(faces.device)].to(found.square.device))
        rows += [left for left, *_ in _sent(maps, sample, generator)]
    flat = torch.cat(rows).flatten(1)
    flat -= flat.mean(dim=0)
    energy, vectors = torch.linalg.eigh(flat @ flat.T)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    most = count // _TIMES_SEEN
    drops = energy[:most] / energy[1 : most + 1].clamp(min=1e-15 * float(energy[0]))
    rank = int(drops.argmax()) + 1
    if float(drops[rank - 1]) < _APART:
        return None
    directions = torch.linalg.qr((vectors[:, :rank].T @ flat).T).Q.T
    deviations = ((flat @ directions.T).square().sum(dim=0) / (count - 1)).sqrt()
    rest = math.sqrt(float(energy[rank:].sum()) / (count - 1) / max(1, values - rank))
    return directions.reshape(rank, *found.square.shape), deviations, rest


def _stands_out(between: Tensor, chance: Tensor, count: int) -> Tensor:
    return torch.gt(between, (_BEYOND_CHANCE + 5 * math.sqrt(2 / max(1, count - 1))) * chance)


def _relative(variance: Tensor) -> Tensor:
    return (variance / variance.mean()).sqrt().clamp(min=LEAST)


@torch.no_grad()
def fresh_share(maps: LinearMaps, faces: Tensor, generator: torch.Generator) -> float:
    """The share of the noise's variance that is drawn anew whenever a face is sent in the same state.

    From ``faces``, float32 (n, 3, H, W), sent several times each. Zero where no state came up twice.
    """
    both = common = 0.0
    for face in faces[:_AGAIN_FACES].split(1):
        held: dict[int, list[Tensor]] = {}
        for _ in range(_TIMES):
            for left, _, row, _ in _sent(maps, face, generator):
                held.setdefault(row, []).append(left.flatten())
        for together in held.values():
            rows = torch.stack(together)
            pairs = len(rows) * (len(rows) - 1)
            alone = float(rows.square().sum())
            common += float(rows.sum(dim=0).square().sum()) - alone
            both += alone / len(rows) * pairs
    return min(1.0, max(0.0, 1 - common / both)) if both > 0 else 0.0


@torch.no_grad()
def not_shared(maps: LinearMaps, faces: Tensor, generator: torch.Generator) -> float:
    """Standard deviation of what is left of ``faces`` (n, 3, H, W), n > 1, sent in one batch, beside what all share."""
    left = torch.cat([left for left, *_ in _sent(maps, faces, generator)])
    return float((left - left.mean(dim=0)).square().mean().sqrt()) * math.sqrt(len(left) / (len(left) - 1))
