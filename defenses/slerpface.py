"""SlerpFace: groups of features are turned far towards a key of each template, and part of their values dropped.

Zhong et al., *SlerpFace: Face Template Protection via Spherical Linear Interpolation*, AAAI 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench.randomness import base_seed, derived
from defenses.base import DefenseOptions, DefenseTraining
from defenses.client import train_jointly
from defenses.template import USUAL_SIZE, Misfit, TemplateDefense

#: Places of IR-50's last map, which a head makes up where a recogniser has none.
SIDE = 7
#: Channels between the two layers of the attention network.
_HIDDEN = 16
#: Cosine beyond which two directions count as one, or as opposite: there is no arc between them.
_PARALLEL = 1 - 1e-6


class SlerpFaceOptions(DefenseOptions):
    head: Literal["trained", "none"] = Field(
        default="trained",
        description="what is protected: trained, 16 features of each place of the recogniser's last map, by their "
        "attention; none, its embedding, cut into groups",
    )
    alpha: float = Field(default=0.9, ge=0, le=1, description="how far groups are turned to the key, less attention")
    group: int = Field(default=16, ge=2, le=512, description="values that are turned together")
    drop_rate: float = Field(
        default=0.5,
        ge=0,
        le=0.6,
        description="mean share of draws for zeros: 1.5 times it in groups below the median attention, else half of it",
    )
    replacement: bool = Field(
        default=True, description="whether a place can be drawn twice, which leaves fewer zeros: the released code"
    )
    epochs: int = Field(default=10, ge=1, le=10_000, description="passes over the faces that train the head")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step, of which all pairs are compared")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, allow_inf_nan=False, description="of Adam")


class Head(nn.Module):
    """Features of each place of a recogniser's last map (N, C, h, w), and the attention that the places get.

    1x1 convolution - BN - PReLU, and two convolutions beside it. From a map of one place, an embedding, linear layers
    make 7 x 7 places. Maps are normalised first.
    """

    def __init__(self, channels: int, places: tuple[int, int], group: int) -> None:
        super().__init__()
        features: list[nn.Module]
        attention: list[nn.Module]
        if math.prod(places) > 1:
            features = [nn.Conv2d(channels, group, 1, bias=False)]
            attention = [nn.Conv2d(channels, _HIDDEN, 1), nn.PReLU(_HIDDEN), nn.Conv2d(_HIDDEN, 1, 3, padding=1)]
        else:
            places = (SIDE, SIDE)
            count = math.prod(places)
            features = [nn.Flatten(), nn.Linear(channels, group * count, bias=False)]
            features.append(nn.Unflatten(1, (group, *places)))
            attention = [nn.Flatten(), nn.Linear(channels, count)]
        self.groups = math.prod(places)
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=None)
        self.features = nn.Sequential(*features, nn.BatchNorm2d(group, momentum=None), nn.PReLU(group))
        self.attention = nn.Sequential(*attention)

    def forward(self, faces: Tensor, mirrored: Tensor) -> Tensor:
        """Unit rows, float32 (N, groups x group), of the maps of faces and of their mirror images.

        Each group has the direction of both features' sum, and is as long as the softmax of both logits' mean says.
        """
        maps = self.norm(torch.cat((faces, mirrored)))
        features = sum(self.features(maps).float().flatten(2).mT.chunk(2))
        logits = sum(self.attention(maps).float().flatten(1).chunk(2)) / 2
        groups = logits.softmax(dim=1)[..., None] * functional.normalize(features, dim=2)
        return functional.normalize(groups.flatten(1), dim=1)


class SlerpFace(TemplateDefense):
    """Groups of 16 features, turned along the arc to a key's by 0.9 less their attention, and partly dropped.

    What is protected is one vector of groups, each as long as the attention m that its place gets, up to a common
    scale. Enrolment turns the direction z of group i towards the key's, k, by alpha_i = alpha - m_i of the angle
    between them (alpha_i is at least 0), drops values, and stores what is left at length m_i. Of 16 values, 12 draws
    drop some of a group whose attention lies below the median, and 4 of another. Directions and draws come of one
    number, the key; the released code draws both anew for every template.

    The key lies beside the template. A query is turned under it by its own attention, loses the values that the stored
    template lacks, and scores the mean cosine of the groups, weighed by the stored attention.

    The head of the released system is trained with a margin loss on millions of faces. Here the cosines of all pairs
    in a batch are brought to those of the frozen recogniser's embeddings: that needs few faces and no labels.
    """

    name = "slerpface"
    summary = "template of feature groups that are turned towards a key and partly dropped (spherical interpolation)"
    reference = (
        "Zhong et al., SlerpFace: Face Template Protection via Spherical Linear Interpolation, AAAI 2025: transforms "
        "as released; the head is distilled from the recogniser"
    )
    fidelity = "simplified"
    hidden = "key: a direction for each group, beside the template; and the values that were dropped"
    trainable = True  # unless it has no head
    learns = "features and attention of each place of the recogniser's last map, by the cosines of its embeddings"
    weakened: ClassVar[Mapping[str, Any]] = {"alpha": 0.05, "drop_rate": 0.0}
    departures: ClassVar[Mapping[str, str]] = {
        "replacement=true": "places to drop are drawn with replacement: 8.6 and 3.6 of 16 values, not 12 and 4"
    }
    key_stored = True
    Options = SlerpFaceOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {"epochs": 1}}
    options: SlerpFaceOptions
    head: Head | None

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.trainable = self.options.head == "trained"
        self.embedding_size = SIDE**2 * self.options.group if self.trainable else USUAL_SIZE
        self.register_module("head", None)

    # -- what is protected -----------------------------------------------------------------------

    def attach(self, recogniser: nn.Module, embedding_size: int) -> None:
        """Take the recogniser, in evaluation mode, and build the head on its maps, which have to be seen once.

        What is protected, ``self.embedding_size`` values, is what the head makes, whatever D = embedding_size is.
        """
        super().attach(recogniser, embedding_size)
        if not self.trainable:
            return
        shape = (3, self.image_size, self.image_size) if self.behind is None else self.behind.representation_shape
        device = next((held.device for held in recogniser.state_dict().values()), torch.device("cpu"))
        with torch.no_grad():
            self._map_shape = tuple(_maps(recogniser, torch.zeros(1, *shape, device=device)).shape[1:])
        if self.head is None:
            with torch.random.fork_rng(devices=[]):
                self.head = self._fresh_head().requires_grad_(False).to(device).train(self.training)
        self.embedding_size = self.head.groups * self.options.group

    def _fresh_head(self) -> Head:
        channels, *places = self._map_shape
        return Head(channels, (places[0], places[1]), self.options.group)

    def embed(self, faces: Tensor, generator: torch.Generator) -> Tensor:
        """Unprotected embeddings (N, D), unit rows, in the faces' type: the groups, or the recogniser's embedding."""
        if not self.trainable:
            return super().embed(faces, generator)
        recogniser = self.recogniser
        assert self.head is not None
        with torch.autocast(faces.device.type, enabled=False):
            groups: Tensor = self.head(*(_maps(recogniser, shown) for shown in self.seen(faces, generator)))
        return groups.to(faces.dtype)

    def fit(self, training: DefenseTraining) -> None:
        """Train the head until cosines within a batch are those of the recogniser's embeddings; labels are not used.

        Raises:
            ValueError: no recogniser is attached.
            DefenseError: the training diverged.
        """
        if not self.trainable:
            return
        recogniser, options = self.recogniser, self.options
        assert self.head is not None
        self.head = head = self._fresh_head().to(next(self.head.parameters()).device)

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            with torch.no_grad():
                shown = self.seen(faces, generator)
                embeddings = functional.normalize(sum(recogniser(side).float() for side in shown), dim=1)
                maps = [_maps(recogniser, side) for side in shown]
            return relation_loss(head(*maps), embeddings)

        train_jointly(
            training,
            {"head": head},
            lambda weights: [torch.optim.Adam(weights, lr=options.learning_rate)],
            loss,
            epochs=options.epochs,
            batch_size=options.batch_size,
        )
        self._measure(head, training)
        head.train(self.training)

    @torch.no_grad()
    def _measure(self, head: Head, training: DefenseTraining) -> None:
        """Statistics of the batch norms under the weights that were learnt: a fit of few steps leaves them behind."""
        for layer in head.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
        generator = derived(base_seed(training.generator), "statistics")
        for faces, _ in training.batches(self.options.batch_size, generator):
            head(*(_maps(self.recogniser, shown) for shown in self.seen(faces, generator)))

    # -- what is stored --------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """G, how many groups there are; the last is filled up with zeros."""
        return -(-self.embedding_size // self.options.group)

    @property
    def template_size(self) -> int:
        """G x group: 784 of IR-50's 7 x 7 places at 112 pixels."""
        return self.groups * self.options.group

    def bytes_per_face(self, dtype: torch.dtype = torch.float32) -> int:
        """Values that are not dropped, on average, a bit for each place, and the 8 bytes that the key is drawn from.

        The released code stores the key itself, as many values as the template has without its zeros.
        """
        kept = self.template_size - sum(
            groups * self._zeros(draws)
            for groups, draws in zip((self.groups // 2, -(-self.groups // 2)), self.draws, strict=True)
        )
        return math.ceil(kept * dtype.itemsize) + math.ceil(self.template_size / 8) + 8

    @property
    def draws(self) -> tuple[int, int]:
        """How many values are drawn to be dropped, of a group below the median attention and of another."""
        most = self.options.group - 1
        below, other = (round(share * self.options.drop_rate * self.options.group) for share in (1.5, 0.5))
        return min(below, most), min(other, most)

    def _zeros(self, draws: int) -> float:
        """How many different values are drawn, on average."""
        size = self.options.group
        return size * (1 - (1 - 1 / size) ** draws) if self.options.replacement else draws

    def expand(self, key: Tensor) -> Tensor:
        """A direction for each group, and at which draw each of its values is dropped: float32 (2, G, group).

        Directions are uniform on the sphere. Draws count from 0; values that are never drawn have infinity.
        """
        generator, shape = torch.Generator().manual_seed(int(key)), (self.groups, self.options.group)
        directions = functional.normalize(torch.randn(shape, generator=generator), dim=1)
        draws = torch.full(shape, torch.inf)
        if self.options.replacement:
            drawn = torch.randint(shape[1], (shape[0], max(self.draws)), generator=generator)
        else:
            drawn = torch.rand(shape, generator=generator).argsort(dim=1)
        for draw in reversed(range(drawn.shape[1])):  # the first one counts
            draws.scatter_(1, drawn[:, draw, None], draw)
        return torch.stack((directions, draws))

    def _expanded(self, keys: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`expand` gives for each row of ``like``, (N, G, group) each."""
        directions, draws = self.secrets(keys, like).reshape(len(like), 2, self.groups, self.options.group).unbind(1)
        return directions, draws

    def checked(self, embeddings: Tensor) -> Tensor:
        """The embeddings (N, D), unit rows.

        Raises:
            ValueError: one is not finite, or they are of another size than is protected.
        """
        if embeddings.ndim == 2 and embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"{self.name} protects {self.embedding_size} values, got {tuple(embeddings.shape)}")
        return super().checked(embeddings)

    def enrol(self, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Templates (N, G x group): turned groups, some values of which are zero, each as long as its attention.

        Raises:
            ValueError: an embedding is not finite or of another size, or keys are not this defence's.
        """
        units, attention = self._cut(self.checked(embeddings))
        directions, draws = self._expanded(keys, embeddings)
        turned = slerp(units, directions, self._share(attention))
        ordered = attention.sort(dim=1).values
        median = (ordered[:, [(self.groups - 1) // 2]] + ordered[:, [self.groups // 2]]) / 2
        below, other = self.draws
        kept = draws >= torch.where(attention < median, below, other)
        return (attention * functional.normalize(turned * kept, dim=2)).flatten(1)

    def _cut(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (..., G, group) and attention (..., G, 1), of sum 1, of rows (..., D) of any length."""
        groups = functional.pad(rows, (0, self.template_size - rows.shape[-1])).unflatten(
            -1, (self.groups, self.options.group)
        )
        lengths = groups.norm(dim=-1, keepdim=True)
        return functional.normalize(groups, dim=-1), lengths / lengths.sum(dim=-2, keepdim=True).clamp(min=1e-30)

    def _share(self, attention: Tensor) -> Tensor:
        """How much of the arc groups of this attention are turned by: alpha_i."""
        return (self.options.alpha - attention).clamp(min=0)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores (N,) in [-1, 1] of a stored template, ``first``, and another under the same key, row by row.

        The mean cosine of their groups over the values that both have, weighed by the attention of the first.

        Raises:
            ValueError: templates of another size: those of another system.
        """
        self.same_system(first, second)
        stored, attention = self._cut(first)
        query, _ = self._cut(second)
        both = (stored != 0) & (query != 0)
        return (attention * functional.cosine_similarity(stored * both, query * both, dim=2)[..., None]).sum(dim=(1, 2))

    def match(self, stored: Tensor, embeddings: Tensor, keys: Tensor | None, generator: torch.Generator) -> Tensor:
        """Scores (N,) in [-1, 1] of fresh embeddings (N, D), which lose what the ``stored`` templates lack."""
        units, attention = self._cut(self.checked(embeddings))
        turned = slerp(units, self._expanded(keys, embeddings)[0], self._share(attention))
        return self.compare(stored, turned.flatten(1))

    # -- what it tells an adversary --------------------------------------------------------------

    def misfit(self, templates: Tensor, keys: Tensor) -> Misfit:
        """How far embeddings, with the zeros of the ``templates`` (N, T), are from making them under their ``keys``.

        The squared distance, relative to the template's square.
        """
        self.same_system(templates, templates)
        stored, attention = self._cut(templates[:, None])
        target, directions = attention * stored, self._expanded(keys, templates)[0][:, None]

        def misfit(embeddings: Tensor) -> Tensor:
            units, own = self._cut(embeddings)
            turned = slerp(units, directions, self._share(own)) * (stored != 0)
            missed = own * functional.normalize(turned, dim=3) - target
            return missed.square().sum(dim=(2, 3)) / target.square().sum(dim=(2, 3))

        return misfit

    def estimate(self, templates: Tensor, keys: Tensor) -> Tensor:
        """Embeddings (N, D) up to their length: the groups turned back, as far as they were stored; zeros elsewhere.

        A group's length is its attention, and tells how far it was turned. One without zeros comes back as it was.
        Of another neither its angle to the key nor how long the drop left it is known: a right angle and the expected
        length are assumed, and what lies along the key is left out. Of several estimates, each value is best averaged
        over those that have it.
        """
        self.same_system(templates, templates)
        stored, attention = self._cut(templates)
        turned_back = unslerp(stored, self._expanded(keys, templates)[0], self._share(attention))
        return (attention * turned_back).flatten(1)[:, : self.embedding_size]


def _maps(recogniser: nn.Module, shown: Tensor) -> Tensor:
    """The last feature map (N, C, h, w) that a recogniser makes of what it is shown, or its embedding as one place."""
    last = getattr(recogniser, "maps", None)
    maps: Tensor = recogniser(shown)[..., None, None] if last is None else last(shown)
    return maps.float()


def relation_loss(embeddings: Tensor, targets: Tensor) -> Tensor:
    """The mean squared difference of the cosines of all pairs, of embeddings (n, D) and targets (n, D'), unit rows."""
    count = len(embeddings)
    apart = (embeddings @ embeddings.mT - targets @ targets.mT).square()
    return apart.masked_fill(torch.eye(count, dtype=torch.bool, device=apart.device), 0).sum() / max(
        1, count * (count - 1)
    )


def slerp(units: Tensor, keys: Tensor, share: Tensor) -> Tensor:
    """Unit vectors (..., g), turned to the keys' (..., g) by a share (..., 1) of the angle between them."""
    angle = (units * keys).sum(dim=-1, keepdim=True).clamp(-_PARALLEL, _PARALLEL).acos()
    return (((1 - share) * angle).sin() * units + (share * angle).sin() * keys) / angle.sin()


def unslerp(turned: Tensor, keys: Tensor, share: Tensor) -> Tensor:
    """About the unit vectors (..., g) that :func:`slerp` turned, of which values were then dropped, as exact zeros.

    ``turned`` is of length 1 in spite of these.
    """
    held = turned != 0
    left = keys * held
    key = functional.normalize(left, dim=-1)
    along = (turned * key).sum(dim=-1, keepdim=True)
    across = turned - along * key
    angle = along.clamp(-1, 1).acos() / (1 - share).clamp(min=1e-6)
    exact = angle.cos() * key + angle.sin() * functional.normalize(across, dim=-1)
    own, keyed = ((part * torch.pi / 2).sin() for part in ((1 - share).clamp(min=1e-6), share))
    rate = held.to(turned).mean(dim=-1, keepdim=True)
    length = (own.square() * rate + (keyed * left).square().sum(dim=-1, keepdim=True)).sqrt()
    return torch.where(held.all(dim=-1, keepdim=True), exact, length / own * across)
