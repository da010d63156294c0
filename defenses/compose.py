"""Chains of defences, ``A+B``: what A makes of the face, changed by B before it is sent."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import BaseModel, Field, create_model, model_validator
from torch import Tensor, nn

from bench.errors import UsageError
from defenses.base import Defense, DefenseOptions, DefenseTraining, LinearOperator, Shape
from defenses.linear import IdentityOperator
from defenses.template import Misfit, TemplateDefense


@dataclass(frozen=True, slots=True)
class Payload:
    """What is sent for one face: ``values`` of ``bits`` each, and ``extra`` bytes that say how to read them."""

    values: int
    bits: float
    extra: int = 0

    @property
    def bytes(self) -> int:
        """Whole bytes."""
        return math.ceil(round(self.values * self.bits, 6) / 8) + self.extra


class PostProcess(Defense):
    """Changes values that are sent, of whatever shape: those of the defence before it or, alone, the face's.

    Up to noise, and to maps that it fills with zeros, it is the identity: a chain is linear where its first member is.
    ``takes`` is the shape (C, h, w) of what is sent before it, which it keeps; None for the face.
    """

    #: Whether it learns from what the defence before it sends, unless its options say all.
    learns_behind: ClassVar[bool] = False

    def __init__(
        self, options: DefenseOptions | None = None, *, image_size: int = 112, takes: Shape | None = None
    ) -> None:
        super().__init__(options, image_size=image_size)
        self.takes = (3, image_size, image_size) if takes is None else takes

    @property
    def representation_shape(self) -> Shape:
        """The shape that it takes."""
        return self.takes

    def payload(self, before: Payload) -> Payload:
        """What is sent after it, given what was sent before it."""
        return before

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        return self.payload(Payload(math.prod(self.takes), 8 * dtype.itemsize)).bytes

    def linear_operator(self, state: Tensor | None) -> LinearOperator:
        """The identity on faces, where it stands alone."""
        return IdentityOperator(self.image_size)


class ChainOptions(DefenseOptions):
    """The options of every member in a table of its name.

    ``member.option`` is understood as well, and ``option`` alone where one member has it.
    """

    @model_validator(mode="before")
    @classmethod
    def _addressed(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        tables: dict[str, Any] = {name: {} for name in cls.model_fields}
        for key, value in given.items():
            member, _, option = key.replace("-", "_").partition(".")
            if member in cls.model_fields:
                table = {option: value} if option else value
                if isinstance(table, BaseModel):
                    table = table.model_dump(exclude_unset=True)
                if not isinstance(table, Mapping):
                    raise ValueError(f"{member} is a member of the chain: set an option of it, {member}.OPTION=VALUE")
                tables[member] |= table
                continue
            takers = [name for name, kind in cls.kinds().items() if key in kind.model_fields]
            if len(takers) > 1:
                names = " and ".join(takers)
                raise ValueError(f"{key} is an option of {names}: say whose it is, such as {takers[0]}.{key}=VALUE")
            if takers:
                tables[takers[0]][key] = value
            else:
                tables[key] = value  # for pydantic to name as unknown
        return tables

    @classmethod
    def kinds(cls) -> dict[str, type[BaseModel]]:
        """Each member's option model."""
        return {name: cast("type[BaseModel]", field.annotation) for name, field in cls.model_fields.items()}


class Compose(Defense):
    """A chain of defences, each of which changes what the one before it makes; made by :func:`chain`.

    A state is that of all members side by side, in their order, and so are keys; a secret is named ``member.name``.
    Members that learn are fitted in order, each behind those before it. What the first claims of differential privacy
    holds for the chain, as nothing after it sees the face (Dwork and Roth, 2014, proposition 2.1).
    """

    kinds: ClassVar[tuple[type[Defense], ...]]
    options: ChainOptions

    def __init__(
        self,
        options: DefenseOptions | None = None,
        *,
        image_size: int = 112,
        members: Sequence[Defense] | None = None,
    ) -> None:
        """Build with ``options``, or of the ``members`` that these describe."""
        super().__init__(options, image_size=image_size)
        if members is None:
            first, *others = self.kinds
            members = [first(getattr(self.options, field_of(first)), image_size=image_size)]
            for kind in others:
                assert issubclass(kind, PostProcess)
                own = getattr(self.options, field_of(kind))
                members.append(kind(own, image_size=image_size, takes=members[0].representation_shape))
        self.chain = nn.ModuleList(members)
        self.trainable = any(member.trainable for member in members)

    @property
    def _chain(self) -> tuple[Defense, ...]:
        return cast("tuple[Defense, ...]", tuple(self.chain))

    @property
    def _first(self) -> Defense:
        return self._chain[0]

    @property
    def _others(self) -> tuple[PostProcess, ...]:
        return cast("tuple[PostProcess, ...]", self._chain[1:])

    # -- what it sends ---------------------------------------------------------------------------

    @property
    def representation_shape(self) -> Shape:
        """The first member's."""
        return self._first.representation_shape

    @property
    def parts(self) -> Mapping[str, Shape]:
        """The first member's."""
        return self._first.parts

    @property
    def views(self) -> int:
        """The most that any member asks for: every copy is drawn anew by all."""
        return max(self._first.views, *(member.views for member in self._others))

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        values = sum(map(math.prod, self.parts.values()))
        payload = Payload(values, 8 * self._first.bytes_per_face(dtype) / values)
        for member in self._others:
            payload = member.payload(payload)
        return payload.bytes

    @property
    def epsilon(self) -> Mapping[str, float]:
        """The first member's."""
        return self._first.epsilon

    @property
    def shares_noise(self) -> bool:
        return self._first.shares_noise

    # -- what it draws ---------------------------------------------------------------------------

    @cached_property
    def _widths(self) -> dict[str, list[int]]:
        """How many numbers each member's state and keys have."""
        drawn = {
            "draw": [member.draw(1, torch.Generator()) for member in self._chain],
            "draw_keys": [member.draw_keys(1, torch.Generator()) for member in self._chain],
        }
        return {name: [0 if row is None else row.shape[1] for row in rows] for name, rows in drawn.items()}

    def _split(self, drawn: Tensor | None, what: str) -> list[Tensor | None]:
        """What each member drew, of a state or keys (N, D) or (D,) of the chain."""
        if drawn is None:
            return [None] * len(self._chain)
        widths = self._widths[what]
        return [part if width else None for part, width in zip(drawn.split(widths, dim=-1), widths, strict=True)]

    def draw(self, count: int, generator: torch.Generator, labels: Tensor | None = None) -> Tensor | None:
        """States of all members side by side, int64 (count, D); None where none draws any."""
        return _joined([member.draw(count, generator, labels) for member in self._chain])

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Keys for all members side by side, int64 (count, k); None where none has any."""
        return _joined([member.draw_keys(count, generator) for member in self._chain])

    def states(self) -> Tensor | None:
        """Every combination of the members' states, the last member's varying fastest."""
        listed = [member.states() for member, width in zip(self._chain, self._widths["draw"], strict=True) if width]
        rows: Tensor | None = None
        for states in listed:
            if states is None:
                return None
            if rows is None:
                rows = states
            else:
                rows = torch.cat((rows.repeat_interleave(len(states), dim=0), states.repeat(len(rows), 1)), dim=1)
        return rows

    @property
    def entropy_bits(self) -> float:
        """The sum of the members': they draw independently."""
        return sum(member.entropy_bits for member in self._chain)

    # -- what it keeps from the attacker ---------------------------------------------------------

    @property
    def secret(self) -> Mapping[str, Tensor]:
        return {f"{member.name}.{key}": value for member in self._chain for key, value in member.secret.items()}

    def guess(self, generator: torch.Generator) -> Self:
        """The chain of its members' guesses."""
        return self._of([member.guess(generator) for member in self._chain]) if self.secret else self

    def with_layouts(self, layouts: Tensor) -> Self:
        """The chain behind the first member's imitation: others leave channels where they are."""
        return self._of([self._first.with_layouts(layouts), *self._others])

    def _of(self, members: Sequence[Defense]) -> Self:
        options = self.options.model_copy(update={field_of(type(member)): member.options for member in members})
        return type(self)(options, image_size=self.image_size, members=members).eval()

    # -- what it does ----------------------------------------------------------------------------

    def fit(self, training: DefenseTraining) -> None:
        """Fit the members that learn, in order: each sees what those before it, fitted, make of the faces."""
        self.chain.eval()
        for number, member in enumerate(self._chain):
            if not member.trainable:
                continue

            def batches(
                batch_size: int, generator: torch.Generator, number: int = number
            ) -> Iterator[tuple[Tensor, Tensor]]:
                for faces, labels in training.batches(batch_size, generator):
                    yield self._before(number, faces, labels, generator), labels

            folder = None if training.folder is None else training.folder / f"{number}-{member.name}"
            if folder is not None:
                folder.mkdir(exist_ok=True)
            member.train()
            member.fit(replace(training, batches=batches, folder=folder))
            member.eval()

    @torch.no_grad()
    def _before(self, number: int, faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What reaches member ``number`` of some faces."""
        if not number:
            return faces
        keys = self.draw_keys(len(faces), generator)
        return self._send(faces, self.draw(len(faces), generator, labels), keys, generator, number)

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        return self._send(faces, state, None, generator, len(self._chain))

    def keyed_transform(self, faces: Tensor, state: Tensor | None, keys: Tensor, generator: torch.Generator) -> Tensor:
        return self._send(faces, state, keys, generator, len(self._chain))

    def _send(
        self, faces: Tensor, state: Tensor | None, keys: Tensor | None, generator: torch.Generator, most: int
    ) -> Tensor:
        """What the first ``most`` members make of the faces, one after the other."""
        states, held = self._split(state, "draw"), self._split(keys, "draw_keys")
        sent = faces
        for member, drawn, key in list(zip(self._chain, states, held, strict=True))[:most]:
            if key is None:
                sent = member.transform(sent, drawn, generator)
            else:
                sent = member.keyed_transform(sent, drawn, key, generator)
            if member is not self._first and len(self.parts) > 1:
                # Each value of a part is sent once: noise of its own on every copy would be averaged away.
                sent = self.pack(self.unpack(sent))
        return sent

    def linear_operator(self, state: Tensor | None) -> LinearOperator | None:
        """The first member's map, which the others leave as it is up to noise and to maps of zeros."""
        return self._first.linear_operator(self._split(state, "draw")[0])

    @property
    def linear_channels(self) -> Tensor | None:
        """The first member's, as the map is."""
        return self._first.linear_channels

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """Undone in reverse order."""
        for member, drawn in reversed(list(zip(self._chain, self._split(state, "draw"), strict=True))):
            representation = member.canonical(representation, drawn)
        return representation

    def describe(self) -> dict[str, Any]:
        """Adds what the members say of themselves alone."""
        own = super().describe()
        told = {key: value for member in self._chain for key, value in member.describe().items() if key not in own}
        return told | own


class TemplateChain(TemplateDefense):
    """A template defence of what a recogniser makes of protected faces; made by :func:`chain`.

    What is stored is the template's. The defence before it is fitted, and the recogniser trained behind it, as if it
    stood alone.
    """

    kinds: ClassVar[tuple[type[Defense], type[TemplateDefense]]]
    options: ChainOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        first, last = self.kinds
        own = getattr(self.options, field_of(last))
        before: Any = self.options
        if not issubclass(first, Compose):
            before = getattr(self.options, field_of(first))
        else:
            before = first.Options.model_validate({name: getattr(before, name) for name in first.Options.model_fields})
        self.first = first(before, image_size=image_size)
        self.template = last(own, image_size=image_size)
        if self.first.draw_keys(1, torch.Generator().manual_seed(0)) is not None:
            raise UsageError(
                f"{self.first.name} draws a key for each client, as {self.template.name} does: a chain of both would "
                "need two, which is not supported; protect what is stored behind a defence without keys"
            )
        self.template._behind = self._behind = (self.first,)
        self.trainable = self.first.trainable or self.template.trainable

    def attach(self, recogniser: nn.Module, embedding_size: int) -> None:
        self.template.attach(recogniser, embedding_size)
        super().attach(recogniser, self.template.embedding_size)

    def embed(self, faces: Tensor, generator: torch.Generator) -> Tensor:
        return self.template.embed(faces, generator)

    @property
    def template_size(self) -> int:
        return self.template.template_size

    @property
    def views(self) -> int:
        return self.template.views

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        return self.template.bytes_per_face(dtype)

    @property
    def secret(self) -> Mapping[str, Tensor]:
        return {
            f"{member.name}.{key}": value
            for member in (self.first, self.template)
            for key, value in member.secret.items()
        }

    def guess(self, generator: torch.Generator) -> Self:
        """The template of the guessed defence before it."""
        if not self.secret:
            return self
        guessed = copy.copy(self)
        guessed._modules = {"first": self.first.guess(generator), "template": copy.copy(self.template.guess(generator))}
        guessed.template._behind = guessed._behind = (guessed.first,)
        return guessed

    def fit(self, training: DefenseTraining) -> None:
        """Fit the template defence; the one before it is fitted already."""
        self.first.eval()
        if self.template.trainable:
            self.template.fit(training)

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor | None:
        return self.template.draw_keys(count, generator)

    def expand(self, key: Tensor) -> Tensor:
        return self.template.expand(key)

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.template.enrol(embeddings, keys, generator)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        return self.template.compare(first, second)

    def match(self, stored: Tensor, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.template.match(stored, embeddings, keys, generator)

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit | None:
        return self.template.misfit(templates, keys)

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor | None:
        return self.template.estimate(templates, keys)

    def describe(self) -> dict[str, Any]:
        """Adds what the defence before it says of what travels."""
        travels = self.first.describe()
        return super().describe() | {"travels": {key: travels[key] for key in ("bytes_per_face", "entropy_bits")}}


def field_of(kind: type[Defense]) -> str:
    """How a member is called among the options of a chain."""
    return kind.name.replace("-", "_")


def _joined(drawn: Sequence[Tensor | None]) -> Tensor | None:
    rows = [row for row in drawn if row is not None]
    return torch.cat(rows, dim=1) if rows else None


def chain(kinds: Sequence[type[Defense]]) -> type[Defense]:
    """The defence that sends each face through defences of some ``kinds``, two at least, one after the other.

    The last may be a template defence, which then protects the embeddings of a recogniser behind the others.

    Raises:
        ValueError: they cannot stand behind one another; the message says why.
    """
    first, *others = kinds
    name = "+".join(kind.name for kind in kinds)
    if len(set(kinds)) < len(kinds):
        raise ValueError("name each member once: their options would be mixed up")
    last = kinds[-1]
    if any(issubclass(kind, TemplateDefense) for kind in kinds[:-1]):
        raise ValueError(
            "a template defence protects an embedding, with a comparison of its own: it can only come last"
        )
    stored = last if issubclass(last, TemplateDefense) else None
    for kind in others[:-1] if stored else others:
        if not issubclass(kind, PostProcess):
            raise ValueError(f"{kind.name} takes faces, not what {first.name} makes of them: it can only come first")
    presets: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        for preset, values in kind.presets.items():
            presets.setdefault(preset, {}).update({f"{field_of(kind)}.{key}": value for key, value in values.items()})
    fields: dict[str, Any] = {
        field_of(kind): (kind.Options, Field(default_factory=kind.Options, description=f"Options of {kind.name}."))
        for kind in kinds
    }
    facts = {
        "__module__": __name__,
        "name": name,
        "summary": ", then ".join(kind.summary for kind in kinds),
        "reference": "; ".join(dict.fromkeys(kind.reference for kind in kinds if kind.reference)),
        "fidelity": first.fidelity,
        "hidden": "; ".join(kind.hidden for kind in kinds if kind.hidden),
        "learns": "; ".join(kind.learns for kind in kinds if kind.learns),
        "departures": {f"{field_of(kind)}.{key}": told for kind in kinds for key, told in kind.departures.items()},
        "Options": create_model("ChainOptions", __base__=ChainOptions, **fields),
        "level": first.level,
        "trainable": first.trainable
        or any(
            kind.trainable if kind is stored else issubclass(kind, PostProcess) and kind.learns_behind
            for kind in others
        ),
        "differentiable": all(kind.differentiable for kind in kinds),
        "presets": presets,
    }
    if stored is None:
        return type(name, (Compose,), facts | {"kinds": tuple(kinds)})
    before = first if len(kinds) == 2 else chain(kinds[:-1])
    facts |= {"kinds": (before, stored), "level": "template", "key_stored": stored.key_stored}
    return type(name, (TemplateChain,), facts | {"fidelity": stored.fidelity, "differentiable": stored.differentiable})
