"""The contract of an attack: what it is handed, what it needs, what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from bench.progress import Report, no_report
from bench.randomness import base_seed, derived, seeded
from defenses.base import Defense

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes as long to import as torch

#: Sends faces, float (M, 3, H, W) in [0, 1], through the provider's service as a client would, each protected under a
#: fresh state, and returns their embeddings: float32 (M, D), unit rows.
EmbeddingQuery = Callable[[Tensor], Tensor]

#: ``score(faces, persons)``: the service's cosine between each face, float (M, 3, H, W) in [0, 1], protected under a
#: fresh state, and the enrolled template of the observed person with that number, int64 (M,): float32 (M,).
ScoreQuery = Callable[[Tensor, Tensor], Tensor]

#: ``traffic(count)``: representations of ``count`` faces intercepted from other requests, in batches (b, C, h, w), in
#: a fixed order, of faces that are not attacked; neither faces nor names come with them.
Traffic = Callable[[int], Iterator[Tensor]]

#: Runs the client of the defence in use on pictures of one's own, float (M, 3, H, W) in [0, 1]: what it would send,
#: float32 (M, C, h, w) on their device, under the true secret, states drawn anew and one key, that of the asker.
ProtectionQuery = Callable[[Tensor], Tensor]


class Knowledge(StrEnum):
    """The rung of the ladder that an adversary stands on.

    * ``blackbox``: the mechanism is known, the secret (PartialFace: the table of ranks) is guessed.
    * ``whitebox``: the secret is known too, what was drawn for each face is not.
    * ``oracle``: the state of each intercepted face is known as well, and its client's key is stolen.
    """

    BLACKBOX = "blackbox"
    WHITEBOX = "whitebox"
    ORACLE = "oracle"


class Capability(StrEnum):
    """What an attack may ask for."""

    PUBLIC_FACES = "public faces"
    MECHANISM = "mechanism"
    SECRET = "secret"
    STATE = "known state"
    KEY = "stolen key"
    RECOGNISER = "recogniser weights"
    TRAFFIC = "intercepted traffic"
    TEMPLATES = "stolen templates"
    EMBEDDINGS = "embedding queries"
    SCORES = "score queries"
    PROTECTION = "protection queries"


#: What each rung grants. A rung is about the secret and what was distributed with it (the recogniser's weights); what
#: was intercepted, stolen or can be queried is a matter of an attack's scenario, and open to every rung. Protection
#: queries are among it: a defence works at the client, and anybody can be one.
GRANTS: dict[Knowledge, frozenset[Capability]] = {
    Knowledge.BLACKBOX: frozenset(Capability)
    - {Capability.SECRET, Capability.STATE, Capability.KEY, Capability.RECOGNISER},
    Knowledge.WHITEBOX: frozenset(Capability) - {Capability.STATE, Capability.KEY},
    Knowledge.ORACLE: frozenset(Capability),
}

#: Capabilities for which the provider's recogniser has to exist.
OF_RECOGNISER = frozenset({Capability.RECOGNISER, Capability.TEMPLATES, Capability.EMBEDDINGS, Capability.SCORES})


class AttackOptions(BaseModel):
    """Options of an attack: frozen, keyword-only, validated; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Observation:
    """Intercepted representations of victims: the only way an attack reaches them.

    Attributes:
        representations: float32 (N, k, C, h, w): k interceptions of each of N faces, fresh states each.
        states: int64 (N, k, D) at ``oracle`` where the defence draws states, else None.
        keys: int64 (N, k, K), the keys of the faces' clients at each interception, where the attack needs
            :attr:`Capability.KEY`, or uses it and the rung grants it, or steals templates beside which they are stored
            (:attr:`defenses.template.TemplateDefense.key_stored`), else None; also None where the defence has none.
        templates: float32 (N, k, D), the provider's embedding of each representation, unit rows, where the attack
            needs :attr:`Capability.TEMPLATES`, else None.
        enrolled: float32 (N, D), the provider's class centre of each person: the normalised mean embedding of other
            images of that person, where the attack needs :attr:`Capability.TEMPLATES`, else None.
        score: the service's answers about these N persons, each enrolled with the first template, where the attack
            needs :attr:`Capability.SCORES`, else None. The harness counts the faces that are sent.
    """

    representations: Tensor
    states: Tensor | None = None
    keys: Tensor | None = None
    templates: Tensor | None = None
    enrolled: Tensor | None = None
    score: ScoreQuery | None = None

    def __post_init__(self) -> None:
        if self.representations.ndim != 5:
            raise ValueError(f"representations must be (N, k, C, h, w), got {tuple(self.representations.shape)}")
        for name, per_interception in (("states", self.states), ("keys", self.keys), ("templates", self.templates)):
            if per_interception is not None and (
                per_interception.ndim != 3 or per_interception.shape[:2] != self.representations.shape[:2]
            ):
                raise ValueError(f"{name} must be (N, k, D) with the N and k of the representations")
        if self.enrolled is not None and (self.enrolled.ndim != 2 or len(self.enrolled) != len(self)):
            raise ValueError("enrolled must be (N, D) with the N of the representations")

    def __len__(self) -> int:
        return len(self.representations)

    def copy(self) -> Observation:
        """The same with tensors of its own, which an attack may write into."""
        held = {name: getattr(self, name) for name in self.__slots__}
        own: dict[str, Any] = {name: value.clone() for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **own)

    def rows(self, rows: slice) -> Observation:
        """The observation of successive faces alone, who are numbered anew in score queries."""
        values = {name: getattr(self, name) for name in self.__slots__}
        some: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
        score, before = self.score, rows.start or 0
        if score is not None and before:
            some["score"] = lambda faces, persons: score(faces, persons + before)
        return replace(self, **some)


@dataclass(frozen=True)
class Adversary:
    """What an attack is handed: public faces, knowledge, and nothing else.

    Attributes:
        faces: uint8 (M, 3, H, W), public faces whose identities are disjoint from provider and victims.
        identities: int64 (M,), their labels.
        knowledge: the rung.
        mechanism: gives a defence to train against. At ``whitebox`` and ``oracle`` it is the one in
            use, every time; at ``blackbox`` each call returns the mechanism with a freshly guessed secret.
        generator: the attack's own randomness.
        fabric: device and precision.
        recogniser: the provider's embedding network (representation -> embedding, (N, C, h, w) to (N, D), not
            normalised) where the attack needs :attr:`Capability.RECOGNISER`, or uses it and the rung grants it, else
            None.
        embed: embedding queries to the provider's service where the attack needs :attr:`Capability.EMBEDDINGS`.
        traffic: intercepted traffic where the attack needs :attr:`Capability.TRAFFIC`.
        client: protection queries where the attack needs, or uses, :attr:`Capability.PROTECTION`. The harness counts
            the pictures that are sent.
        checkpoint: a folder for resuming a killed fit, or None.
        report: progress.
    """

    faces: Tensor
    identities: Tensor
    knowledge: Knowledge
    mechanism: Callable[[torch.Generator], Defense]
    generator: torch.Generator
    fabric: Fabric
    recogniser: nn.Module | None = None
    embed: EmbeddingQuery | None = None
    traffic: Traffic | None = None
    client: ProtectionQuery | None = None
    checkpoint: Path | None = None
    report: Report = no_report


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit says of itself, for the honesty checks and the result.

    Attributes:
        saturated: whether more training would hardly have helped; None where nothing is trained.
        states_seen: the states trained on, int64 (K, D), or None where there are none to cover.
        states_read: the share of public faces whose state the attack reads right, where it hinges on that; else None.
        curve: validation loss along the training, as (images seen, loss).
        details: anything else worth keeping (steps, parameters, final losses).
    """

    saturated: bool | None = None
    states_seen: Tensor | None = None
    states_read: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Attack(nn.Module, ABC):
    """What all attacks share; a concrete one is a recovery or a linkage attack.

    A subclass writes :meth:`build` and :meth:`fit`, and what it does with an interception. The harness calls
    :meth:`prepare` and :meth:`learn`, which keep the adversary and check what is handed over.

    Attributes:
        name: as typed on the command line; the file is called the same (dashes as underscores).
        summary: one line for ``bench list``.
        cost: what a fit and a recovery cost, one line for ``bench list``.
        reference: paper, venue and year.
        needs: the capabilities without which it cannot work, checked before any compute.
        uses: capabilities that it makes use of where the rung grants them, and can do without.
        opens: kinds of canary (:attr:`defenses.base.Defense.canary`: ``mixture``, ``affine``, ``permutation``) that it
            is made for, beside unprotected faces: where it is no better than a floor on one of these, it is broken.
        Options: the option model.
        presets: options that a preset of the harness (``quick``, ``cpu``, ``gpu``, ``paper``) sets.
        budgets: axis of a strength curve (``steps``, ``queries``) -> the integer option that bounds it.
        options: of this attack.
        seed: from which a prepared attack derives all randomness (:func:`bench.randomness.derived`).
        mechanism: the defence in use or, under a black box, the mechanism with one guessed secret, where the attack
            needs :attr:`Capability.MECHANISM` and is prepared; no part of the attack's weights.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    # Of an attack that is made of others, as its options say, an instance knows more than its class.
    needs: frozenset[Capability] = frozenset()
    uses: frozenset[Capability] = frozenset()
    opens: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[AttackOptions]] = AttackOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    budgets: ClassVar[Mapping[str, str]] = {}

    mechanism: Defense

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__()
        if options is None:
            options = self.Options()
        if not isinstance(options, self.Options):
            raise TypeError(f"{self.name} takes {self.Options.__name__}, got {type(options).__name__}")
        self.options = options
        self._adversary: Adversary | None = None
        self.seed = 0

    # -- what a subclass writes -------------------------------------------------------------------

    def inapplicable(self, defense: Defense) -> str | None:
        """Why the attack cannot work on ``defense``, asked before any compute; None where it can."""
        return None

    @abstractmethod
    def build(self, adversary: Adversary) -> None:
        """Make the modules and buffers, without training; initial weights are drawn from the attack's seed."""

    @abstractmethod
    def fit(self, adversary: Adversary) -> FitReport:
        """Learn from public faces, once built. What is learnt lives in parameters and buffers, to be stored."""

    # -- bookkeeping ------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[Attack, ...]:
        """This attack and those that it is made of: their options and their code are its own."""
        return tuple(module for module in self.modules() if isinstance(module, Attack))

    @final
    def prepare(self, adversary: Adversary) -> None:
        """Build for this adversary without training, so that stored weights can be loaded.

        Raises:
            ValueError: public faces are not uint8 (M, 3, H, H), M > 0, with one identity each; or this attack cannot
                be built for such an adversary.
        """
        faces, identities = adversary.faces, adversary.identities
        if faces.dtype != torch.uint8 or faces.ndim != 4 or faces.shape[1] != 3 or faces.shape[2] != faces.shape[3]:
            raise ValueError(
                f"{self.name} expects public faces uint8 (M, 3, H, H), got {faces.dtype} {tuple(faces.shape)}"
            )
        if identities.shape != faces.shape[:1] or not len(faces):
            raise ValueError(
                f"{self.name} expects one identity per public face, got {len(faces)} faces and "
                f"{tuple(identities.shape)} identities"
            )
        self._adversary, self.seed = adversary, base_seed(adversary.generator)
        if Capability.MECHANISM in self.needs:
            # Past nn.Module, for which a module's module is a part of its weights.
            guess = adversary.mechanism(derived(self.seed, "mechanism"))
            self.__dict__["mechanism"] = guess.to(adversary.fabric.device)
        with seeded(self.seed, "weights"):
            self.build(adversary)
        self.to(self.device)
        self.eval()

    @final
    def learn(self, adversary: Adversary) -> FitReport:
        """Build for this adversary and fit to its public faces.

        Raises:
            ValueError: as :meth:`prepare`; the public faces do not suffice; or a checkpoint is that of another fit.
            FloatingPointError: a loss is not finite.
        """
        self.prepare(adversary)
        report = self.fit(adversary)
        self.eval()
        return report

    @property
    def adversary(self) -> Adversary:
        """Whom the attack was prepared for.

        Raises:
            ValueError: nobody yet.
        """
        if self._adversary is None:
            raise ValueError(f"{self.name} has to be prepared or fitted before it is used")
        return self._adversary

    @property
    def device(self) -> torch.device:
        """Where the attack's weights lie."""
        return self.adversary.fabric.device

    def _check_representations(self, representations: Tensor) -> None:
        """Refuse representations (..., C, h, w) of another shape than the mechanism's, or not finite."""
        if Capability.MECHANISM in self.needs:
            expected = tuple(self.mechanism.representation_shape)
            if tuple(representations.shape[-3:]) != expected:
                raise ValueError(
                    f"{self.name} was fitted to representations {expected}, got {tuple(representations.shape[-3:])}"
                )
        if not torch.isfinite(representations).all():
            raise ValueError(f"{self.name} was handed representations that are not finite")


class RecoveryAttack(Attack):
    """Intercepted representations (or templates) in, faces out."""

    #: Set by attacks that optimise per victim.
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W) for N > 0 observed representations; values outside [0, 1] are clipped."""

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """Which canonical channel the attack takes each channel of each interception for: int64 (N, k, C), or None.

        Canonical channels are those of :meth:`defenses.base.Defense.canonical`. The harness, which knows what was
        drawn, turns them into a hit rate; an attack that infers no state returns None.
        """
        return None

    def infer_states(self, observation: Observation) -> Tensor | None:
        """Which row of :meth:`defenses.base.Defense.states` the attack takes each interception for: int64 (N, k).

        For an attack that infers states without layouts; asked where :meth:`infer_layout` gives None.
        """
        return None

    def infer_embeddings(self, observation: Observation) -> Tensor | None:
        """The embeddings (N, D) that the attack makes of a template defence's templates, or None.

        Those of :meth:`defenses.template.TemplateDefense.embed`, of any length, which the harness holds against the
        true ones.
        """
        return None

    @final
    def recover(self, observation: Observation) -> Tensor:
        """Recovered faces, float32 (N, 3, H, W) in [0, 1], on the device of the representations.

        Raises:
            ValueError: the attack is not fitted; representations of another shape, or unlike what it was trained on;
                what the attack needs was not observed; something is not finite; or it returned another shape.
            FloatingPointError: a loss is not finite.
        """
        size = self.adversary.faces.shape[-1]
        self._check_observation(observation)
        self.eval()
        if not len(observation):
            return torch.zeros(0, 3, size, size, device=observation.representations.device)
        with torch.set_grad_enabled(self.needs_gradients):
            faces = self.run(observation.copy()).detach().to(observation.representations.device, torch.float32)
        if tuple(faces.shape) != (len(observation), 3, size, size):
            raise ValueError(
                f"{self.name} returned {tuple(faces.shape)} for {len(observation)} faces of {size} x {size} pixels, "
                "expected (N, 3, H, W)"
            )
        if not torch.isfinite(faces).all():
            raise ValueError(f"{self.name} recovered values that are not finite")
        return faces.clamp(0, 1)

    def _check_observation(self, observation: Observation) -> None:
        self._check_representations(observation.representations)
        given = {Capability.TEMPLATES: observation.templates, Capability.SCORES: observation.score}
        missing = [
            capability.value for capability, value in given.items() if capability in self.needs and value is None
        ]
        if missing:
            raise ValueError(f"{self.name} needs {' and '.join(missing)}, and the observation holds none")
        for name, value in (("templates", observation.templates), ("class centres", observation.enrolled)):
            if value is not None and not torch.isfinite(value).all():
                raise ValueError(f"{self.name} was handed {name} that are not finite")


class LinkageAttack(Attack):
    """Tells whether a representation and a plain face, or two representations, show the same person.

    Both maps end in one space; a score is the cosine there, higher for the same person.
    """

    @abstractmethod
    def encode_representations(self, representations: Tensor) -> Tensor:
        """Embeddings of intercepted representations, float (N, C, h, w) to (N, D), of any length."""

    def encode_interceptions(self, representations: Tensor) -> Tensor:
        """Embeddings of faces intercepted k times each, float (N, k, C, h, w) to (N, D), of any length.

        By default the mean of the unit embeddings of each interception.
        """
        embeddings = functional.normalize(self.encode_representations(representations.flatten(0, 1)).float(), dim=1)
        mean: Tensor = embeddings.unflatten(0, representations.shape[:2]).mean(dim=1)
        return mean

    @abstractmethod
    def encode_faces(self, faces: Tensor) -> Tensor:
        """Embeddings of suspects' plain faces, float (N, 3, H, W) in [0, 1] to (N, D), of any length."""

    @final
    def embed_representations(self, representations: Tensor) -> Tensor:
        """Embeddings of intercepted representations, float (N, C, h, w) to float32 (N, D), unit rows.

        Of faces intercepted k times, (N, k, C, h, w), one embedding each.

        Raises:
            ValueError: the attack is not fitted; representations of another shape; or something is not finite.
        """
        self._check_representations(representations)
        several = representations.ndim == 5
        return self._units(self.encode_interceptions if several else self.encode_representations, representations)

    @final
    def embed_faces(self, faces: Tensor) -> Tensor:
        """Embeddings of suspects' plain faces, float (N, 3, H, W) in [0, 1] to float32 (N, D), unit rows.

        Raises:
            ValueError: the attack is not fitted; faces of another shape; or something is not finite.
        """
        size = self.adversary.faces.shape[-1]
        sized = tuple(faces.shape[1:]) == (3, size, size)
        if not sized or not faces.is_floating_point() or not torch.isfinite(faces).all():
            raise ValueError(
                f"{self.name} embeds finite float faces (N, 3, {size}, {size}) in [0, 1], got {faces.dtype} "
                f"{tuple(faces.shape)}"
            )
        return self._units(self.encode_faces, faces)

    @torch.no_grad()
    def _units(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        self.eval()
        embeddings = encode(inputs.clone())  # an attack may work in place
        if embeddings.ndim != 2 or len(embeddings) != len(inputs):
            raise ValueError(
                f"{self.name} returned {tuple(embeddings.shape)} for {len(inputs)} inputs, expected (N, D)"
            )
        if not torch.isfinite(embeddings).all():
            raise ValueError(f"{self.name} returned embeddings that are not finite")
        return functional.normalize(embeddings.to(inputs.device, torch.float32), dim=1)


def _split(value: object) -> object:
    """``"16,32,64"``, as the command line passes it, to its parts."""
    return [part for part in value.replace(" ", "").split(",") if part] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split), Field(min_length=1)]
Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=8192)], ...], BeforeValidator(_split), Field(min_length=1, max_length=8)
]
