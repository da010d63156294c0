"""The contract of a defence: a client-side map from faces to protected representations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class DefenseOptions(BaseModel):
    """Options of a defence: frozen, keyword-only, validated; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Protected:
    """What a client makes of a batch of faces.

    Attributes:
        representation: float32 (N, C, h, w), what is sent.
        state: int64 (N, D), what a random defence drew for each face and never sends; None for a
            defence that draws nothing countable.
    """

    representation: Tensor
    state: Tensor | None


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
        Options: the option model.
        trainable: whether :meth:`fit` learns something.
        presets: options that a preset of the harness (``quick``, ``cpu``, ``gpu``, ``paper``) sets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    Options: ClassVar[type[DefenseOptions]] = DefenseOptions
    trainable: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        """
        Args:
            options: an instance of ``self.Options``; None for the defaults.
            image_size: height and width of the faces in pixels.
        """
        super().__init__()
        if options is None:
            options = self.Options()
        if not isinstance(options, self.Options):
            raise TypeError(f"{self.name} takes {self.Options.__name__}, got {type(options).__name__}")
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {image_size}")
        self.options = options
        self.image_size = image_size

    # -- what it sends ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def representation_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one representation."""

    @property
    def channels(self) -> int:
        """C, the channels that the recogniser's first convolution takes."""
        return self.representation_shape[0]

    @property
    def views(self) -> int:
        """How many random copies of each image recogniser training uses (r in PartialFace)."""
        return 1

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """Size of what is sent for one face, uncompressed, in bytes."""
        return math.prod(self.representation_shape) * dtype.itemsize

    # -- what it draws ---------------------------------------------------------------------------

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

    def fit(self, faces: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Learn from the provider's faces (float (N, 3, H, W) in [0, 1]); nothing by default."""

    @abstractmethod
    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Representations (N, C, h, w) of ``faces`` under ``state``; differentiable in ``faces``.

        ``generator`` is for draws that are no countable state (additive noise).
        """

    def protect(
        self, faces: Tensor, generator: torch.Generator, *, labels: Tensor | None = None, state: Tensor | None = None
    ) -> Protected:
        """Protect a batch.

        Args:
            faces: float (N, 3, H, W) in [0, 1], H = W = ``image_size``, any device.
            generator: source of all randomness; a CPU generator gives the same draws on every device.
            labels: int64 (N,), in recogniser training only.
            state: int64 (N, D) to pin the states instead of drawing them.

        Raises:
            ValueError: wrong shape, type or value range.
        """
        size = self.image_size
        if faces.ndim != 4 or tuple(faces.shape[1:]) != (3, size, size):
            raise ValueError(f"{self.name} expects faces (N, 3, {size}, {size}), got {tuple(faces.shape)}")
        if not faces.is_floating_point():
            raise ValueError(f"{self.name} expects float faces in [0, 1], got {faces.dtype}")
        if len(faces):
            low, high = (float(v) for v in faces.detach().aminmax())
            if not (low >= -1e-4 and high <= 1 + 1e-4):  # also catches NaN
                raise ValueError(f"{self.name} expects faces in [0, 1], got values from {low:.4g} to {high:.4g}")
        if state is None:
            state = self.draw(len(faces), generator, labels)
        return Protected(self.transform(faces, state, generator), state)

    def protect_each(
        self, faces: Tensor, generators: Sequence[torch.Generator], *, state: Tensor | None = None
    ) -> Protected:
        """Protect a batch with a random stream of its own for every face, so that none depends on its turn.

        States are drawn one by one. A defence that draws more than its state (noise) is asked for one face at a time.

        Args:
            faces: as for :meth:`protect`.
            generators: N, one per face; a stream that stands there twice goes on where it was.
            state: int64 (N, D) to pin the states instead of drawing them.

        Raises:
            ValueError: as :meth:`protect`.
        """
        if state is None:
            drawn = [self.draw(1, generator) for generator in generators]
            state = torch.cat([one for one in drawn if one is not None]) if drawn and drawn[0] is not None else None

        def alone(row: int) -> Protected:
            pinned = None if state is None else state[row : row + 1]
            return self.protect(faces[row : row + 1], generators[row], state=pinned)

        if not generators:
            return self.protect(faces, torch.Generator(), state=state)
        before = generators[0].get_state()
        sent = [alone(0)]
        if not torch.equal(before, generators[0].get_state()):
            sent += [alone(row) for row in range(1, len(faces))]
        elif len(faces) > 1:
            sent.append(self.protect(faces[1:], generators[1], state=None if state is None else state[1:]))
        return Protected(torch.cat([part.representation for part in sent]), state)

    def linear_operator(self, state: Tensor | None) -> LinearOperator | None:
        """The map for one ``state``, int64 (D,), where it is linear up to an offset and noise, else None."""
        return None

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Undo what a known state did to the layout, as an attacker who knows it would.

        Returns (N, C', h, w) in which a channel means the same for every state (PartialFace puts each
        map back at its own frequency and leaves the others zero). Maps of any h and w. The identity by default.
        """
        return representation

    def with_places(self, places: Tensor) -> Self:
        """This mechanism with another secret: its states send the canonical channels ``places``, int64 (K, C).

        For an adversary who has found out the layouts from what was intercepted, but not how the secret is written
        down. States of the result are numbered as the rows are, in some defence's own form (:meth:`states`).

        Raises:
            NotImplementedError: the defence cannot be described in this way.
            ValueError: no mechanism of this kind has such layouts.
        """
        raise NotImplementedError(f"{self.name} is not described by the places of its channels")

    def describe(self) -> dict[str, Any]:
        """Name, options and what they imply, for results and ``bench list``."""
        states = self.states()
        return {
            "name": self.name,
            "options": self.options.model_dump(mode="json"),
            "representation_shape": list(self.representation_shape),
            "views": self.views,
            "states": None if states is None else len(states),
            "entropy_bits": self.entropy_bits,
            "bytes_per_face": self.bytes_per_face(),
        }
