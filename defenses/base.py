"""The contract of a defence: a client-side map from faces to protected representations."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from bench.errors import DefenseError
from bench.randomness import base_seed, derived

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch

Shape = tuple[int, int, int]

Transform = TypeVar("Transform", bound=Callable[..., Tensor])


def pure(transform: Transform) -> Transform:
    """Mark a :meth:`Defense.transform` that changes nothing it is given, and whose result nobody else holds.

    The result is finite for any faces in [0, 1], too. :meth:`Defense.protect` then neither copies nor looks through
    what goes in and comes out, which takes several times as long as a fast transform. That goes for transforms of this
    package, which its tests hold to it: others, and those of subclasses that override one, are shielded all the same.
    """
    transform.pure = transform.__module__.startswith("defenses.")  # type: ignore[attr-defined]
    return transform


class DefenseOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of a defence: frozen, keyword-only, validated; unknown names are errors."""


@dataclass(frozen=True, slots=True)
class Protected:
    """What a client makes of a batch of faces.

    The ``representation``, float32 (N, C, h, w), is what is sent. What a random defence drew for each face, ``state``
    int64 (N, D), and the ``keys`` int64 (N, k) of the faces' clients never are; None for a defence that draws nothing
    countable, or has no keys.
    """

    representation: Tensor
    state: Tensor | None
    keys: Tensor | None = None


@dataclass(frozen=True)
class DefenseTraining:
    """What a trainable defence is fitted with. Initial weights and dropout may use torch's global generators: the
    harness has seeded them.

    Attributes:
        batches: ``batches(batch_size, generator)`` passes once over the provider's faces in random order, varied as in
            recogniser training: faces float (b, 3, H, W) in [0, 1] and labels int64 (b,), on the device.
        images: how many faces that are.
        identities: labels lie in 0..identities-1.
        generator: the fit's own randomness.
        fabric: device and precision.
        make_recogniser: ``make_recogniser(shape)`` gives a fresh recogniser of representations (N, *shape), with
            embeddings (N, D), and its margin head, which is called with embeddings and labels and gives the mean loss
            and bool (N,) hits; both on the device, for a defence that is trained jointly with a recogniser.
        folder: where the state of the fit is kept, to resume from; None to keep nothing.
        report: called as ``report(done, total, **fields)``, counting images.
    """

    batches: Callable[[int, torch.Generator], Iterator[tuple[Tensor, Tensor]]]
    images: int
    identities: int
    generator: torch.Generator
    fabric: Fabric
    make_recogniser: Callable[[Shape], tuple[nn.Module, nn.Module]]
    folder: Path | None = None
    report: Callable[..., None] = lambda done, total, **fields: None

    def steps(
        self,
        epochs: int,
        batch_size: int,
        kept: Mapping[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler],
    ) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        """Faces, labels and a generator for the draws of every step of ``epochs`` passes.

        After each pass what is ``kept`` (by name: modules, optimisers and schedules in training) is written to the
        folder; a fit that was killed goes on from there, and ends as if it had not been.
        """
        path = None if self.folder is None else self.folder / "fit.ckpt"
        first = int(self.fabric.load(path, dict(kept))["epoch"]) if path is not None and path.is_file() else 0
        seed, total = base_seed(self.generator), epochs * self.images
        for epoch in range(first, epochs):
            torch.manual_seed(derived(seed, "dropout", epoch).initial_seed())
            generator, done = derived(seed, "epoch", epoch), epoch * self.images
            for faces, labels in self.batches(batch_size, generator):
                yield faces, labels, generator
                done += len(faces)
                self.report(done, total)
            if path is not None:
                self.fabric.save(path, {**kept, "epoch": epoch + 1})


class LinearOperator(Protocol):
    """``z = A x + offset`` for one fixed state, batched over faces."""

    @property
    def offset(self) -> Tensor:
        """(C, h, w) or broadcastable to it: the representation of the black face (x = 0)."""

    def __call__(self, faces: Tensor) -> Tensor:
        """``A x`` without the offset: (N, 3, H, W) to (N, C, h, w), dtype and device kept."""

    def adjoint(self, representation: Tensor) -> Tensor:
        """``A^T z``: (N, C, h, w) to (N, 3, H, W), so that <A x, z> = <x, A^T z>."""


@runtime_checkable
class SeparableSum(LinearOperator, Protocol):
    """A linear operator that tells its structure: map k of colour p is R_k (M x)_p C_k^T.

    The channels are colour-major: channel p K + k. Attacks use it to factor A^T A instead of applying A many times.
    """

    @property
    def row_factors(self) -> Tensor:
        """R_k, float64 (K, h, H)."""

    @property
    def column_factors(self) -> Tensor:
        """C_k, float64 (K, w, W)."""

    @property
    def colour(self) -> Tensor:
        """M, float64 (P, 3): RGB in [0, 1] to the colours that are sent."""


class Defense(nn.Module, ABC):
    """A client-side map face -> representation, possibly random, possibly fitted.

    A subclass sets the class attributes, names its options and implements :meth:`transform`; a
    random one also :meth:`draw` and, where its states can be counted, :meth:`states`. Constants and
    weights are buffers and parameters, so that ``.to(device)`` and ``state_dict()`` carry them.

    Attributes:
        name: as typed on the command line; the file is called the same (dashes as underscores).
        summary: one line for ``bench list``.
        reference: paper, venue and year, or "" for a textbook operation.
        fidelity: how near it is to what was published: ``faithful`` (checked against public code or its arrays),
            ``simplified`` (code is public, parts are left out), ``reconstruction`` (no code is public, constants are
            ours), or a ``textbook`` operation.
        hidden: what the attacker is not told (secret, key, state, noise), in a few words.
        learns: what :meth:`fit` learns, in a few words.
        weakened: of a published defence, options under which it hides next to nothing: attacks are checked with them.
        departures: ``option=value`` -> what released code does otherwise than its paper under that value.
        Options: the option model.
        level: where it protects: the picture, the features of a client's network (split inference), or the template.
        trainable: whether :meth:`fit` learns something.
        differentiable: whether a representation has a useful gradient in the faces.
        presets: options that a preset of the harness (``quick``, ``cpu``, ``gpu``, ``paper``) sets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    fidelity: ClassVar[Literal["textbook", "faithful", "simplified", "reconstruction"]] = "textbook"
    hidden: ClassVar[str] = ""
    learns: ClassVar[str] = ""
    weakened: ClassVar[Mapping[str, Any]] = {}
    departures: ClassVar[Mapping[str, str]] = {}
    Options: ClassVar[type[DefenseOptions]] = DefenseOptions
    level: ClassVar[Literal["image", "feature", "template"]] = "image"
    trainable: bool = False  # of a chain, its members and their options decide
    differentiable: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Shield who calls a subclass's :meth:`canonical` from one that works in place."""
        super().__init_subclass__(**arguments)
        if (canonical := vars(cls).get("canonical")) is not None:

            @functools.wraps(canonical)
            def shielded(self: Defense, representation: Tensor, state: Tensor | None) -> Tensor:
                undone: Tensor = canonical(self, representation.clone(), _copy(state))
                return undone

            setattr(cls, "canonical", shielded)  # noqa: B010

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        """Build with ``options`` (None: the defaults) for faces of ``image_size`` pixels a side."""
        super().__init__()
        if options is None:
            options = self.Options()
        if not isinstance(options, self.Options):
            raise TypeError(f"{self.name} takes {self.Options.__name__}, got {type(options).__name__}")
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {image_size}")
        self.options = options
        self.image_size = image_size

    @property
    def members(self) -> tuple[Defense, ...]:
        """This defence and those that it is made of: their code is its own."""
        return tuple(module for module in self.modules() if isinstance(module, Defense))

    # -- what it sends ---------------------------------------------------------------------------

    @property
    def representation_shape(self) -> Shape:
        """(C, h, w) of one representation, by default that of a face; with several parts, what :meth:`pack` makes."""
        return (3, self.image_size, self.image_size)

    @property
    def parts(self) -> Mapping[str, Shape]:
        """Name -> (C, h, w) of each part of what is sent, where these differ in shape; by default there is one part."""
        return {"representation": self.representation_shape}

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One representation (N, sum of C, h, w) out of the parts (N, C, h', w'), in the order of :attr:`parts`.

        h and w are the largest. Smaller maps are repeated (nearest neighbour), which :meth:`unpack` takes back without
        loss: recognisers and attacks see maps of one size, and nothing that is not sent.
        """
        _, height, width = self.representation_shape
        return torch.cat([_repeated(_repeated(parts[name], 2, height), 3, width) for name in self.parts], dim=1)

    def unpack(self, representation: Tensor) -> dict[str, Tensor]:
        """The parts of a representation as they are sent, (N, C, h', w') each; the inverse of :meth:`pack`."""
        maps = representation.split([shape[0] for shape in self.parts.values()], dim=1)
        return {
            name: part[:, :, _first_copies(h, part.shape[2])][..., _first_copies(w, part.shape[3])]
            for part, (name, (_, h, w)) in zip(maps, self.parts.items(), strict=True)
        }

    @property
    def channels(self) -> int:
        """C, the channels that the recogniser's first convolution takes."""
        return self.representation_shape[0]

    @property
    def canary(self) -> str:
        """Of a map that hides nothing, its kind, which attacks name that are made for it; empty for a defence."""
        return ""

    @property
    def views(self) -> int:
        """How many random copies of each image recogniser training uses (r in PartialFace)."""
        return 1

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """Size of what is sent for one face, uncompressed, in bytes."""
        return sum(map(math.prod, self.parts.values())) * dtype.itemsize

    @property
    def epsilon(self) -> Mapping[str, float]:
        """Of a defence that claims differential privacy its budgets, ``element`` and ``image``; empty for others.

        ``image`` is what composition over all elements of one face leaves: the sum.
        """
        return {}

    # -- what it draws ---------------------------------------------------------------------------

    @property
    def shares_noise(self) -> bool:
        """Whether its noise is drawn once for a batch and added to all faces of it, as some released code does."""
        return False

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor | None:
        """States for ``count`` faces: int64 (count, D) on the CPU, or None where nothing is drawn.

        ``labels`` (int64 (count,)) is given in recogniser training only; a client has none.
        """
        return None

    def states(self) -> Tensor | None:
        """Every state it can draw, int64 (K, D), or None where they cannot be counted."""
        return None

    @property
    def entropy_bits(self) -> float:
        """Entropy of the state drawn for one face, in bits (uniform over :meth:`states`)."""
        states = self.states()
        return 0.0 if states is None else math.log2(len(states))

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Keys of ``count`` clients: int64 (count, k) on the CPU, or None for a defence without keys.

        A client keeps its key for all its faces; an adversary who has not stolen it draws one, as anybody can.
        """
        return None

    @property
    def mixed_in(self) -> tuple[Tensor, int] | None:
        """Public pictures that are mixed into faces, and how many of them into each; None where there are none.

        Float32 (P, C, h, w), each as it would be sent alone. Everybody has them, attackers, too.
        """
        return None

    # -- what it keeps from the attacker ---------------------------------------------------------

    @property
    def secret(self) -> Mapping[str, Tensor]:
        """What provider and client share and an attacker may not know; empty where there is none."""
        return {}

    def guess(self, generator: torch.Generator) -> Self:
        """This mechanism with a secret drawn at random: what a black-box adversary works with.

        A defence without a secret returns itself: its mechanism is all there is to know.
        """
        if self.secret:
            raise NotImplementedError(f"{self.name} has a secret and must say how an attacker guesses it")
        return self

    # -- what it does ----------------------------------------------------------------------------

    def fit(self, training: DefenseTraining) -> None:
        """Learn from the provider's faces; nothing by default. The harness stores and freezes what was learnt."""

    @abstractmethod
    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Representations (N, C, h, w) of ``faces`` under ``state``; differentiable in ``faces``.

        ``generator`` is for draws that are no countable state (additive noise).
        """

    def keyed_transform(self, faces: Tensor, state: Tensor | None, keys: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`transform` under the ``keys`` of the faces' clients, int64 (N, k), for a defence that draws keys."""
        raise NotImplementedError(f"{self.name} draws keys and must say what they do")

    def protect(
        self,
        faces: Tensor,
        generator: torch.Generator,
        *,
        labels: Tensor | None = None,
        state: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Protected:
        """Protect a batch: float (N, 3, H, W) in [0, 1], H = W = ``image_size``, any device.

        Nothing that comes in or goes out is shared with the defence: it may work in place, and keep what it made. Where
        it is known to do neither (:func:`pure`), nothing is copied.

        A CPU ``generator``, the source of all randomness, gives the same states and keys on every device; noise over
        a whole representation is drawn where it is added (:mod:`defenses.draws`). ``labels`` int64 (N,) are there in
        recogniser training only. ``state`` int64 (N, D) pins the states instead of drawing them, ``keys`` int64 (N, k)
        are those of the faces' clients instead of fresh ones.

        Raises:
            ValueError: faces of another shape, type or value range.
            DefenseError: the defence made something of another shape than it declares, or that is not finite.
        """
        count, size = len(faces), self.image_size
        if faces.ndim != 4 or tuple(faces.shape[1:]) != (3, size, size):
            raise ValueError(f"{self.name} expects faces (N, 3, {size}, {size}), got {tuple(faces.shape)}")
        if not faces.is_floating_point():
            raise ValueError(f"{self.name} expects float faces in [0, 1], got {faces.dtype}")
        extremes = _extremes(faces)
        if state is None:
            state = self.draw(count, generator, _copy(labels))
        if keys is None:
            keys = self.draw_keys(count, generator)
        state, keys = _copy(state), _copy(keys)
        if keys is None and getattr(self.transform, "pure", False):
            sent = self.transform(faces, _copy(state), generator)
            self._check_type(sent, count)
            self._check_faces(extremes)  # last, so that an accelerator is at work while it is waited for
            return Protected(sent, state, keys)
        self._check_faces(extremes)
        if keys is None:
            sent = self.transform(faces.clone(), _copy(state), generator)
        else:
            sent = self.keyed_transform(faces.clone(), _copy(state), keys.to(faces.device, copy=True), generator)
        self._check_type(sent, count)
        self._check_finite(sent, count)
        return Protected(sent.clone(), state, keys)

    def _check_faces(self, extremes: Tensor | None) -> None:
        low, high = (0.0, 1.0) if extremes is None else extremes.tolist()
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # also catches NaN
            raise ValueError(f"{self.name} expects faces in [0, 1], got values from {low:.4g} to {high:.4g}")

    def _check_type(self, sent: Tensor, count: int) -> None:
        """Refuse what the defence may not send of ``count`` faces."""
        if not isinstance(sent, Tensor):
            raise DefenseError(f"defence {self.name} made representations that are no tensor: {type(sent).__name__}")
        if tuple(sent.shape) != (declared := (count, *self.representation_shape)):
            raise DefenseError(f"defence {self.name} made representations {tuple(sent.shape)}, it declares {declared}")
        if not sent.is_floating_point():
            raise DefenseError(
                f"defence {self.name} made representations of {sent.dtype}, which has to be a float type"
            )

    def _check_finite(self, sent: Tensor, count: int) -> None:
        extremes = _extremes(sent)
        if extremes is not None and not all(map(math.isfinite, extremes.tolist())):
            wrong = int((~sent.detach().isfinite()).flatten(1).any(dim=1).sum())
            raise DefenseError(
                f"defence {self.name} made representations that are not finite, of {wrong} of {count} faces: "
                "mend the defence, no attack and no recogniser can be judged on them"
            )

    def protect_each(
        self,
        faces: Tensor,
        generators: Sequence[torch.Generator],
        *,
        state: Tensor | None = None,
        keys: Tensor | None = None,
        shared: torch.Generator | None = None,
    ) -> Protected:
        """Protect a batch with a random stream of its own for every face, so that none depends on its turn.

        States are drawn one by one. A defence that draws more than its state (noise) is asked for one face at a time,
        unless there is a stream for what all faces ``shared`` (:func:`noise_is_shared`). There are N ``generators``; a
        stream that stands there twice goes on where it was. The rest is as for :meth:`protect`.

        Raises:
            ValueError: as :meth:`protect`.
        """
        if not generators:
            return self.protect(faces, torch.Generator(), state=state, keys=keys)

        def each(draw: Callable[[int, torch.Generator], Tensor | None]) -> Tensor | None:
            drawn = [row for generator in generators if (row := draw(1, generator)) is not None]
            return torch.cat(drawn) if drawn else None

        state = each(self.draw) if state is None else state
        keys = each(self.draw_keys) if keys is None else keys
        if shared is not None:
            return self.protect(faces, shared, state=state, keys=keys)

        def some(rows: slice) -> Tensor:
            pinned, key = (None if drawn is None else drawn[rows] for drawn in (state, keys))
            return self.protect(faces[rows], generators[rows.start], state=pinned, keys=key).representation

        before = generators[0].get_state()
        sent = [some(slice(0, 1))]
        if not torch.equal(before, generators[0].get_state()):
            sent += [some(slice(row, row + 1)) for row in range(1, len(faces))]
        elif len(faces) > 1:
            sent.append(some(slice(1, None)))
        return Protected(torch.cat(sent), state, keys)

    def linear_operator(self, state: Tensor | None) -> LinearOperator | None:
        """The map for one ``state``, int64 (D,), where it is linear up to an offset and noise, else None.

        Channels that are left out at random, and are sent as zeros, count as noise: they show.
        """
        return None

    @property
    def linear_channels(self) -> Tensor | None:
        """The channels of a representation that :meth:`linear_operator` makes, int64, ascending; None for all."""
        return None

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Undo what a known state did to the layout, as an attacker who knows it would.

        Returns (N, C', h, w) in which a channel means the same for every state (PartialFace puts each
        map back at its own frequency and leaves the others zero). Maps of any h and w. The identity by default.
        """
        return representation

    def canonical_maps(self, faces: Tensor) -> Tensor | None:
        """Of a defence that shuffles maps and adds them up, the maps as they are before: (N, P, h, w); else None.

        The state of such a defence, int64 (P,), says which of them is in which place of a fixed mixture, the same for
        all faces: of places p, each with a weight w_p in each pixel and channel of what is sent, it sends
        offset + sum_p w_p maps[state[p]] (clamped or not), of which :meth:`canonical` is the adjoint, each map in its
        own place. Everybody who has the mechanism can compute them. None by default.
        """
        return None

    def with_layouts(self, layouts: Tensor) -> Self:
        """This mechanism with another secret: its states send the canonical channels ``layouts``, int64 (K, C).

        For an adversary who has found out the layouts from what was intercepted, but not how the secret is written
        down. States of the result are numbered as the rows are, in some defence's own form (:meth:`states`).

        Raises:
            NotImplementedError: the defence cannot be described in this way.
            ValueError: no mechanism of this kind has such layouts.
        """
        raise NotImplementedError(f"{self.name} is not described by the layouts of its channels")

    def describe(self) -> dict[str, Any]:
        """Name, options and what they imply, for results and ``bench list``."""
        states = self.states()
        return {
            "name": self.name,
            "options": self.options.model_dump(mode="json"),
            "level": self.level,
            "representation_shape": list(self.representation_shape),
            "parts": {name: list(shape) for name, shape in self.parts.items()},
            "views": self.views,
            "states": None if states is None else len(states),
            "entropy_bits": self.entropy_bits,
            "bytes_per_face": self.bytes_per_face(),
            **({"epsilon": dict(self.epsilon)} if self.epsilon else {}),
        }


@torch.no_grad()
def noise_is_shared(defense: Defense) -> bool:
    """Whether one draw of noise serves all faces of a batch, declared or not.

    It does where two equal faces of a batch are sent alike, in one state and under one key, and otherwise next time.
    """
    if defense.shares_noise:
        return True
    generator = torch.Generator().manual_seed(0)
    device = next((tensor.device for tensor in (*defense.buffers(), *defense.parameters())), torch.device("cpu"))
    size = defense.image_size
    faces = torch.rand(1, 3, size, size, generator=generator).to(device).expand(2, -1, -1, -1)
    state, keys = defense.draw(1, generator), defense.draw_keys(1, generator)
    pinned = {"state": _twice(state), "keys": _twice(keys)}
    first, again = (defense.protect(faces, generator, **pinned).representation for _ in range(2))
    within, between, level = (
        float(part.square().mean().sqrt()) for part in (first[0] - first[1], first - again, first)
    )
    # Sums are rounded otherwise in another place of a batch.
    return between > 1e-6 * level and within <= 1e-4 * between


def _twice(drawn: Tensor | None) -> Tensor | None:
    return None if drawn is None else drawn.expand(2, -1)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _extremes(values: Tensor) -> Tensor | None:
    """The least and the largest value, (2,), NaN where there is one; None of no values. Nothing is waited for."""
    return torch.stack(values.detach().aminmax()) if values.numel() else None


def _repeated(maps: Tensor, dim: int, size: int) -> Tensor:
    """Nearest neighbours along ``dim``, up to ``size``."""
    held = maps.shape[dim]
    return maps if held == size else maps.index_select(dim, torch.arange(size, device=maps.device) * held // size)


def _first_copies(held: int, size: int) -> Tensor:
    """Where the first copy of each of ``held`` values lies that were repeated up to ``size``: ceil(i size / held)."""
    return (torch.arange(held) * size + held - 1) // held
