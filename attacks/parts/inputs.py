"""What a trained attack shows its network of a representation, where the representation itself would tell it little.

A defence can bury a face without hiding it: under an offset or a gain of each face's own, in a channel order that
changes, in bits below those of a carrier. Any attacker who plots what was sent sees through that; a network fed with
values normalised by their spread over all faces does not. :class:`Inputs` tries such *views*, one upon another, on
held-out public faces, and keeps those that bring the face to light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import AttackOptions
from attacks.parts.encoder import channel_statistics
from bench.randomness import derived

RAW, AUTO = "raw", "auto"
#: Relative to a whole scale, what counts as nothing.
_TINY = 1e-12


class View(nn.Module):
    """A deterministic map of representations (N, C, h, w) to (N, C', h, w), face by face.

    Attributes:
        name: as options and results call it.
        mixed_in: public pictures among what is sent, as the mechanism has them (:attr:`Defense.mixed_in`).
    """

    name: ClassVar[str]
    mixed_in: tuple[Tensor, int] | None = None

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        """Set the buffers from representations (n, C, h, w) of public faces, and from others of the same faces.

        Returns:
            False where there is nothing to undo.
        """
        return True

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation, (N, C, 1, 1), of each map of (N, C, h, w), and the maps standardised by them."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    centred = x - mean
    rest = centred.mean(dim=(2, 3), keepdim=True)  # what rounding left of a large mean
    mean, centred = mean + rest, centred - rest
    largest = centred.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-30)
    std = (largest * (centred / largest).square().mean(dim=(2, 3), keepdim=True).sqrt()).clamp(min=1e-30)
    return mean, std, centred / std


class Levelled(View):
    """Without the few directions in which representations differ most, where these dwarf all others.

    A random offset of each map, row or column, a ramp, a mixture of some patterns: whatever is added to a face from a
    space of few dimensions, at a size that drowns it, makes up the leading principal components, and the spectrum
    drops behind them. Natural pictures have no such drop. The components are those of the differences between two
    representations of one face, in which the face itself is not, unless these are hardly different (a defence can draw
    from the face itself); then those of all representations. Row i of ``directions``, float32 (r, C h w), is one.
    """

    name = "levelled"
    #: Share of the variance that the directions hold, and how far the spectrum drops behind them, at least.
    least_share, least_drop = 0.9, 10.0
    #: Values of the sample that are decomposed, at most; below so many faces nothing is.
    most_values, fewest_faces = 2**25, 64

    directions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(0, 1))

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        count = min(len(sample), self.most_values // sample[0].numel())
        if count < self.fewest_faces:
            return False
        flat = sample[:count].flatten(1).double()
        changes, flat = flat - again[:count].flatten(1), flat - flat.mean(dim=0)
        if float(changes.square().sum()) > float(flat.square().sum()):  # half of the variance is no face's
            flat = changes
        values, vectors = torch.linalg.eigh(flat @ flat.T)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        share = values.cumsum(0) / values.sum().clamp(min=_TINY)
        some = min((3 * len(flat)) // 4, flat.shape[1] // 2)  # not the drop at the end of the sample, or of the space
        drops = values[:some] / values[1 : some + 1].clamp(min=1e-15 * float(values[0]) + _TINY)
        drops[share[:some] < self.least_share] = 0
        count = int(drops.argmax()) + 1
        if float(drops[count - 1]) < self.least_drop:
            return False
        directions = flat.T @ vectors[:, :count]
        self.directions = torch.linalg.qr(directions)[0].T.to(sample.device, torch.float32).contiguous()
        return True

    def forward(self, x: Tensor) -> Tensor:
        basis, flat = self.directions.double(), x.flatten(1).double()
        for _ in range(2):  # the second time for what the rounding of the basis has left
            flat = flat - (flat @ basis.T) @ basis
        return flat.view_as(x).to(x.dtype)


class Scaled(View):
    """Divided by the face's own root mean square, whose logarithm joins as a constant map."""

    name = "scaled"

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
        size = largest * (x / largest).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return torch.cat((x / size.clamp(min=1e-30), size.clamp(min=1e-30).log().expand_as(x[:, :1])), dim=1)


class Standardised(View):
    """Each map with mean 0 and variance 1; what it had joins as constant maps, its scale by the logarithm."""

    name = "standardised"

    def forward(self, x: Tensor) -> Tensor:
        mean, std, maps = _standardised(x)
        return torch.cat((maps, (mean / std).asinh().expand_as(x), std.log().expand_as(x)), dim=1)


class Oriented(View):
    """Each map with the sign under which it is most like all others; mean and sign join as constant maps.

    Aligned faces have so much in common that a negative is told from a positive. ``template``, float32 (h w,), is the
    leading direction of standardised maps, whatever their signs.
    """

    name = "oriented"
    #: Maps of the sample that the template is made of, at most.
    most_maps = 256

    template: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("template", torch.zeros(1))

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        maps = sample.flatten(0, 1)
        maps = _standardised(maps[None, :: max(1, len(maps) // self.most_maps)])[2][0].flatten(1)
        template = maps[0] / maps[0].norm().clamp(min=_TINY)
        for _ in range(16):  # power iteration
            template = (maps @ template) @ maps
            template = template / template.norm().clamp(min=_TINY)
        self.template = template.to(torch.float32)
        return True

    def forward(self, x: Tensor) -> Tensor:
        mean, std, maps = _standardised(x)
        side = torch.where(maps.flatten(2) @ self.template < 0, -1.0, 1.0)[..., None, None].to(x.dtype)
        return torch.cat((maps * std * side, (mean * side).expand_as(x), side.expand_as(x)), dim=1)


class Logarithmic(View):
    """sign(x) log(1 + |x| / s) with s, float32 (C,), a small magnitude of each channel: for values of heavy tails."""

    name = "log"
    #: Of each channel that are looked at.
    most_values = 2**14

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        magnitudes = sample.transpose(0, 1).flatten(1)
        some = magnitudes[:, :: max(1, magnitudes.shape[1] // self.most_values)].abs().sort(dim=1).values
        scale = some[:, some.shape[1] // 20]
        # Of channels that are mostly zero, something below what else they hold.
        scale = torch.where(scale > 0, scale, 1e-3 * some[:, -1])
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return True

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() * (x.abs() / self.scale[:, None, None]).log1p()


class LowOrder(View):
    """What is left of each value below a step that all values are nearly multiples of, but for a rest.

    A picture may lie in the bits under those of a carrier. Between neighbouring pixels the rest changes little, so
    that differences of neighbours cluster at multiples of the step, which is how it is found: of powers of two and of
    ten, of 8-bit steps, and of the first gap between clusters, the one at which differences that reach over steps are
    closest to whole steps.

    Attributes:
        step: float64 (), the step.
        cut: float64 (), in [0, 1), where in a step it is cut: where hardly any value lies.
    """

    name = "low-order"
    #: Mean cosine of 2 pi d / step over differences d beyond half a step: 1 where all are whole steps, 0 by chance.
    least_match = 0.5
    #: Differences looked at, and of how many bins the cut is chosen.
    most_differences, most_values, bins = 2**14, 2**16, 64
    #: Spread of the rest, relative to the largest value, below which it is rounding of float32; and share of the
    #: differences that reach over a step, at least.
    least_rest, least_wrapped = 2.5e-7, 0.01
    #: How much coarser than a step with nothing below it another one has to be.
    apart = 8

    step: Tensor
    cut: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.ones((), dtype=torch.float64))
        self.register_buffer("cut", torch.zeros((), dtype=torch.float64))

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        x = sample.double()
        differences = (x[..., 1:] - x[..., :-1]).abs().flatten()
        differences = differences[:: max(1, len(differences) // self.most_differences)]
        given = self._candidates(differences)
        steps = {*given, *(self._refined(differences, step) for step in given)}
        values, least = x.flatten()[:: max(1, x.numel() // self.most_values)], self.least_rest * float(x.abs().max())
        empty = 0.0
        for match, step in sorted(((self._match(differences, step), step) for step in steps), reverse=True):
            if match < self.least_match:
                break
            if step < self.apart * empty:
                continue
            cut = self._quietest(torch.remainder(values / step, 1))
            # Pictures of 8 bits have steps of their own, nothing below them, and nearly match steps of like size.
            if float(torch.remainder(values / step - cut, 1).std()) * step > least:
                self.step.fill_(step)
                self.cut.fill_(cut)
                return True
            empty = max(empty, step)
        return False

    def _quietest(self, phase: Tensor) -> float:
        """The middle of the longest stretch of a step, as a share of it, in which fewest of the values lie."""
        counts = torch.histc(phase, self.bins, 0, 1)
        around = functional.avg_pool1d(torch.cat((counts, counts, counts))[None], 9, 1, 4)[0, self.bins : 2 * self.bins]
        return ((_longest_run(around <= around.min()) + 0.5) / self.bins) % 1

    def _candidates(self, differences: Tensor) -> list[float]:
        powers = [2.0**k for k in range(-12, 9)] + [10.0**k for k in range(-4, 4)] + [2.0**k / 255 for k in range(8)]
        ordered = differences.sort().values
        gaps = ordered[1:] - ordered[:-1]
        for share in (0.25, 0.5):  # clusters far out are sparse: the first wide gap, not the widest
            behind = int((gaps >= share * gaps.max()).int().argmax()) + 1
            powers.append(float(ordered[behind : behind + max(1, len(ordered) // 200)].median()))
        return powers

    def _refined(self, differences: Tensor, step: float) -> float:
        """The step by regression on what it is a few times in, then more: carriers are large, and errors add up."""
        for reach in (4, 16, 64, 256, 1024):
            whole = (differences / step).round()
            near = (whole > 0) & (whole <= reach)
            if near.any():
                step = float((whole[near] * differences[near]).sum() / whole[near].square().sum())
        return step

    def _match(self, differences: Tensor, step: float) -> float:
        over = differences[differences > step / 2]
        if len(over) < self.least_wrapped * len(differences):
            return 0.0
        return float((2 * math.pi * over / step).cos().mean())

    def forward(self, x: Tensor) -> Tensor:
        return torch.remainder(x.double() / self.step - self.cut, 1).to(x.dtype)


def _longest_run(flags: Tensor) -> int:
    """The number of the middle of the longest run of true ``flags``, around a circle."""
    best, length, count = 0, 0, 0
    for number, flag in enumerate([*flags.tolist(), *flags.tolist()]):
        count = count + 1 if flag else 0
        if count > length:
            best, length = number, count
    return (best - min(length, len(flags)) // 2) % len(flags)


class Sorted(View):
    """The channels by falling energy: what a defence that permutes them all cannot hide."""

    name = "sorted"
    #: 1, or the colours within which channels are sorted; representations are colour-major.
    colours: ClassVar[int] = 1

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        return sample.shape[1] % self.colours == 0 and sample.shape[1] > self.colours

    def forward(self, x: Tensor) -> Tensor:
        maps = x.unflatten(1, (self.colours, -1))
        order = maps.square().mean(dim=(3, 4)).argsort(dim=2, descending=True, stable=True)
        ranked: Tensor = maps.gather(2, order[..., None, None].expand_as(maps)).flatten(1, 2)
        return ranked


class SortedWithinColours(Sorted):
    """The channels of each third by falling energy."""

    name = "sorted-colours"
    colours = 3


class Pooled(View):
    """Per pixel the mean and the mean magnitude over the channels of each third (of all, where 3 divides them not)."""

    name = "pooled"

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        return sample.shape[1] > 3

    def forward(self, x: Tensor) -> Tensor:
        maps = x.unflatten(1, (3 if x.shape[1] % 3 == 0 else 1, -1))
        return torch.cat((maps.mean(dim=2), maps.abs().mean(dim=2)), dim=1)


class Magnitude(View):
    """Magnitudes, where a value's sign is another one each time that a face is sent."""

    name = "magnitude"
    #: How far from one half the share of values may be that keep their sign.
    by_chance = 0.05

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        count = min(len(sample), len(again))
        kept = (sample[:count] * again[:count] > 0).float().mean()
        return abs(float(kept) - 0.5) < self.by_chance

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Unmixed(Magnitude):
    """What is left of magnitudes of a mixture once the public pictures in it are found and taken out.

    A face among pictures of a pool that the attacker has, under random signs (Carlini et al., *Is Private Learning
    Possible with Instance Encoding?*, IEEE S&P 2021). The pool is searched by matching pursuit on details, of which
    faces have fewer in common than of coarse features: the first picture by its magnitudes; each further one by what is
    left over under the signs of the mixture so far, the mean face standing for the face. Coefficients are those of
    least squares, and sum to 1 with the face's.

    Shows the magnitudes, the public part, the face that remains under the likeliest signs, and its coefficient.
    ``level``, float32 (C, h, w), is the mean magnitude of what is sent.
    """

    name = "unmixed"
    #: Side of the window whose mean is no detail, turns of signs and coefficients, and the face's least coefficient.
    window, turns, least = 5, 3, 0.05

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(1))
        self._pool: tuple[Tensor, ...] = ()

    def measure(self, sample: Tensor, again: Tensor) -> bool:
        if self.mixed_in is None or self.mixed_in[0].shape[1:] != sample.shape[1:]:
            return False
        self.level = sample.abs().mean(dim=0)
        return super().measure(sample, again)

    def _details(self, maps: Tensor) -> Tensor:
        """(N, C h w), without the means of windows."""
        around = functional.avg_pool2d(maps, self.window, 1, self.window // 2, count_include_pad=False)
        return (maps - around).flatten(1)

    def _searched(self, device: torch.device) -> tuple[Tensor, ...]:
        """The pool, its mean, and its details: unit rows of magnitudes, and of departures from the mean."""
        if not self._pool or self._pool[0].device != device:
            assert self.mixed_in is not None
            pool = self.mixed_in[0].to(device, torch.float32)
            mean = pool.mean(dim=0)
            magnitudes = self._details(pool.abs() - pool.abs().mean(dim=0))
            self._pool = pool, mean, functional.normalize(magnitudes, dim=1), self._details(pool - mean)
        return self._pool

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a search and systems of equations: not for bfloat16
            return self._shown(x.abs().float()).to(x.dtype)

    def _shown(self, z: Tensor) -> Tensor:
        assert self.mixed_in is not None
        _, mean, magnitudes, departures = self._searched(z.device)
        chosen = (self._details(z - self.level) @ magnitudes.T).argmax(dim=1, keepdim=True)
        lengths = departures.norm(dim=1).clamp(min=_TINY)
        public, weight = self._fitted(z, chosen)
        for _ in range(self.mixed_in[1] - 1):
            left = self._details((z * _sign(public + weight * mean) - public) - weight * mean)
            scores = (left @ departures.T) / lengths
            scores.scatter_(1, chosen, -torch.inf)
            chosen = torch.cat((chosen, scores.argmax(dim=1, keepdim=True)), dim=1)
            public, weight = self._fitted(z, chosen)
        face = (z * _sign(public + weight * mean) - public) / weight
        return torch.cat((z, public, face, weight.expand_as(z[:, :1])), dim=1)

    def _fitted(self, z: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The public part (N, C, h, w) of magnitudes with the pictures ``chosen``, (N, m), and the face's share."""
        pool, mean, _, departures = self._searched(z.device)
        details, pictures = departures[chosen], pool[chosen]  # (N, m, D), (N, m, C, h, w)
        gram = details @ details.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-4).add_(_TINY)
        weights = z.new_full((*chosen.shape, 1), 1 / (chosen.shape[1] + 1))
        for _ in range(self.turns):
            public, weight = self._parts(pictures, weights)
            signed = self._details(z * _sign(public + weight * mean) - mean)
            weights = torch.linalg.solve(gram, details @ signed[:, :, None]).clamp(0, 1)
        return self._parts(pictures, weights)

    def _parts(self, pictures: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        share = (1 - weights.sum(dim=1)).clamp(min=self.least)[..., None, None]
        return (weights[..., None, None] * pictures).sum(dim=1), share


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)


VIEWS: Mapping[str, type[View]] = {
    view.name: view
    for view in (
        Levelled,
        Scaled,
        Standardised,
        Oriented,
        Logarithmic,
        LowOrder,
        Sorted,
        SortedWithinColours,
        Pooled,
        Magnitude,
        Unmixed,
    )
}


def names_of(text: str) -> list[str]:
    """The views that ``text`` names, the first to be applied first: ``log+standardised``; none for ``raw``.

    Raises:
        ValueError: an unknown one.
    """
    names = [] if text == RAW else text.split("+")
    if unknown := [name for name in names if name not in VIEWS]:
        raise ValueError(f"no view {unknown[0]!r}: choose from raw, {', '.join(VIEWS)}, or several joined by +")
    return names


class InputOptions(AttackOptions):
    """Options of attacks whose network is shown views of a representation."""

    input: str = Field(
        AUTO,
        description=f"What the network is shown: raw, or views of it ({', '.join(VIEWS)}; several, joined by +, one "
        "upon the other). auto tries them on held-out public faces and takes raw unless one brings out more of the "
        "face. Where views are named, states are not read.",
    )

    @field_validator("input")
    @classmethod
    def _known(cls, text: str) -> str:
        if text != AUTO:
            names_of(text)
        return text


@dataclass(frozen=True)
class Example:
    """Public faces as they are, float (n, 3, H, W), and as they are sent, (n, C, h, w), at first and ``again``."""

    faces: Tensor
    sent: Tensor
    again: Callable[[], Tensor]


class Inputs(nn.Module):
    """Views, one upon the other, chosen on public faces; stored with the weights.

    What comes out is kept within limits that lie far beyond what nearly all public faces show: a face in hundreds, sent
    at a scale of its own, spoils neither statistics nor training.

    Attributes:
        views: in the order in which they are applied; none leaves representations as they are.
        code: int64 (most,) buffer, the numbers of the views in :data:`VIEWS`, -1 behind the last.
        centre, reach: float32 (C',) buffers, the middle of each channel and how far from there values may lie; (1,) and
            infinite where nothing was measured.
    """

    #: Views one upon the other, at most.
    most = 3
    #: What a view has to gain, as a share of the floor: less is what a network finds out by itself.
    least_gain = 0.05
    #: A representation that shows the face so well, as a share of the floor, needs no view.
    plain = 0.2
    #: Faces that the linear convolution is fitted to, at most; a view is measured on all that are given.
    most_faces = 160
    #: Share of the faces that a limit is measured by, and the multiple of their reach that it grants.
    usual, leeway = 0.97, 4.0

    code: Tensor
    centre: Tensor
    reach: Tensor

    def __init__(self, mixed_in: tuple[Tensor, int] | None = None) -> None:
        """``mixed_in`` is the mechanism's (:attr:`defenses.base.Defense.mixed_in`)."""
        super().__init__()
        self._mixed_in = mixed_in
        self.views = nn.ModuleList()
        self.register_buffer("code", torch.full((self.most,), -1))
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("reach", torch.full((1,), torch.inf))

    @property
    def name(self) -> str:
        """Of the views, as options and results call them."""
        return "+".join(str(view.name) for view in self.views) or RAW

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C', h, w)."""
        for view in self.views:
            x = view(x)
        return _limited(x, (self.centre, self.reach))

    def _made(self, kind: type[View]) -> View:
        view = kind()
        view.mixed_in = self._mixed_in
        return view

    def _set(self, views: Sequence[View], reach: Tensor) -> None:
        self.views = nn.ModuleList(views)
        numbers = [list(VIEWS).index(view.name) for view in views]
        self.code.copy_(torch.tensor(numbers + [-1] * (self.most - len(numbers))))
        self.centre, self.reach = torch.zeros_like(reach), reach

    @torch.no_grad()
    def limit(self, sample: Tensor) -> None:
        """Set ``centre`` and ``reach`` from representations (n, C, h, w) of public faces."""
        for view in self.views:
            sample = view(sample)
        self.centre, self.reach = self._limits(sample)

    def _limits(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        centre = shown.mean(dim=(2, 3)).median(dim=0).values
        furthest = (shown - centre[:, None, None]).abs().amax(dim=(2, 3)).sort(dim=0).values
        reach = self.leeway * furthest[int(self.usual * (len(furthest) - 1))]
        return centre, torch.where(reach > 0, reach, torch.inf)

    @torch.no_grad()
    def pin(self, names: Sequence[str], known: Example) -> None:
        """Use the views of these names, measured on ``known`` faces.

        Raises:
            ValueError: too many, or one that has nothing to undo here.
        """
        if len(names) > self.most:
            raise ValueError(f"input: at most {self.most} views one upon the other, got {len(names)}")
        views: list[View] = []
        sample, again = known.sent, known.again() if names else known.sent
        for name in names:
            view = self._made(VIEWS[name]).to(sample.device)
            if not view.measure(sample, again):
                raise ValueError(f"input: the view {name!r} finds nothing to undo in these representations")
            views.append(view)
            sample, again = view(sample), view(again)
        self._set(views, self.reach.new_full((1,), torch.inf))

    def restore(self, weights: Mapping[str, Tensor], prefix: str) -> bool:
        """Make the views of stored ``weights``, whose names begin with ``prefix``, so that these can be loaded.

        Weights of something else are left for the loading to refuse.

        Returns:
            Whether there are others now than before.
        """
        numbers, reach = (weights.get(prefix + name) for name in ("code", "reach"))
        if numbers is None or reach is None:
            return False
        changed = not torch.equal(numbers.cpu(), self.code.cpu())
        views = [self._made(list(VIEWS.values())[number]) for number in numbers.tolist() if number >= 0]
        for number, view in enumerate(views):
            for name, buffer in list(view.named_buffers()):
                stored = weights[f"{prefix}views.{number}.{name}"]
                setattr(view, name, torch.empty_like(stored, dtype=buffer.dtype, device=self.code.device))
        self._set(views, torch.empty_like(reach, device=self.code.device))
        return changed

    @torch.no_grad()
    def choose(self, known: Example, unseen: Example, seed: int) -> dict[str, float]:
        """Climb the ladder: as long as a view gains enough on ``unseen`` faces, of other people, add the best one.

        Each is tried by a small linear convolution from what it shows to the face, fitted to the ``known`` faces in
        closed form: what a network sees at once, at a hundredth of its training.

        Returns:
            The mean absolute error on the unseen faces under each input tried, by its name.
        """
        few = known.faces[: self.most_faces]
        probe = _Probe(few, unseen.faces, seed)
        shown, other, sample, views = known.sent[: len(few)], unseen.sent, known.sent, list[View]()

        def loss_of(shown: Tensor, other: Tensor) -> float:
            limits = self._limits(shown)
            return probe(_limited(shown, limits), _limited(other, limits))

        losses = {RAW: (best := loss_of(shown, other))}
        again = None
        while best > self.plain * probe.floor and len(views) < self.most:
            again = known.again() if again is None else again
            tried: list[tuple[float, View, Tensor, Tensor]] = []
            for kind in VIEWS.values():
                view = self._made(kind).to(shown.device)
                if any(isinstance(earlier, kind) for earlier in views) or not view.measure(sample, again):
                    continue
                seen, unknown = view(shown), view(other)
                if not (torch.isfinite(seen).all() and torch.isfinite(unknown).all()):
                    continue
                loss = loss_of(seen, unknown)
                losses["+".join([*(str(v.name) for v in views), kind.name])] = loss
                tried.append((loss, view, seen, unknown))
            if not tried:
                break
            loss, view, seen, unknown = min(tried, key=lambda entry: entry[0])
            if best - loss < self.least_gain * probe.floor:
                break
            best, shown, other, sample, again = loss, seen, unknown, seen, view(again[: len(seen)])
            views.append(view)
        self._set(views, self.reach.new_full((1,), torch.inf))
        return losses


def _limited(x: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    centre, reach = (limit[:, None, None] for limit in limits)
    return torch.minimum(torch.maximum(x, centre - reach), centre + reach)


class _Probe:
    """How well a linear convolution sees faces in what it is shown, on people it does not know.

    Attributes:
        floor: the error of the mean face, clipped to [0, 1] as everything else.
    """

    #: Pixels of each face that are fitted and compared.
    pixels = 64
    #: Channels up to which the convolution is 3x3; above it looks at single pixels.
    most_channels = 32
    #: Of the ridge, relative to a feature of variance 1: what is weaker, a network does not see either.
    ridge = 1e-4

    def __init__(self, known: Tensor, unseen: Tensor, seed: int) -> None:
        size = known.shape[-1]
        at = torch.randperm(size * size, generator=derived(seed, "pixels"))[: self.pixels].to(known.device)
        self.size, self.rows, self.columns = size, at // size, at % size
        self.mean = known.mean(dim=0)[:, self.rows, self.columns].T.double()
        self.known, self.unseen = self._targets(known), self._targets(unseen)
        self.floor = float(self._error(self.mean))

    def _targets(self, faces: Tensor) -> Tensor:
        """The pixels of faces that are looked at, float64 (n, P, 3)."""
        return faces[:, :, self.rows, self.columns].transpose(1, 2).double()

    def _error(self, answer: Tensor) -> Tensor:
        return (answer.clamp(0, 1) - self.unseen).abs().mean()

    def _features(self, maps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Float64 (n, P, F): the surroundings of each pixel, normalised as a network's input is, and its place."""
        if maps.shape[-2:] != (self.size, self.size):
            maps = functional.interpolate(maps, (self.size, self.size), mode="bilinear", align_corners=False)
        reach = 1 if maps.shape[1] <= self.most_channels else 0
        maps = functional.pad(maps, (reach,) * 4, mode="replicate")
        around = [
            (maps[:, :, self.rows + row, self.columns + column].double() - mean) / std
            for row in range(2 * reach + 1)
            for column in range(2 * reach + 1)
        ]
        features = torch.cat(around, dim=1).transpose(1, 2)
        # Faces are aligned: what to expect in a place, less what all of them have, joins; so does a constant.
        place = torch.cat((self.mean - self.mean.mean(dim=0), torch.ones_like(self.mean[:, :1])), dim=1)
        return torch.cat((features, place.expand(len(maps), -1, -1)), dim=2)

    def __call__(self, known: Tensor, unseen: Tensor) -> float:
        """The mean absolute error on the unseen faces, of what is shown of both: (n, C, h, w)."""
        statistics = channel_statistics([(known, None)], known.shape[1])
        mean, std = (statistic[:, None].to(known.device) for statistic in statistics)
        features = self._features(known, mean, std).flatten(0, 1)
        gram = features.T @ features / len(features)
        gram.diagonal().add_(self.ridge)
        weights = torch.linalg.solve(gram, features.T @ self.known.flatten(0, 1) / len(features))
        return float(self._error(self._features(unseen, mean, std) @ weights))
