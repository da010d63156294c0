"""The linear maps of a defence: those that it declares, and those that nobody declared but that numbers show.

A defence is linear, up to an offset and noise, if superposition holds once all that it draws is pinned. The map of one
draw is then its derivative, taken by automatic differentiation, or read off basis faces where there is no derivative.
Draws that repeat are states, whether or not they are listed. How many were missed is told by the share of draws that
occurred once (Good, *The Population Frequencies of Species*, Biometrika 40, 1953).
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from defenses.base import Defense, LinearOperator, SeparableSum, Shape
from defenses.layout import row_numbers

DECLARED = "declared"
UNDECLARED = "undeclared, but linear"

#: Draws looked at: so many where none repeats, and at most.
_FIRST_DRAWS = 128
_MOST_DRAWS = 4096
#: Share of unseen draws at which the search for states ends, and above which what is drawn is no list of states.
_UNSEEN = 0.005
_CONTINUOUS = 0.2
#: Draws for each state that was found.
_PER_STATE = 8
#: Relative to what a face changes, the error that superposition may leave: rounding, even to few bits, and slight bends
#: are noise to be measured; and that of rounding in float32.
_SUPERPOSITION = 1e-2
_ROUNDING = 8 * 2.0**-24
#: The error of a channel that is linear beside others that are not: a network may bend one but slightly.
_OF_PART = 1e-3
#: Relative difference below which two draws are one.
_SAME = 1e-6
#: Draws whose offsets tell what varies in them, and how far a direction stands out of the others.
_OFFSETS = 48
_STANDS_OUT = 30.0
#: Draws that tell the range of a random gain, and channels that may have one each.
_GAINS = 64
#: Graphs of derivatives kept, entries that a matrix of basis responses may have, and faces at once for it.
_GRAPHS = 4
_MATRIX_ENTRIES = 2**25
_CHUNK = 32

#: ``send(faces, generator)``: representations float32 (N, C, h, w) of faces float (N, 3, H, W), each as a client sends
#: it under a fresh draw, and which operator that was, int64 (N,).
Send = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gains:
    """A factor that is drawn anew for each face, for groups of channels: that of channel c lies within the range of
    ``groups[c]``, int64 (C,): from ``lowest`` to ``highest``, float64 (G,), of the operator's.
    """

    groups: Tensor
    lowest: Tensor
    highest: Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """z times ``weights``, but in some directions times factors of their own: symmetric, so its own adjoint.

    Attributes:
        weights: float64 (C, h, w) or broadcastable to it; a scalar where there are directions.
        directions: float64 (r, C, h, w), orthonormal; None for none.
        factors: float64 (r,).
    """

    weights: Tensor
    directions: Tensor | None = None
    factors: Tensor | None = None

    def __call__(self, representations: Tensor) -> Tensor:
        """(N, C, h, w) to the same; what is broadcastable to it stays so, where there are no directions."""
        weighted = representations * self.weights.to(representations)
        if self.directions is None or self.factors is None:
            return weighted
        shape = len(representations), *self.directions.shape[1:]
        basis = self.directions.flatten(1).to(representations)
        change = (self.factors - self.weights.flatten()).to(representations)
        inside = (representations.expand(shape).flatten(1) @ basis.T) * change
        return weighted + (inside @ basis).view(shape)


@dataclass(frozen=True)
class LinearMaps:
    """What an attack on a linear defence inverts: an operator for each state, however they were come by.

    Another source of operators (an estimate from pairs of own faces and what a client sends of them) makes one of
    these: its operators, a ``source`` that says what it is, and ``send``, from which noise and the reliability of
    reading states are measured.

    Attributes:
        operators: K, in the order of the mechanism's states where it lists them.
        source: :data:`DECLARED`, :data:`UNDECLARED` or what else it rests on, for the result.
        send: faces as a client sends them, with the number of the operator.
        nuisance: float64 (R, C, h, w), orthonormal directions of what is sent in which a random offset hides
            everything; all operators, and what is intercepted, are taken without them (:meth:`clean`).
        gains: what scales the one operator at random, if anything does.
        details: of how they were found, for the result.
        channels: int64 (C,), the channels of a representation that the operators make (:meth:`clean` picks them out),
            where others are no linear map; None for all.
        whitening: what operators, and what is intercepted (:meth:`clean`), go through, so that the noise is white.
    """

    operators: Sequence[LinearOperator]
    source: str
    send: Send
    nuisance: Tensor | None = None
    gains: Gains | None = None
    details: dict[str, Any] = field(default_factory=dict)
    channels: Tensor | None = None
    whitening: Whitening | None = None

    def clean(self, representations: Tensor) -> Tensor:
        """``representations`` (N, C, h, w), float64, as the operators make them: without the nuisance, whitened."""
        if self.channels is not None:
            representations = representations[:, self.channels.to(representations.device)]
        if self.nuisance is not None:
            representations = _without(self.nuisance, representations)
        return representations if self.whitening is None else self.whitening(representations)

    def whitened(self, whitening: Whitening) -> LinearMaps:
        """The same behind ``whitening``."""
        return replace(self, operators=[Whitened(one, whitening) for one in self.operators], whitening=whitening)


def linear_maps(mechanism: Defense) -> LinearMaps:
    """The operators that ``mechanism`` declares or, if it declares none, those that numbers show.

    Raises:
        ValueError: it is not linear, or its operators cannot be had; the message says why.
    """
    return _declared(mechanism) or _found(mechanism)


@torch.no_grad()
def why_not_linear(mechanism: Defense) -> str | None:
    """Why ``mechanism`` is taken for no linear map, by a test of a few faces; None where it is one."""
    try:
        if _declared(mechanism) is not None:
            return None
        pins = _pinned(mechanism)[0]
        if mechanism.states() is None:
            maps = _Groups()
            for seed in range(_FIRST_DRAWS):
                slope, _, rounding = _sketches(pins, seed)
                maps.add(slope, rounding)
            if maps.unseen == 1:
                _gains(pins)
    except (ValueError, RuntimeError) as error:  # what is yet to be fitted may take no face
        return str(error)
    return None


def _declared(mechanism: Defense) -> LinearMaps | None:
    listed = mechanism.states()
    device = next((tensor.device for tensor in mechanism.buffers()), torch.device("cpu"))
    if listed is None and mechanism.draw(1, torch.Generator()) is not None:
        return None  # states that are not listed are looked for
    rows = [None] if listed is None else list(listed.to(device))
    operators = [operator for row in rows if (operator := mechanism.linear_operator(row)) is not None]
    if len(operators) < len(rows):
        return None

    def send(faces: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sent = mechanism.protect(faces, generator)
        if sent.state is None or listed is None:
            return sent.representation, torch.zeros(len(faces), dtype=torch.int64)
        return sent.representation, row_numbers(sent.state.cpu(), listed.cpu())

    channels = mechanism.linear_channels
    return LinearMaps(operators, DECLARED + _share(mechanism, channels), send, channels=channels)


def _share(mechanism: Defense, channels: Tensor | None) -> str:
    return "" if channels is None else f", in {len(channels)} of {mechanism.channels} channels"


class _Channels(Defense):
    """Some channels of what a defence sends."""

    name = "channels"
    summary = "some channels of a defence"

    def __init__(self, whole: Defense, channels: Tensor) -> None:
        super().__init__(image_size=whole.image_size)
        self.__dict__["name"], self.level = whole.name, whole.level  # type: ignore[misc]
        self.whole, self.kept = whole, channels

    @property
    def representation_shape(self) -> Shape:
        return (len(self.kept), *self.whole.representation_shape[1:])

    def states(self) -> Tensor | None:
        return self.whole.states()

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor | None:
        return self.whole.draw(count, generator, labels)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.whole.transform(faces, state, generator)[:, self.kept.to(faces.device)]


# -- what is drawn, pinned -----------------------------------------------------------------------


class _SameForAll(TorchFunctionMode):
    """Within it, what is drawn for each of ``count`` faces is drawn once, and is the same for all.

    What has a first dimension of that length is taken to be drawn for each face.
    """

    _LIKE = frozenset({torch.rand_like, torch.randn_like, torch.bernoulli, torch.poisson, torch.multinomial})
    _SHAPED = frozenset({torch.rand, torch.randn, torch.randint, torch.normal})
    _IN_PLACE = frozenset(
        getattr(Tensor, f"{name}_")
        for name in ("uniform", "normal", "random", "bernoulli", "exponential", "cauchy", "log_normal", "geometric")
    )

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def _first(self, value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == self._count else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._count == 1 or func not in self._LIKE | self._SHAPED | self._IN_PLACE:
            return func(*args, **kwargs)
        if func in self._IN_PLACE:
            one = self._first(args[0])
            func(one, *(self._first(value) for value in args[1:]), **kwargs)
            return args[0].copy_(one.expand_as(args[0])) if one is not args[0] else one
        reduced = [self._first(value) for value in args]
        if func in self._SHAPED:
            reduced, kwargs = self._smaller(func, list(args), kwargs)
        kwargs = {name: self._first(value) for name, value in kwargs.items()}
        changed = any(new is not old for new, old in zip(reduced, args, strict=True)) or "size" in kwargs
        out = func(*reduced, **kwargs)
        one_for_all = changed and isinstance(out, Tensor) and out.ndim > 0 and len(out) == 1
        return out.expand(self._count, *out.shape[1:]).clone() if one_for_all else out

    def _smaller(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with a first dimension of one, where that is the number of faces."""
        size = kwargs.get("size")
        if size is not None and len(size) and size[0] == self._count:
            return args, {**kwargs, "size": (1, *size[1:])}
        for place, value in enumerate(args):
            if isinstance(value, (tuple, list, torch.Size)) and len(value) and value[0] == self._count:
                args[place] = (1, *value[1:])
                return args, kwargs
        if func in (torch.rand, torch.randn) and args and args[0] == self._count and isinstance(args[0], int):
            # A new object, by which the caller sees that something changed.
            args = [torch.Size((1, *args[1:]))]
            return [*args], kwargs
        return [self._first(value) for value in args], kwargs


class _Pins:
    """A mechanism, in double precision where it can be had, whose draws are pinned by a seed, and its state at will."""

    def __init__(self, mechanism: Defense) -> None:
        if mechanism.level == "template":
            raise ValueError(f"{mechanism.name} protects a template, which is no linear map of a face")
        if mechanism.draw_keys(1, torch.Generator()) is not None:
            raise ValueError(f"{mechanism.name} draws keys, and declares no linear map")
        tensors = [*mechanism.buffers(), *mechanism.parameters()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        if self.device.type == "mps":  # has no double precision
            self.device = torch.device("cpu")
        self.mechanism = copy.deepcopy(mechanism).to(self.device)
        self._inner = copy.deepcopy(self.mechanism).double()
        self.size, self._type = mechanism.image_size, torch.float64
        generator = torch.Generator().manual_seed(1)
        probes = torch.rand(3, 3, self.size, self.size, generator=generator, dtype=torch.float64)
        probes[2] = (probes[2] > 0.5).double()  # clamping shows at the ends of the range
        self.probes = probes.to(self.device)
        # What is drawn may depend on the type of the faces: then it is that of what clients send which counts.
        self.rounding = 1e-12
        if not self._agrees():
            self._inner, self._type, self.rounding = self.mechanism, torch.float32, _SAME
        self._alone = not all(
            _same(torch.cat([self._together(face, seed, None) for face in self.probes.split(1)]), sent)
            for seed in range(4)
            if (sent := self._together(self.probes, seed, None)) is not None
        )

    def sent(self, faces: Tensor, seed: int, state: Tensor | None = None) -> Tensor:
        """float64 representations of ``faces`` (N, 3, H, W), all under the draw of ``seed`` or the ``state`` (D,)."""
        if not self._alone:
            together = self._together(faces, seed, state)
            # A size that is drawn may happen to be the number of faces, of which the probes then told nothing.
            if len(faces) <= len(self.probes) + 1 or _same(together[:1], self._together(faces[:1], seed, state)):
                return together
        return torch.cat([self._together(face, seed, state) for face in faces.split(1)])

    def _together(self, faces: Tensor, seed: int, state: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = self._inner.draw(1, generator) if state is None else state[None].cpu()
        drawn = None if drawn is None else drawn.expand(len(faces), -1)
        with _SameForAll(len(faces)):
            return self._inner.transform(faces.to(self._type, copy=True), drawn, generator).double()

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether double precision draws what single precision does."""
        face = self.probes[:1]
        try:
            ours = [self._together(face, seed, None) for seed in range(4)]
        except RuntimeError:  # operations in single precision alone
            return False
        theirs = [self.mechanism.protect(face.float(), torch.Generator().manual_seed(seed)) for seed in range(4)]
        return all(_same(own, sent.representation.double(), 1e-4) for own, sent in zip(ours, theirs, strict=True))

    @torch.no_grad()
    def check(self) -> Tensor | None:
        """See whether superposition holds.

        Returns:
            The channels in which it does, int64, where that is not all of them.

        Raises:
            ValueError: it does not, or draws are not pinned by their generator; or faces cannot be sent at all.
        """
        name, weights = self.mechanism.name, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, device=self.device)
        mixture = torch.einsum("n,nchw->chw", weights, self.probes)[None]
        whole, linear = True, torch.ones(self.mechanism.channels, dtype=torch.bool, device=self.device)
        for seed in range(2):
            sent = self.sent(torch.cat((self.probes, mixture)), seed)
            if not _same(sent[:1], self.sent(self.probes[:1], seed)):
                raise ValueError(f"{name} is not a linear defence: it draws more than its generator tells")
            error = sent[3] - torch.einsum("n,nchw->chw", weights, sent[:3])
            change = sent[0] - sent[2]
            of_all, of_change, level = (float(part.square().mean().sqrt()) for part in (error, change, sent))
            whole &= of_all <= _SUPERPOSITION * of_change + _ROUNDING * level and of_change != 0
            off, moved = (part.square().mean(dim=(1, 2)).sqrt() for part in (error, change))
            levels = sent.square().mean(dim=(0, 2, 3)).sqrt()
            linear &= (off <= _OF_PART * moved + _ROUNDING * levels) & (moved > _ROUNDING * levels)
        if whole:
            return None
        if not bool(linear.any()) or bool(linear.all()):
            raise ValueError(f"{name} is not a linear defence")
        return linear.nonzero().flatten()


def _same(first: Tensor, second: Tensor, tolerance: float = _SAME) -> bool:
    return first.shape == second.shape and bool((first - second).abs().max() <= tolerance * first.abs().max() + 1e-12)


# -- operators that numbers show -----------------------------------------------------------------


class _Derivative:
    """The operator of one draw by differentiation: A^T by reverse mode, A by the derivative of A^T v in v.

    ``graphs`` keeps what was differentiated last, for all operators of a mechanism together.
    """

    def __init__(
        self, sent: Callable[[Tensor], Tensor], size: int, offset: Tensor, graphs: OrderedDict[Any, tuple[Tensor, ...]]
    ) -> None:
        self._sent, self._size, self.offset, self._graphs = sent, size, offset, graphs

    def _graph(self, count: int) -> tuple[Tensor, ...]:
        key = id(self), count
        held = self._graphs.pop(key, None)
        if held is None:
            with torch.inference_mode(False), torch.enable_grad():
                faces = torch.full((count, 3, self._size, self._size), 0.5, dtype=torch.float64)
                faces = faces.to(self.offset.device).requires_grad_()
                sent = self._sent(faces)
                weights = torch.zeros_like(sent, requires_grad=True)
                (pulled,) = torch.autograd.grad(sent, faces, weights, create_graph=True)
            held = faces, sent, weights, pulled
        self._graphs[key] = held
        while len(self._graphs) > _GRAPHS:
            self._graphs.popitem(last=False)
        return held

    def __call__(self, faces: Tensor) -> Tensor:
        _, _, weights, pulled = self._graph(len(faces))
        (out,) = torch.autograd.grad(pulled, weights, faces.double(), retain_graph=True)
        return out.to(faces)

    def adjoint(self, representation: Tensor) -> Tensor:
        faces, sent, _, _ = self._graph(len(representation))
        (out,) = torch.autograd.grad(sent, faces, representation.double(), retain_graph=True)
        return out.to(representation)


class _Matrix:
    """The operator of one draw as the responses to basis faces, sparse, for what cannot be differentiated."""

    def __init__(self, sent: Callable[[Tensor], Tensor], size: int, offset: Tensor) -> None:
        pixels, device, self.offset = 3 * size * size, offset.device, offset
        with torch.no_grad():
            black = sent(torch.zeros(1, 3, size, size, dtype=torch.float64, device=device))
            parts, entries, largest = [], 0, 0.0
            for index in torch.arange(pixels, device=device).split(_CHUNK):
                basis = torch.zeros(len(index), pixels, dtype=torch.float64, device=device)
                basis[torch.arange(len(index)), index] = 1
                response = (sent(basis.view(-1, 3, size, size)) - black).flatten(1)
                largest = max(largest, float(response.abs().max()))
                at = (response.abs() > _SAME * largest).nonzero()
                entries += len(at)
                if entries > _MATRIX_ENTRIES:
                    raise ValueError("it has no derivative, and its matrix is too large: declare linear_operator")
                parts.append((index[at[:, 0]], at[:, 1], response[at[:, 0], at[:, 1]]))
        columns, rows, values = (torch.cat(part) for part in zip(*parts, strict=True))
        shape = self.offset.numel(), pixels
        self._forward = torch.sparse_coo_tensor(torch.stack((rows, columns)), values, shape, check_invariants=False)
        self._backward = self._forward.T.coalesce()
        self._face = 3, size, size

    def __call__(self, faces: Tensor) -> Tensor:
        out = (self._forward @ faces.double().flatten(1).T).T
        return out.reshape(len(faces), *self.offset.shape).to(faces)

    def adjoint(self, representation: Tensor) -> Tensor:
        out = (self._backward @ representation.double().flatten(1).T).T
        return out.reshape(len(representation), *self._face).to(representation)


@dataclass(frozen=True, eq=False)
class _Mapped:
    """An operator whose values go through a map that is its own adjoint."""

    inner: LinearOperator
    through: Callable[[Tensor], Tensor]

    @property
    def offset(self) -> Tensor:
        return self.through(self.inner.offset[None])[0]

    def __call__(self, faces: Tensor) -> Tensor:
        return self.through(self.inner(faces))

    def adjoint(self, representation: Tensor) -> Tensor:
        return self.inner.adjoint(self.through(representation))


class Whitened(_Mapped):
    """An operator whose values go through a whitening."""


@dataclass(frozen=True, eq=False)
class WhitenedSum(Whitened):
    """A :class:`~defenses.base.SeparableSum` whose channels are weighed by the product of a weight for each colour and
    one for each map: one again.

    Attributes:
        colours: float64 (P,).
        maps: float64 (K,).
    """

    inner: SeparableSum
    colours: Tensor
    maps: Tensor

    @property
    def row_factors(self) -> Tensor:
        factors = self.inner.row_factors
        return factors * self.maps.to(factors)[:, None, None]

    @property
    def column_factors(self) -> Tensor:
        return self.inner.column_factors

    @property
    def colour(self) -> Tensor:
        colour = self.inner.colour
        return colour * self.colours.to(colour)[:, None]


def _without(directions: Tensor, representations: Tensor) -> Tensor:
    basis = directions.flatten(1).to(representations)
    flat = representations.flatten(1)
    return (flat - (flat @ basis.T) @ basis).view_as(representations)


# -- finding them --------------------------------------------------------------------------------


@dataclass
class _Draw:
    """One of the things that are drawn: a listed state, or seeds that draw the same."""

    state: Tensor | None
    seeds: list[int]


@torch.no_grad()
def _found(mechanism: Defense) -> LinearMaps:
    pins, channels = _pinned(mechanism)
    listed = mechanism.states()
    details: dict[str, Any] = {}
    gains = None
    groups = None
    if listed is None:
        draws, details, groups = _draws(pins)
        if not draws:
            draws, gains = [_Draw(None, list(range(_FIRST_DRAWS)))], _gains(pins)
            details = {"gain": [float(gains.lowest.min()), float(gains.highest.max())]}
    else:
        draws = [_Draw(state, [number]) for number, state in enumerate(listed)]
        for number, draw in enumerate(draws[:_OFFSETS]):
            first, _, rounding = _sketches(pins, number, draw.state)
            if float((_sketches(pins, number + len(draws), draw.state)[0] - first).norm()) > rounding:
                raise ValueError(f"{mechanism.name} is not a linear defence: it draws more of its map than its state")
    means, varying = _offsets(pins, draws)
    nuisance = None if varying is None else _low_rank(varying)
    if gains is not None:
        draws[0].seeds = draws[0].seeds[:1]
    graphs: OrderedDict[Any, tuple[Tensor, ...]] = OrderedDict()
    operators = [_operator(pins, draw, mean, graphs) for draw, mean in zip(draws, means, strict=True)]
    if nuisance is not None:
        operators = [_Mapped(operator, functools.partial(_without, nuisance)) for operator in operators]
        details["offset_directions"] = len(nuisance)

    def anew(generator: torch.Generator) -> tuple[int, torch.Generator]:
        """A draw that was never looked at, and which of the known ones has its map."""
        assert groups is not None
        while True:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            slope, _, rounding = _sketches(pins, seed)
            if (row := groups.find(slope, rounding)) is not None:
                return row, torch.Generator().manual_seed(seed)

    def send(faces: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if groups is not None and varying is not None:
            # Noise of the few draws that were looked at would repeat, and seem to be one of few dimensions.
            drawn = [anew(generator) for _ in faces]
            parts = zip(faces.split(1), drawn, strict=True)
            sent = [mechanism.protect(face, draw).representation for face, (_, draw) in parts]
            return torch.cat(sent), torch.tensor([row for row, _ in drawn])
        rows = torch.randint(len(draws), (len(faces),), generator=generator)
        sent = []
        for face, row in zip(faces.split(1), rows.tolist(), strict=True):
            seeds, state = draws[row].seeds, draws[row].state
            number = int(torch.randint(2**31 if state is not None else len(seeds), (1,), generator=generator))
            draw = torch.Generator().manual_seed(number if state is not None else seeds[number])
            pinned = None if state is None else state[None].cpu()
            sent.append(mechanism.protect(face, draw, state=pinned).representation)
        return torch.cat(sent), rows

    return LinearMaps(operators, UNDECLARED + _share(mechanism, channels), send, nuisance, gains, details, channels)


def _pinned(mechanism: Defense) -> tuple[_Pins, Tensor | None]:
    """The mechanism's draws pinned, in the channels that are linear, and these where they are not all."""
    pins = _Pins(mechanism)
    channels = pins.check()
    return (pins, None) if channels is None else (_Pins(_Channels(mechanism, channels.cpu())), channels.cpu())


def _sketches(pins: _Pins, seed: int, state: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Eight numbers each of how a draw changes with the face, and of what it sends of one face, float64 (8,).

    And how far such numbers may lie apart by rounding.
    """
    first, second = pins.sent(pins.probes[:2], seed, state).flatten(1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (8, len(first)), generator=generator, dtype=torch.int8).to(first.device)
    signs = signs.double() * 2 - 1
    slope, level = signs @ (first - second), signs @ second
    return slope, level, 10 * _SAME * float(slope.norm()) + pins.rounding * float(level.norm()) + 1e-12


def _draws(pins: _Pins) -> tuple[list[_Draw], dict[str, Any], _Groups | None]:
    """What the mechanism draws, where draws or at least their linear parts repeat; nothing where they do not.

    With the groups of equal linear parts that they are, where no draw repeats as a whole.
    """
    whole, maps = _Groups(), _Groups()
    wanted = done = 0
    while done == wanted:
        wanted = max(_FIRST_DRAWS, 2 * wanted)
        while done < wanted:
            slope, level, rounding = _sketches(pins, done)
            whole.add(torch.cat((slope, level)), rounding)
            maps.add(slope, rounding)
            done += 1
        least = min(whole, maps, key=lambda groups: groups.unseen)
        # Of states that are equally likely one in e^8 is then missed.
        enough = least.unseen <= _UNSEEN and done >= _PER_STATE * len(least.members)
        if enough or least.unseen > 1 - 8 / done or done >= _MOST_DRAWS:
            break
    groups = whole if whole.unseen <= _CONTINUOUS else maps
    if groups.unseen > _CONTINUOUS:
        return [], {}, None
    details = {"states_found": len(groups.members), "states_unseen": groups.unseen} if len(groups.members) > 1 else {}
    return [_Draw(None, seeds) for seeds in groups.members], details, maps if groups is maps else None


def _gains(pins: _Pins) -> Gains:
    """How the linear parts of draws differ in their scale.

    Raises:
        ValueError: in more than that.
    """
    slopes = []
    for seed in range(_GAINS):
        first, second = pins.sent(pins.probes[:2], seed).flatten(2)
        slopes.append(first - second)
    scale = slopes[0].square().sum(dim=1).clamp(min=1e-300)
    gains = torch.stack([(slope * slopes[0]).sum(dim=1) / scale for slope in slopes])  # (draws, C)
    errors = [(slope - gain[:, None] * slopes[0]).norm() for slope, gain in zip(slopes, gains, strict=True)]
    alike = bool(((gains - gains[:, :1]).abs() <= 1e-4 * gains.abs()).all())
    proportional = all(float(error) <= 1e-4 * float(slope.norm()) for error, slope in zip(errors, slopes, strict=True))
    if not proportional or bool((gains <= 0).any()) or (gains.shape[1] > _GAINS and not alike):
        raise ValueError(f"{pins.mechanism.name} is not a linear defence: its linear part is drawn anew for every face")
    groups = torch.zeros(gains.shape[1], dtype=torch.int64) if alike else torch.arange(gains.shape[1])
    ranges = gains[:, :1] if alike else gains
    return Gains(groups, ranges.amin(dim=0), ranges.amax(dim=0))


class _Groups:
    """Sketches that are the same, as they come."""

    def __init__(self) -> None:
        self.members: list[list[int]] = []
        self._known = torch.empty(0)
        self._count = 0

    def find(self, sketch: Tensor, rounding: float) -> int | None:
        """The number of the group that is the same; None for a new one."""
        near = ((self._known - sketch).norm(dim=1) <= rounding).nonzero() if self._count else torch.empty(0, 1)
        return int(near[0]) if len(near) else None

    def add(self, sketch: Tensor, rounding: float) -> None:
        if (known := self.find(sketch, rounding)) is not None:
            self.members[known].append(self._count)
        else:
            self.members.append([self._count])
            self._known = torch.cat((self._known, sketch[None])) if self._count else sketch[None]
        self._count += 1

    @property
    def unseen(self) -> float:
        """The estimated chance that the next one is new (Good and Turing)."""
        return sum(len(seeds) == 1 for seeds in self.members) / max(1, self._count)


def _offsets(pins: _Pins, draws: Sequence[_Draw]) -> tuple[list[Tensor], Tensor | None]:
    """The mean offset (C, h, w) of each draw, and how offsets vary around these: float64 (M, C, h, w), or None."""
    black, level = torch.zeros_like(pins.probes[:1]), 1e-3
    means: list[Tensor] = []
    varying: list[Tensor] = []
    for draw in draws:
        seeds = draw.seeds[:_OFFSETS]
        if draw.state is not None:
            seeds = [draw.seeds[0] + number * len(draws) for number in range(2 + _OFFSETS // len(draws))]
        first = pins.sent(black, seeds[0], draw.state)
        if len(seeds) > 1 and _same(first, pins.sent(black, seeds[1], draw.state), 1e-9):
            seeds = seeds[:1]
        sent = torch.cat((first, *(pins.sent(black, seed, draw.state) for seed in seeds[1:])))
        level = max(level, float(sent.abs().max()))
        means.append(sent.mean(dim=0))
        if sum(len(part) for part in varying) <= _OFFSETS:
            varying.append(sent - means[-1])
    rows = torch.cat(varying)
    return means, rows if float(rows.abs().max()) > 1e-9 * level else None


def _low_rank(varying: Tensor) -> Tensor | None:
    """Orthonormal directions (R, C, h, w) in which ``varying`` (M, C, h, w) stands out; None where it is like noise."""
    flat = varying.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    # The rest shows in the median of those that centring has not made zero.
    floor = max(float(values[len(values) // 4 :].median()) * _STANDS_OUT, 1e-12 * float(values[-1]))
    keep = values > floor
    if not bool(keep.any()) or int(keep.sum()) > len(values) // 2:
        return None
    directions: Tensor = torch.linalg.qr(((vectors[:, keep].T @ flat) / values[keep].sqrt()[:, None]).T).Q
    return directions.T.reshape(-1, *varying.shape[1:])


def _operator(pins: _Pins, draw: _Draw, offset: Tensor, graphs: OrderedDict[Any, tuple[Tensor, ...]]) -> LinearOperator:
    def sent(faces: Tensor) -> Tensor:
        return pins.sent(faces, draw.seeds[0], draw.state)

    operator: LinearOperator
    try:
        operator = _Derivative(sent, pins.size, offset, graphs)
        face, image = pins.probes[:1], operator(pins.probes[:1])
        change = sent(face) - sent(torch.zeros_like(face))
        right = bool((image - change).norm() <= 2 * _SUPERPOSITION * change.norm())
        products = (image * image).sum(), (face * operator.adjoint(image)).sum()
        right &= math.isclose(float(products[0]), float(products[1]), rel_tol=1e-5)
    except RuntimeError:  # no gradient at all: not differentiable, or in a library that autograd does not know
        right = False
    return operator if right else _Matrix(sent, pins.size, offset)
