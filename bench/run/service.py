"""What an attacker can reach of a system: queries to service and client, stolen templates, intercepted traffic."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import ScoreQuery, Traffic
from bench.data.faces import FaceSet
from bench.errors import DataError
from bench.images import to_float
from bench.memory import in_halves
from bench.metrics.identity import content_ids
from bench.nets.recogniser import Recogniser
from defenses.base import Defense
from defenses.template import TemplateDefense

#: Images of a person, other than the attacked one, whose mean embedding is the person's class centre.
ENROLMENT_IMAGES = 8
#: Pictures that the client protects at once. What they draw depends on it.
CLIENT_BATCH = 64


class Service:
    """Protects what it is sent, as a client does, and embeds it, as the provider does.

    Args:
        recogniser: the provider's, trained behind ``defense``.
        defense: the one in use, with its true secret.
        draws: gives the generator of state and noise of the n-th face that is sent.
        batch_size: faces at once.
    """

    def __init__(
        self, recogniser: Recogniser, defense: Defense, draws: Callable[[int], torch.Generator], *, batch_size: int
    ) -> None:
        self._recogniser = recogniser.eval()
        self._defense = defense
        self._draws = draws
        self._batch_size = batch_size
        self._device = recogniser.device
        self.queries = 0

    @torch.no_grad()
    def embed_representations(self, representations: Tensor) -> Tensor:
        """Unit embeddings float32 (N, D) of representations (N, C, h, w)."""

        def embed(rows: slice) -> Tensor:
            return self._recogniser.embed(representations[rows].to(self._device))

        return torch.cat(list(in_halves(embed, len(representations), self._batch_size, "the service")))

    @torch.no_grad()
    def embed(
        self, faces: Tensor, generators: Sequence[torch.Generator] | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """An :data:`attacks.base.EmbeddingQuery`; the embeddings come on the device of ``faces``.

        ``generators``, one per face, stand in for the service's own draws; ``keys``, int64 (M, k), for those of new
        clients.
        """
        if generators is None:
            generators = [self._draws(number) for number in range(self.queries, self.queries + len(faces))]
        self.queries += len(faces)
        parts = []
        for start in range(0, len(faces), self._batch_size):
            rows = slice(start, start + self._batch_size)
            batch, held = faces[rows].detach().to(self._device), None if keys is None else keys[rows]
            sent = self._defense.protect_each(batch, generators[rows], keys=held)
            parts.append(self.embed_representations(sent.representation))
        return torch.cat(parts).to(faces.device) if parts else faces.new_zeros(0, self._recogniser.spec.embedding_size)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores (N,) of unit embeddings (N, D): the cosine, or what a template defence compares by."""
        defense = self._defense
        return defense.compare(first, second) if isinstance(defense, TemplateDefense) else (first * second).sum(dim=1)


class Client:
    """The client of the defence in use in the attacker's own hands: an :data:`attacks.base.ProtectionQuery`.

    What a batch draws depends on its pictures and on how often it was sent before, and not on what else was sent, so
    that a fit which goes on after it was killed is shown what it would have been shown.

    Args:
        defense: the one in use, with its true secret.
        draws: gives the generator that is called so.
        device: where to protect.
    """

    def __init__(self, defense: Defense, draws: Callable[[str], torch.Generator], device: torch.device) -> None:
        self._defense, self._draws, self._device = defense, draws, device
        self._key = defense.draw_keys(1, draws("key"))
        self._sent: Counter[str] = Counter()
        self.queries = 0

    @torch.no_grad()
    def __call__(self, faces: Tensor) -> Tensor:
        """What the client sends, float32 (M, C, h, w), on the device of ``faces``.

        Raises:
            ValueError: as :meth:`~defenses.base.Defense.protect`.
        """
        sent = [faces.new_zeros(0, *self._defense.representation_shape, dtype=torch.float32)]
        for batch in faces.detach().split(CLIENT_BATCH):
            if not len(batch):
                continue
            pictures = hashlib.sha256(batch.cpu().contiguous().numpy().tobytes()).hexdigest()
            generator = self._draws(f"{pictures}/{self._sent[pictures]}")
            self._sent[pictures] += 1
            keys = None if self._key is None else self._key.expand(len(batch), -1)
            protected = self._defense.protect(batch.to(self._device), generator, keys=keys)
            self.queries += len(batch)
            sent.append(protected.representation.to(faces.device, torch.float32))
        return torch.cat(sent)


def score_query(
    service: Service, templates: Tensor, generators: Sequence[torch.Generator], keys: Tensor | None = None
) -> ScoreQuery:
    """The scores that the service answers with about N persons, enrolled with one template each.

    Args:
        service: does the comparing.
        templates: float32 (N, D), unit rows.
        generators: N; faces that are compared with a person are protected under that person's draws,
        keys: int64 (N, k), and under that person's key; None where there are none.

    Returns:
        A query that raises :class:`ValueError` if not asked about one enrolled person per face.
    """

    def score(faces: Tensor, persons: Tensor) -> Tensor:
        if persons.shape != faces.shape[:1] or persons.dtype != torch.int64:
            raise ValueError(f"a score query names one person, int64, per face: {len(faces)} faces, {persons.shape}")
        if len(persons) and not 0 <= int(persons.min()) <= int(persons.max()) < len(templates):
            raise ValueError(f"persons are numbered 0..{len(templates) - 1}")
        draws = [generators[person] for person in persons.tolist()]
        embeddings = service.embed(faces, draws, None if keys is None else keys[persons.cpu()])
        return service.compare(embeddings, templates.to(faces.device)[persons.to(faces.device)])

    return score


def other_images(victims: FaceSet, content: Tensor, image: int) -> Tensor:
    """The other images of the person on a victim ``image``, no copies of it, int64, ascending.

    ``content`` are the :func:`~bench.metrics.identity.content_ids` of all ``victims``.

    Raises:
        ValueError: the person has no other image.
    """
    same = (victims.labels == victims.labels[image]) & (content != content[image])
    if not same.any():
        raise ValueError(f"{victims.names[int(victims.labels[image])]} has no other image to be enrolled with")
    return same.nonzero().flatten()


def class_centres(
    service: Service,
    victims: FaceSet,
    content: Tensor,
    index: Tensor,
    generators: Sequence[torch.Generator],
    keys: Tensor | None = None,
) -> Tensor:
    """The class centre of the person on each image of ``index``, from other images of that person: float32 (N, D).

    At most :data:`ENROLMENT_IMAGES` images, drawn at random, none of them a copy of the attacked one by
    ``content``, the :func:`~bench.metrics.identity.content_ids` of all ``victims``. There is a generator per image of
    ``index``, int64 (N,), and in ``keys``, if any, a key of every victim image's client.

    Raises:
        ValueError: a person has no other image.
    """
    centres = []
    for image, generator in zip(index.tolist(), generators, strict=True):
        others = other_images(victims, content, image)
        chosen = others[torch.randperm(len(others), generator=generator)[:ENROLMENT_IMAGES]]
        images = to_float(victims.images[chosen])
        held = None if keys is None else keys[chosen]
        centres.append(F.normalize(service.embed(images, [generator] * len(images), held).mean(dim=0), dim=0))
    return torch.stack(centres)


def traffic_query(
    defense: Defense,
    victims: FaceSet,
    attacked: Tensor,
    draws: Callable[[int], torch.Generator],
    *,
    batch_size: int,
    device: torch.device,
    keys: Tensor | None = None,
) -> Traffic:
    """Requests of those of the ``victims`` of whom no image is ``attacked``, in a random order, repeated as need be.

    Nobody's who is attacked, not even under another name: a copy of any image of theirs is left out.

    Raises:
        DataError: as it is asked for requests, where nobody else is there.
    """

    def intercept(count: int) -> Iterator[Tensor]:
        theirs, content = torch.isin(victims.labels, victims.labels[attacked]), content_ids(victims.images)
        others = (~torch.isin(content, content[theirs])).nonzero().flatten()
        if not len(others):
            raise DataError(
                "intercepted traffic: every victim is attacked, so nobody else's requests are there; "
                "give fewer --probes, or a dataset with more people"
            )
        assert not torch.isin(victims.labels[others], victims.labels[attacked]).any()
        order = others[torch.randperm(len(others), generator=draws(-1))]
        index = order[torch.arange(count) % len(order)]
        for start in range(0, count, batch_size):
            part = index[start : start + batch_size]
            generators = [draws(number) for number in range(start, start + len(part))]
            held = None if keys is None else keys[part]
            yield defense.protect_each(to_float(victims.images[part].to(device)), generators, keys=held).representation

    return intercept
