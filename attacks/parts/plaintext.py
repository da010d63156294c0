"""Known plaintext: a fixed secret map, estimated from what the client itself sends of chosen pictures.

The attacker is a client as well, and chooses what it is shown. The pixels of random black and white pictures are
independent: what correlates with a value that is sent, or how much of its energy lies in a tile, a window, a row, tells
which pixels it depends on, and ridge regression on these alone (Hoerl and Kennard, Technometrics 12(1), 1970) how. What
depends on more is asked with one pixel lit at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, Knowledge, ProtectionQuery
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense, Shape

#: Pictures that are made, and asked about, at once.
_CHUNK = 64
#: Black and white pictures that single pixels are told apart by, and at most those that larger supports are found by.
_CODES = 128
_DETECTION = 512
#: Black pictures, and pictures of noise sent twice, that show what is drawn for each query.
_REPEATS = 8
#: Pictures of all levels of grey that a fit is tried on, and faces that the whole map is.
_TRIED = 128
#: The most pixels of a face that one value is regressed on: those of a tile or a window, or of a whole small face.
_LARGEST_SUPPORT = 400
_LARGEST_FACE = 3200
#: Of what a value varies, the share that a fit may leave unexplained to be exact, beside the noise and what that seems
#: to be by chance; and the share that a support has to seem to explain to be tried.
_EXACT = 1e-4
_OF_NOISE = 1.0
#: What a map may leave over of what another, on fewer pixels, left over beside the noise, to take its place.
_BETTER = 0.8
_PROMISING = 0.5
#: Rounding of float32, as a share of the largest value.
_ROUNDING = 2.0**-22
#: More noise than this many times the signal drowns the map; so many times its noise black pictures may be blamed for.
_DROWNED = 100.0
_STATE = 4.0
#: Non-zero entries that a map may have; and the share of all from which on it is held dense.
_MOST_ENTRIES = 2**26
_DENSE = 0.05
#: Times that one picture is sent to see the states there are, and at most so many of them; how far pictures depart from
#: that one, whose answers tell the state; and turns, for each state, in which all of them have to be seen.
_PILOTS = 512
_MOST_STATES = 64
_DEPARTURE = 0.1
_TURNS = 30
#: The share of the values that a kind of map has to be true of to be named.
_RARE = 0.01
#: Correlations at once.
_VALUES = 2**24
#: The least share of the variance of faces' representations, beside their noise, that a linear map explains.
_LINEAR = 0.9


@dataclass(frozen=True, slots=True)
class _Family:
    """Supports that a value may have: windows of all three colours, or of each by itself.

    Attributes:
        name: what a map of such values is called.
        window: rows and columns of pixels.
        stride: from one window to the next, rows and columns; windows are centred on pixels where it is one.
        colours: whether a window is of all colours.
    """

    name: str
    window: tuple[int, int]
    stride: tuple[int, int]
    colours: bool = True

    @property
    def size(self) -> int:
        """Pixels of a window, colours counted."""
        return math.prod(self.window) * (3 if self.colours else 1)

    @property
    def _padding(self) -> tuple[int, int]:
        return (self.window[0] // 2, self.window[1] // 2) if self.stride == (1, 1) else (0, 0)

    def pool(self, energy: Tensor) -> Tensor:
        """The sum of ``energy``, (B, 3, H, H), in each window: (B, G)."""
        maps = energy.sum(dim=1, keepdim=True) if self.colours else energy
        if self.window == (1, 1):
            return maps.flatten(1)
        pooled = functional.avg_pool2d(maps, self.window, self.stride, self._padding, divisor_override=1)
        return pooled.flatten(1)

    def supports(self, size: int) -> Tensor:
        """The pixels of each window among the 3 H^2 of a face, int64 (G, S); -1 beyond the edge."""
        numbers = torch.arange(3.0 * size**2, dtype=torch.float64).view(1, 3, size, size) + 1  # 0 is beyond the edge
        columns = functional.unfold(numbers, self.window, padding=self._padding, stride=self.stride)
        if not self.colours:
            columns = columns.view(3, -1, columns.shape[-1]).movedim(0, 1).flatten(1)[None]
        return columns[0].T.long() - 1


def _families(size: int, noisy: bool) -> list[_Family]:
    """Smaller supports first."""
    tiles = [side for side in range(2, size // 2 + 1) if size % side == 0]
    families = [
        _Family("mixtures of the colours of a pixel", (1, 1), (1, 1)),
        *(_Family(f"mixtures within tiles of {side} x {side}", (side, side), (side, side)) for side in tiles),
        *(_Family(f"windows of {side} x {side}", (side, side), (1, 1)) for side in (3, 5, 7)),
        _Family("mixtures within rows", (1, size), (1, size)),
        _Family("mixtures within columns", (size, 1), (size, 1)),
    ]
    small = [family for family in families if family.size <= _LARGEST_SUPPORT]
    # One pixel at a time is as good, and cheaper, where nothing blurs it.
    whole = _Family("a full mixture", (size, size), (size, size))
    return sorted(small, key=lambda family: family.size) + [whole] * (noisy and whole.size <= _LARGEST_FACE)


class EstimatedMap(nn.Module):
    """``z = A x + offset`` with a sparse A: a :class:`~defenses.base.LinearOperator` for faces of ``size`` pixels.

    The maps of several states stand behind one another, as channels of one (:meth:`part`).

    Attributes:
        rows, columns, values: int64, int64 and float64 (E,) buffers, the non-zero entries of A, (C h w) x (3 H^2).
        offset: float64 (C, h, w) buffer.
        noise: float64 () buffer, root mean square of z - A x - offset on faces that the estimate was not made of.
        found: bool () buffer, whether there is such a map.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    offset: Tensor
    noise: Tensor
    found: Tensor

    def __init__(self, size: int, shape: Shape) -> None:
        super().__init__()
        self.size = size
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("noise", torch.zeros((), dtype=torch.float64))
        self.register_buffer("found", torch.zeros((), dtype=torch.bool))
        self._matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def shape(self) -> Shape:
        """(C, h, w) of what is sent; C times the states, where there are several."""
        channels, height, width = self.offset.shape
        return channels, height, width

    def set_map(self, rows: Tensor, columns: Tensor, values: Tensor, offset: Tensor) -> None:
        """Replace A and the offset."""
        self.rows, self.columns, self.values, self.offset = rows, columns, values, offset
        self._matrices.clear()

    def part(self, number: int, channels: int) -> EstimatedMap:
        """The map of a state, of so many channels."""
        offset = self.offset[number * channels : (number + 1) * channels]
        first = number * offset.numel()
        mine = (self.rows >= first) & (self.rows < first + offset.numel())
        part = EstimatedMap(self.size, (channels, *self.shape[1:]))
        part.set_map(self.rows[mine] - first, self.columns[mine], self.values[mine], offset)
        return part

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many entries and states there are is known to those who have estimated them.
        names, device = ("rows", "columns", "values", "offset"), self.values.device
        self.set_map(*(state_dict[f"{prefix}{name}"].to(device).clone() for name in names))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _matrix(self, like: Tensor) -> Tensor:
        """A, in the type and on the device of ``like``."""
        key = like.dtype, like.device
        if key not in self._matrices:
            places = torch.stack((self.rows, self.columns)).to(like.device)
            sizes = math.prod(self.shape), 3 * self.size**2
            matrix = torch.sparse_coo_tensor(places, self.values.to(like), sizes, check_invariants=False).coalesce()
            self._matrices[key] = matrix.to_dense() if len(self.values) > _DENSE * math.prod(sizes) else matrix
        return self._matrices[key]

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x``: (N, 3, H, H) to (N, C, h, w), dtype and device kept."""
        with torch.autocast(faces.device.type, enabled=False):
            return (self._matrix(faces) @ faces.flatten(1).T).T.reshape(len(faces), *self.shape)

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, C, h, w) to (N, 3, H, H)."""
        with torch.autocast(representation.device.type, enabled=False):
            faces = (self._matrix(representation).T @ representation.flatten(1).T).T
        return faces.reshape(len(representation), 3, self.size, self.size)


class Imitation(Defense):
    """What was found out about a defence: it sends A x + offset, with the noise that the estimate leaves over.

    Of the maps of several states one is drawn for each face.
    """

    name = "imitation"
    summary = "linear maps that were estimated from protection queries"

    def __init__(self, estimate: EstimatedMap, shape: Shape) -> None:
        """``shape``, (C, h, w), is that of what is sent."""
        super().__init__(image_size=estimate.size)
        self._estimate, self._shape = (estimate,), shape  # in a tuple: its weights are the attack's, and not twice

    @property
    def representation_shape(self) -> Shape:
        return self._shape

    @property
    def _count(self) -> int:
        return self._estimate[0].shape[0] // self._shape[0]

    def states(self) -> Tensor | None:
        return torch.arange(self._count)[:, None] if self._count > 1 else None

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor | None:
        return torch.randint(self._count, (count, 1), generator=generator) if self._count > 1 else None

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        estimate = self._estimate[0]
        sent = (estimate(faces) + estimate.offset.to(faces)).unflatten(1, (self._count, -1))
        rows = torch.zeros(len(faces), dtype=torch.int64) if state is None else state[:, 0]
        sent = sent[torch.arange(len(faces), device=sent.device), rows.to(sent.device)]
        drawn = torch.randn(sent.shape, generator=generator).to(sent)
        return torch.add(sent, drawn, alpha=float(estimate.noise))

    def linear_operator(self, state: Tensor | None) -> EstimatedMap:
        return self._estimate[0] if state is None else self._estimate[0].part(int(state[0]), self._shape[0])


def helps(adversary: Adversary, mechanism: Defense) -> bool:
    """Whether the client shows something of ``mechanism`` that this adversary can else but guess: its secret.

    Not where clients have keys: that of one's own says nothing of the others.
    """
    unknown = adversary.knowledge is Knowledge.BLACKBOX and bool(mechanism.secret)
    return unknown and adversary.client is not None and mechanism.draw_keys(1, torch.Generator()) is None


class _Pictures:
    """Pictures that are sent through the client, and how many times, about, where each of them costs several."""

    def __init__(self, client: ProtectionQuery, size: int, seed: int, device: torch.device, cost: float = 1.0) -> None:
        self._client, self._size, self._seed, self._device = client, size, seed, device
        self.asked, self.cost = 0.0, cost
        self.shown = torch.zeros(0, 3 * size**2, dtype=torch.bool, device=device)
        self.answers = torch.zeros(0, 0, device=device)

    def ask(self, pixels: Tensor) -> Tensor:
        """What is sent, float32 (M, m), of pictures (M, n) of values in [0, 1]."""
        self.asked += self.cost * len(pixels)
        pictures = pixels.to(self._device, torch.float32).view(-1, 3, self._size, self._size)
        return torch.cat([self._client(part).flatten(1) for part in pictures.split(_CHUNK)])

    def codes(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count``, or some more, random black and white pictures, bool (T, n), and answers (T, m)."""
        answers = [self.answers] if len(self.answers) else []
        shown = [self.shown]
        while (have := sum(map(len, shown))) < count:
            draws = derived(self._seed, "codes", have)
            shown.append((torch.rand(_CHUNK, self.shown.shape[1], generator=draws) < 0.5).to(self._device))
            answers.append(self.ask(shown[-1]))
        self.shown, self.answers = torch.cat(shown), torch.cat(answers)
        return self.shown, self.answers


class _States:
    """A client that draws one of K maps for a picture, asked until each has answered: one map to K C channels.

    All pictures are near one, the pilot, so that an answer shows which state it was given in by what it is nearest to.
    With pilot p and departure d, a picture x is sent as p + d (2 x - 1); (answer - answer to p) / 2 d is affine in x.

    Attributes:
        pilot: float32 (n,), the picture itself.
        answers: float32 (K, m), to the pilot; empty where there are too many to be counted.
        asked: pictures sent, repeats counted.
    """

    def __init__(self, client: ProtectionQuery, size: int, seed: int, device: torch.device, noise: float) -> None:
        self._client, self._size = client, size
        draws = derived(seed, "pilot")
        margin = _DEPARTURE * 255
        levels = torch.rand(3 * size**2, generator=draws) * (255 - 2 * margin) + margin
        self.pilot = (levels / 255).to(device)
        self.asked = 0
        answers = self._send(self.pilot.expand(_PILOTS, -1))
        rounding = (_ROUNDING * float(answers.abs().max())) ** 2
        # Offsets of a state's own look like noise: answers that repeat to the last digit tell them apart.
        self.answers = _kinds(answers, rounding)
        if not len(self.answers):
            self.answers = _kinds(answers, rounding + noise)

    def _send(self, pictures: Tensor) -> Tensor:
        self.asked += len(pictures)
        shown = pictures.reshape(-1, 3, self._size, self._size)
        return torch.cat([self._client(part).flatten(1) for part in shown.split(_CHUNK)])

    def __call__(self, faces: Tensor) -> Tensor:
        """float32 (M, K m, 1, 1) of pictures (M, 3, H, H)."""
        pictures = (self.pilot + _DEPARTURE * (2 * faces.flatten(1) - 1)).clamp(0, 1)
        out = faces.new_full((len(faces), *self.answers.shape), torch.nan)
        waiting = torch.arange(len(faces), device=faces.device)
        for _ in range(_TURNS * len(self.answers)):
            sent = self._send(pictures[waiting])
            state = torch.stack([(sent - answer).square().mean(dim=1) for answer in self.answers]).argmin(dim=0)
            out[waiting, state] = (sent - self.answers[state]) / (2 * _DEPARTURE)
            waiting = waiting[out[waiting, :, 0].isnan().any(dim=1)]
            if not len(waiting):
                break
        return out.nan_to_num().flatten(1)[:, :, None, None]

    @property
    def cost(self) -> float:
        """How often a picture is sent until all states have answered (the coupon collector's problem)."""
        return len(self.answers) * sum(1 / number for number in range(1, len(self.answers) + 1))


def _kinds(answers: Tensor, noise: float) -> Tensor:
    """The different ones (K, m) among answers (T, m) with ``noise`` of that variance; none where one occurs once.

    The share of draws that occurred once is that of states not seen yet (Good, Biometrika 40, 1953).
    """
    kinds: list[Tensor] = []
    unknown = answers
    while len(unknown):
        same = (unknown - unknown[0]).square().mean(dim=1) <= _STATE * 2 * noise
        if int(same.sum()) < 2 or len(kinds) == _MOST_STATES:
            return answers[:0]
        kinds.append(unknown[same].mean(dim=0))
        unknown = unknown[~same]
    return torch.stack(kinds)


class _Estimation:
    """The state of an estimate: what is known of each of the m values that are sent.

    Attributes:
        left: float64 (m,), the mean square that the best map so far leaves over on pictures it was not made of.
        enough: float64 (m,), at most which a map is exact.
        owner: int64 (m,), the number of the best map of each value among ``fits``, -1 for none; ``names`` says what
            each of these is, ``fits`` its entries as rows, pixels and values.
        offset: float64 (m,), of the best map.
        noise, flat, textured: variance of what is drawn for each query: as reckoned with, on black pictures, on noise.
        signal: the mean variance of what is sent of noise, less that.
    """

    def __init__(self, pictures: _Pictures, size: int, seed: int, most: int) -> None:
        self.pictures, self.size, self.seed, self.most = pictures, size, seed, most
        draws, device = derived(seed, "levels"), pictures.shown.device
        levels = torch.randint(256, (_TRIED, 3 * size**2), generator=draws).to(device)
        self.tried = levels / 255
        black = pictures.ask(torch.zeros(_REPEATS, 3 * size**2))
        self.black = black.double().mean(dim=0)
        self.flat = float(black.double().var(dim=0).mean())
        once, again = (pictures.ask(self.tried[:_REPEATS]).double() for _ in range(2))
        self.textured = float((once - again).square().mean() / 2)
        self.truth = torch.cat((once.float(), pictures.ask(self.tried[_REPEATS:])))
        scatter = self.truth.double().var(dim=0)
        rounding = (_ROUNDING * float(self.truth.abs().max())) ** 2
        self.noise = self.flat + rounding
        self.signal = max(float(scatter.mean()) - self.flat, 0.0)
        signal = (scatter - self.noise).clamp(min=0)
        self.enough = self.noise + torch.minimum(_EXACT * scatter + _OF_NOISE * self.noise, signal / 2)
        self.offset = self.truth.double().mean(dim=0)
        self.left = (self.truth.double() - self.offset).square().mean(dim=0)
        self.owner = torch.full((len(scatter),), -1, device=device)
        self.fits: list[tuple[Tensor, Tensor, Tensor]] = []
        self.names: list[str] = []

    @property
    def varies(self) -> bool:
        """Whether more is drawn for a picture of noise than for a black one: a state, and not noise alone."""
        return self.textured > _STATE * self.noise + _EXACT * self.signal

    @property
    def noisy(self) -> bool:
        """Whether noise, beyond what is negligible, is sent along."""
        return self.noise > _EXACT * self.signal

    @property
    def open(self) -> Tensor:
        """The values that no map explains yet, int64 (u,)."""
        return (self.left > self.enough).nonzero().flatten()

    def patience(self, support: int) -> int:
        """How many pictures a regression on so many pixels needs: more where there is noise."""
        if not self.noisy:
            return _CODES + support + support // 2
        return math.ceil((2 * _CODES + 4 * support) * (1 + min(self.noise / max(self.signal, 1e-300), 30.0)))

    def try_fit(self, name: str, rows: Tensor, entries: tuple[Tensor, Tensor, Tensor], offset: Tensor) -> None:
        """Keep a map of the values ``rows``, int64 (u,), where it leaves less over than what was known.

        ``entries`` are its non-zero ones: index into ``rows``, pixel and value; ``offset`` is float64 (u,).
        """
        sizes = len(rows), 3 * self.size**2
        index, columns, values = entries
        matrix = torch.sparse_coo_tensor(torch.stack((index, columns)), values.double(), sizes, check_invariants=False)
        predicted = (matrix @ self.tried.double().T).T + offset
        left = (self.truth[:, rows].double() - predicted).square().mean(dim=0)
        better = left - self.noise < _BETTER * (self.left[rows] - self.noise)
        self.owner[rows[better]] = len(self.fits)
        self.left[rows[better]], self.offset[rows[better]] = left[better], offset[better]
        kept = better[index]
        self.fits.append((rows[index[kept]], columns[kept], values[kept].double()))
        self.names.append(name)

    # -- single pixels -----------------------------------------------------------------------------

    def affords(self, codes: int) -> bool:
        """Whether there may be so many black and white pictures, and what is tried in the end."""
        more = max(0, codes + _CHUNK - len(self.pictures.shown)) + _TRIED
        return self.pictures.asked + self.pictures.cost * more <= self.most

    def single_pixels(self) -> None:
        """Values that each depend on one pixel: the one whose code they repeat."""
        if not self.affords(self.patience(0)):
            return
        shown, answers = self.pictures.codes(self.patience(0))
        rows = self.open
        signs, centred = _signs(shown), _centred(answers[:, rows])
        columns = torch.cat([part.abs().argmax(dim=1) for part in _correlations(signs, centred)])
        self._regress("one pixel each", rows, columns[:, None], torch.arange(len(rows), device=rows.device), shown)

    def _regress(self, name: str, rows: Tensor, supports: Tensor, group: Tensor, shown: Tensor) -> None:
        """Least squares of the values ``rows`` (u,) on the pixels ``supports``, (G, S), of their ``group``, (u,)."""
        answers = self.pictures.answers[: len(shown)]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        offset = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        if supports.shape[1] == 1:
            for part in torch.arange(len(rows), device=rows.device).split(4096):
                columns = supports[group[part], 0]
                x, y = shown[:, columns].double(), answers[:, rows[part]].double()
                mean = x.mean(dim=0)
                gain = ((x - mean) * y).sum(dim=0) / (x - mean).square().sum(dim=0).clamp(min=0.25)
                offset[part] = y.mean(dim=0) - gain * mean
                found.append((part, columns, gain))
        else:
            order = group.argsort(stable=True)
            numbers, counts = torch.unique_consecutive(group[order], return_counts=True)
            for number, part in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
                columns = supports[number][supports[number] >= 0].to(rows.device)
                x, y = shown[:, columns].double(), answers[:, rows[part]].double()
                mean, level = x.mean(dim=0), y.mean(dim=0)
                gram = (x - mean).T @ (x - mean)
                gram.diagonal().add_(1e-9 * gram.diagonal().mean())
                weights = torch.linalg.solve(gram, (x - mean).T @ (y - level))  # (S, u')
                offset[part] = level - mean @ weights
                found.append(
                    (
                        part[:, None].expand(-1, len(columns)).flatten(),
                        columns[None].expand(len(part), -1).flatten(),
                        weights.T.flatten(),
                    )
                )
        self.try_fit(name, rows, _joined(found), offset)

    # -- larger supports ---------------------------------------------------------------------------

    def supports(self) -> None:
        """Values that depend on a tile, a window, a row or a column each: where most of their energy lies."""
        families = _families(self.size, self.noisy)
        detection = _DETECTION * self.patience(0) // _CODES
        families = [family for family in families if self.affords(max(detection, self.patience(family.size)))]
        if not families:
            return
        everything = self.open
        shown, answers = self.pictures.codes(detection)
        signs, centred = _signs(shown), _centred(answers[:, everything])
        parts: list[list[Tensor]] = [[] for _ in families]
        for part in _correlations(signs, centred):
            energy = part.square().view(-1, 3, self.size, self.size)
            for kept, family in zip(parts, families, strict=True):
                kept.append(torch.stack([values.double() for values in family.pool(energy).max(dim=1)]))
        scatter = centred.double().square().sum(dim=0) * len(shown)
        position = torch.full((len(self.left),), -1, device=everything.device)
        position[everything] = torch.arange(len(everything), device=everything.device)
        for family, kept in zip(families, parts, strict=True):
            energy, group = torch.cat(kept, dim=1)
            explained = energy / scatter.clamp(min=1e-300) - family.size / len(shown)
            rows = self.open
            rows = rows[explained[position[rows]] > _PROMISING * self._visible]
            if len(rows):
                more, _ = self.pictures.codes(self.patience(family.size))
                windows = family.supports(self.size).to(rows.device)
                self._regress(family.name, rows, windows, group[position[rows]].long(), more)

    @property
    def _visible(self) -> float:
        """The share of what varies that is signal."""
        return self.signal / max(self.signal + self.noise, 1e-300)

    # -- one pixel at a time -----------------------------------------------------------------------

    def pixel_by_pixel(self) -> None:
        """Values that depend on anything: the answer to each pixel lit alone, less that to the black picture."""
        pixels, rows = 3 * self.size**2, self.open
        if self.pictures.asked + self.pictures.cost * (pixels + _TRIED) > self.most or self.noisy:
            return
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        entries, black = 0, self.black[rows].float()
        for part in torch.arange(pixels, device=rows.device).split(_CHUNK):
            lit = torch.zeros(len(part), pixels, device=rows.device)
            lit[torch.arange(len(part), device=part.device), part] = 1
            change = self.pictures.ask(lit)[:, rows] - black
            column, row = (change.abs() > math.sqrt(self.noise)).nonzero(as_tuple=True)
            entries += len(row)
            if entries > _MOST_ENTRIES:
                return
            found.append((row, part[column], change[column, row].double()))
        self.try_fit("mixtures of any pixels", rows, _joined(found), self.black[rows])

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of the whole map."""
        kept = [(self.owner[:0], self.owner[:0], self.left[:0])]
        for number, (rows, columns, values) in enumerate(self.fits):
            mine = self.owner[rows] == number
            kept.append((rows[mine], columns[mine], values[mine]))
        return _joined(kept)

    def description(self) -> str:
        """What the map is made of, the commonest part first."""
        counts = torch.bincount(self.owner[self.owner >= 0], minlength=len(self.names)).tolist()
        named = sorted(zip(counts, self.names, strict=True), reverse=True)
        return " and ".join(name for count, name in named if count > _RARE * len(self.owner)) or "nothing"


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.cat(column) for column in zip(*parts, strict=True))
    return first, second, third


def _signs(shown: Tensor) -> Tensor:
    """Codes of mean zero, float32 (T, n), nearly +-1."""
    signs = shown.float() * 2 - 1
    return signs - signs.mean(dim=0)


def _centred(answers: Tensor) -> Tensor:
    return answers - answers.mean(dim=0)


def _correlations(signs: Tensor, centred: Tensor) -> Iterator[Tensor]:
    """centred^T signs, float32, for some of the values at a time: (b, n) of (T, n) and (T, m)."""
    for part in centred.split(max(1, _VALUES // signs.shape[1]), dim=1):
        yield part.T @ signs


@torch.no_grad()
def estimate_map(
    estimate: EstimatedMap, client: ProtectionQuery, faces: Tensor, seed: int, most: int
) -> dict[str, Any]:
    """Fill ``estimate`` with the map of the ``client``, where it is one and linear.

    Args:
        estimate: takes the entries, the offset and the noise; ``found`` says whether it is any good.
        client: is asked about ``most`` pictures at most.
        faces: public ones, uint8 (M, 3, H, H), some of which the map is tried on.
        seed: for the choice of pictures.

    Returns:
        ``protection_map``: what was found; ``protection_r2``: the share of the variance of what is sent of faces that
        the map explains; ``protection_noise``: that of repeated queries.
    """
    device, shape = estimate.offset.device, estimate.shape
    pictures = _Pictures(client, estimate.size, seed, device)
    estimation = _Estimation(pictures, estimate.size, seed, most)
    details: dict[str, Any] = {"protection_noise": math.sqrt(estimation.flat)}
    estimate.found.fill_(False)
    states, before = None, 0
    if estimation.varies or estimation.noisy:
        states = _States(client, estimate.size, seed, device, estimation.noise)
        if not len(states.answers) and estimation.varies:
            return details | {"protection_map": "the map varies from query to query, beyond counting"}
        before = int(pictures.asked)
        pictures.asked += states.asked
        if len(states.answers) < 2:
            states = None
        elif pictures.asked + 2 * states.cost * (_CODES + 2 * _TRIED) > most:
            return details | {"protection_map": f"one of {len(states.answers)} maps, too many for {most} queries"}
        else:
            left_over = most - int(pictures.asked)
            pictures = _Pictures(states, estimate.size, seed, device, states.cost)
            estimation = _Estimation(pictures, estimate.size, seed, left_over)
            details["protection_noise"] = 2 * _DEPARTURE * math.sqrt(estimation.flat)
    if estimation.noise > _DROWNED * estimation.signal:
        return details | {"protection_map": "nothing but noise is sent"}
    for step in (estimation.single_pixels, estimation.supports, estimation.pixel_by_pixel):
        if len(estimation.open):
            step()
    chosen = torch.randperm(len(faces), generator=derived(seed, "tried faces"))[:_TRIED]
    shown = to_float(faces[chosen.to(faces.device)].to(device))
    sent = pictures.ask(shown.flatten(1)).double()
    matrix, offset = estimation.entries(), estimation.offset
    estimate.set_map(*matrix, offset.view(-1, *shape[1:]))
    predicted = (estimate(shown.double()) + estimate.offset).flatten(1)
    left, scatter = float((sent - predicted).square().mean()), float((sent - sent.mean(dim=0)).square().mean())
    r2, what, asked = 1 - left / max(scatter, 1e-300), estimation.description(), int(pictures.asked)
    if states is not None:
        at_pilot = estimate(states.pilot.double().view(1, 3, estimate.size, estimate.size)).flatten()
        estimate.set_map(*matrix, (states.answers.double().flatten() - at_pilot).view(-1, *shape[1:]))
        left, what = left * (2 * _DEPARTURE) ** 2, f"one of {len(states.answers)} maps: {what}"
        asked = states.asked + before
    estimate.noise.fill_(math.sqrt(left))
    estimate.found.fill_(scatter * (1 - r2) - estimation.noise <= (1 - _LINEAR) * scatter)
    what = what if estimate.found else "not linear"
    described = f"{what} (R^2 {r2:.4f} on faces), estimated from {asked} protection queries"
    return details | {"protection_map": described, "protection_r2": r2}
