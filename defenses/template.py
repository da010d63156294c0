"""The contract of a template defence: what is stored of a face, made of a recogniser's embedding under a key."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from defenses.base import Defense, DefenseOptions, Shape

#: How far embeddings, float (N, S, D) and unit rows, S for each of N templates, are from making it: (N, S), from 0 on.
Misfit = Callable[[Tensor], Tensor]

#: D of the field's recognisers, until one is attached.
USUAL_SIZE = 512

#: Seeds of keys lie below.
_SEEDS = 2**62


class TemplateDefense(Defense):
    """Protects what is stored of a face: the embedding of a recogniser, of plain faces or behind another defence.

    A subclass says how long a template is, what one key stands for (:meth:`expand`), what becomes of embeddings
    under it (:meth:`enrol`), how two templates compare, and what a template tells of its embedding (:meth:`misfit`).
    ``protect`` gives templates (N, T, 1, 1). The recogniser belongs to the mechanism that an adversary is told, as it
    runs at the client, but not to the defence's own weights: the harness attaches it. Terms are those of ISO/IEC 24745:
    the template is its pseudonymous identifier, the key its auxiliary data.

    Attributes:
        key_stored: whether the key lies beside the template, so that who steals one has both, and who is to be
            verified brings the face alone.
    """

    level = "template"
    key_stored: ClassVar[bool] = False

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.embedding_size = USUAL_SIZE
        # Tuples, of which nn.Module takes no notice.
        self._attached: tuple[nn.Module, ...] = ()
        self._behind: tuple[Defense, ...] = ()

    # -- the recogniser in front of it -----------------------------------------------------------

    @property
    def behind(self) -> Defense | None:
        """The defence that protects the face on its way to the recogniser; None where that sees plain faces."""
        return self._behind[0] if self._behind else None

    def attach(self, recogniser: nn.Module, embedding_size: int) -> None:
        """Take the recogniser whose embeddings are protected.

        It maps plain faces (N, 3, H, W), or what the defence sends which this one stands :attr:`behind`, to embeddings
        (N, D), D = embedding_size.
        """
        self._attached, self.embedding_size = (recogniser,), embedding_size

    @property
    def recogniser(self) -> nn.Module:
        """The recogniser.

        Raises:
            ValueError: none is attached yet.
        """
        if not self._attached:
            raise ValueError(f"{self.name} protects embeddings and has no recogniser to make them: attach one")
        return self._attached[0]

    def seen(self, faces: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the recogniser is shown of faces and of their mirror images, under one state of each: float32."""
        pictures = faces.float()
        if (behind := self.behind) is None:
            return pictures, pictures.flip(-1)
        sent = behind.protect(pictures, generator)
        mirrored = behind.protect(pictures.flip(-1), generator, state=sent.state, keys=sent.keys)
        return sent.representation, mirrored.representation

    def embed(self, faces: Tensor, generator: torch.Generator) -> Tensor:
        """Unprotected embeddings (N, D) of faces and their mirror images together, unit rows, in the faces' type.

        Differentiable in the faces where the recogniser and the defence before it are.
        """
        recogniser = self.recogniser
        with torch.autocast(faces.device.type, enabled=False):
            face, mirrored = self.seen(faces, generator)
            both = recogniser(face) + recogniser(mirrored)
        return functional.normalize(both.to(faces.dtype), dim=1)

    # -- what is stored --------------------------------------------------------------------------

    @property
    @abstractmethod
    def template_size(self) -> int:
        """T, values of a template; known once a recogniser is attached, where it depends on the embedding."""

    @property
    def representation_shape(self) -> Shape:
        """(T, 1, 1)."""
        return (self.template_size, 1, 1)

    def draw_keys(self, count: int, generator: torch.Generator) -> Tensor | None:
        """A seed for each client, int64 (count, 1), by default; what it stands for is :meth:`expand`'s to say."""
        return torch.randint(_SEEDS, (count, 1), generator=generator, device=generator.device).cpu()

    def expand(self, key: Tensor) -> Tensor:
        """What one key, int64 (k,), stands for: float32, on the CPU; everything that is drawn from it."""
        raise NotImplementedError(f"{self.name} has keys and must say what one stands for")

    def secrets(self, keys: Tensor | None, like: Tensor) -> Tensor:
        """What the keys int64 (N, k) of N templates stand for, stacked (N, ...), of the type and device of ``like``.

        Raises:
            ValueError: keys of another shape or type than this defence draws, or not as many as the rows of ``like``.
        """
        distinct, place = self._distinct(keys, like)
        expanded = torch.stack([self.expand(key) for key in distinct]) if len(distinct) else torch.empty(0)
        return expanded.to(like.device, like.dtype)[place.to(like.device)]

    def by_key(self, keys: Tensor | None, rows: Tensor, made: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``made(rows, secret)`` of the rows (N, ...) of each client in turn: what keys stand for may fill the memory.

        Raises:
            ValueError: as :meth:`secrets`.
        """
        distinct, place = self._distinct(keys, rows)
        if not len(distinct):  # what is made of no rows still has its shape
            drawn = self.draw_keys(1, torch.Generator().manual_seed(0))
            assert drawn is not None
            distinct = drawn
        parts = [(place == number).nonzero().flatten().to(rows.device) for number in range(len(distinct))]
        done = [
            made(rows[part], self.expand(key).to(rows.device, rows.dtype))
            for part, key in zip(parts, distinct, strict=True)
        ]
        together = torch.cat(done)
        return together[torch.cat(parts).argsort()]

    def _distinct(self, keys: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct keys (K, k), and the place among them of each row's, int64 (N,)."""
        drawn = self.draw_keys(1, torch.Generator().manual_seed(0))
        assert drawn is not None
        expected = (len(like), drawn.shape[1])
        if keys is None or tuple(keys.shape) != expected or keys.dtype != torch.int64:
            got = "none" if keys is None else f"{str(keys.dtype).removeprefix('torch.')} {tuple(keys.shape)}"
            raise ValueError(f"{self.name} needs keys int64 {expected}, a row for each embedding, got {got}")
        distinct, place = torch.unique(keys.cpu(), dim=0, return_inverse=True)
        return distinct, place

    @abstractmethod
    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Templates (N, T) of embeddings (N, D), unit rows, under the keys int64 (N, k) of their clients.

        Raises:
            ValueError: an embedding is not finite or of another size, or keys are not this defence's.
        """

    @abstractmethod
    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores (N,) of templates (N, T), row by row, higher for the same person; of any length of the rows.

        Raises:
            ValueError: templates of another size: those of another system.
        """

    def match(self, stored: Tensor, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Scores (N,) of fresh embeddings (N, D) against ``stored`` templates (N, T) under the keys that are shown."""
        return self.compare(stored, self.enrol(embeddings, keys, generator))

    # -- what it tells an adversary --------------------------------------------------------------

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit | None:
        """How far embeddings are from making the ``templates`` (N, T) under stolen ``keys``; differentiable.

        An adversary who knows the mechanism and the keys looks for embeddings that do. None of a defence that does not
        say: then the adversary learns from examples.
        """
        return None

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor | None:
        """What a closed form makes of templates (N, T) and stolen ``keys``: about the embeddings (N, D), or None."""
        return None

    # -- the contract of every defence -----------------------------------------------------------

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Templates of a defence without keys, (N, T, 1, 1)."""
        return self.enrol(self.embed(faces, generator), None, generator)[..., None, None]

    def keyed_transform(self, faces: Tensor, state: Tensor | None, keys: Tensor, generator: torch.Generator) -> Tensor:
        """Templates under keys, (N, T, 1, 1)."""
        return self.enrol(self.embed(faces, generator), keys, generator)[..., None, None]

    def checked(self, embeddings: Tensor) -> Tensor:
        """The embeddings (N, D), unit rows.

        Raises:
            ValueError: one is not finite, or they are of another size than the recogniser's.
        """
        if embeddings.ndim != 2 or (self._attached and embeddings.shape[1] != self.embedding_size):
            raise ValueError(
                f"{self.name} protects embeddings (N, {self.embedding_size}), got {tuple(embeddings.shape)}"
            )
        if not torch.isfinite(embeddings).all():
            wrong = int((~torch.isfinite(embeddings)).any(dim=1).sum())
            raise ValueError(f"{self.name}: {wrong} of {len(embeddings)} embeddings are not finite: nothing is stored")
        return functional.normalize(embeddings, dim=1)

    def same_system(self, first: Tensor, second: Tensor) -> None:
        """Refuse templates that are not of this system.

        Raises:
            ValueError: two different shapes, or templates of another size than are made here.
        """
        size = self.template_size
        if first.shape != second.shape or first.ndim != 2 or first.shape[1] != size:
            raise ValueError(
                f"{self.name} compares templates (N, {size}) of its own, got {tuple(first.shape)} and "
                f"{tuple(second.shape)}: those of another system cannot be compared"
            )
