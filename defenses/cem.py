"""CEM: split inference whose features are trained to say little about a face but whose it is.

*Theoretical Insights in Model Inversion Robustness and Conditional Entropy Maximization for Collaborative Inference
Systems*, CVPR 2025: the noisy features of the first layers are sent, and a regulariser pulls the features of each class
together, which maximises a lower bound of the entropy of the face given what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench.randomness import base_seed, derived
from defenses.base import DefenseOptions, DefenseTraining, Shape
from defenses.client import ClientDefense, sgd, step_decay, train_jointly, with_noise

#: Channels of VGG11's convolutions, each followed by batch normalisation and ReLU, and where it pools (Simonyan and
#: Zisserman, ICLR 2015, table 1, A; the last pooling is left out).
VGG11: tuple[int | None, ...] = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512)
VGG11_WIDTH = 64
#: When the learning rate falls, as shares of 240 epochs, and by what.
MILESTONES, DECAY = (60 / 240, 120 / 240, 180 / 240, 210 / 240), 0.2
#: Faces that are grouped anew in each pass, at most.
_MOST_FACES = 20_000
_REFINEMENTS = 10


class CEMOptions(DefenseOptions):
    cut: int = Field(
        default=4, ge=1, le=len(VGG11), description="layers of VGG11 at the client, convolutions and poolings counted"
    )
    width: int = Field(
        default=64, ge=4, le=256, description="channels of the first convolution, the others in proportion; 64: VGG11"
    )
    channels: int = Field(default=8, ge=1, le=512, description="channels that are sent")
    noise: float = Field(
        default=0.025,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="standard deviation of the noise on features in 0..1; published .01, .025, .05, .1, .15",
    )
    weight: float = Field(
        default=16.0, ge=0, le=1e4, allow_inf_nan=False, description="of the regulariser; published 0, 8, 16"
    )
    clusters: int = Field(default=5, ge=1, le=64, description="groups that the features of each identity fall into")
    epochs: int = Field(default=240, ge=1, le=10_000, description="passes of the joint training over the faces")
    batch_size: int = Field(default=128, ge=2, le=65_536, description="faces per step of the joint training")
    learning_rate: float = Field(
        default=0.05,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="of SGD at first; a fifth after 60, 120, 180, 210/240",
    )


class Clusters:
    """Groups of features of each identity, and the regulariser that draws features to their middles.

    Attributes:
        centroids: (K, c, D), of K identities.
        sizes: (K, c), how many features lie nearest to each; 0 where there is no group.
        spreads: (K, c), their mean squared distance from there, per element.
    """

    def __init__(self, centroids: Tensor, sizes: Tensor, spreads: Tensor) -> None:
        self.centroids, self.sizes, self.spreads = centroids, sizes, spreads

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, identities: int, count: int, generator: torch.Generator) -> Clusters:
        """``count`` groups (fewer of fewer features) of features (N, D) with int64 labels (N,), by k-means++."""
        centroids = features.new_zeros(identities, count, features.shape[1])
        sizes, spreads = features.new_zeros(identities, count), features.new_zeros(identities, count)
        for label in labels.unique().tolist():
            own = features[labels == label]
            middles = k_means(own, min(count, len(own)), generator)
            centroids[label, : len(middles)] = middles
            everyone = middles[None].expand(len(own), -1, -1)
            distances, nearest = _nearest(own, everyone, torch.ones_like(everyone[..., 0], dtype=torch.bool))
            sizes[label].index_add_(0, nearest, torch.ones_like(distances))
            spreads[label].index_add_(0, nearest, distances)
        return cls(centroids, sizes, spreads / sizes.clamp(min=1))

    def penalty(self, features: Tensor, labels: Tensor, deviation: float) -> Tensor:
        """The regulariser for a batch of features (n, D) with labels (n,) under noise of this standard deviation.

        Of each identity in the batch, the sum over its groups there of w ReLU(log(v + .01) - log(.125 deviation^2 +
        .01)), with w the group's share of the identity and v its spread; then the mean over these identities. The
        spread is b times that of the batch plus (1 - b) times that of the last grouping, where b = min(10 n / size,
        .99) for n members of the group in the batch. Its gradient is that of the batch alone.
        """
        count = self.sizes.shape[1]
        present = self.sizes > 0
        distances, nearest = _nearest(features, self.centroids[labels], present[labels])
        known = present[labels].any(dim=1)  # of others than those that were grouped nothing is said
        cells, place = torch.unique((labels * count + nearest)[known], return_inverse=True)
        members = torch.zeros(len(cells), dtype=features.dtype, device=features.device)
        members = members.index_add(0, place, torch.ones_like(distances[known]))
        spread = torch.zeros_like(members).index_add(0, place, distances[known]) / members
        sizes = self.sizes.flatten()[cells]
        share = (10 * members / sizes).clamp(max=0.99)
        spread = share * spread + (1 - share) * self.spreads.flatten()[cells]
        own = cells.div(count, rounding_mode="floor")
        excess = functional.relu((spread + 0.01).log() - math.log(0.125 * deviation**2 + 0.01))
        total = (sizes / self.sizes.sum(dim=1)[own] * excess).sum()
        return total / max(1, len(own.unique()))


def _nearest(features: Tensor, centroids: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared distance (N,) of features (N, D) from the nearest of their centroids (N, c, D), and which.

    Centroids that are not ``present`` (N, c) are infinitely far. The distance is filled in, no centroid: where that is
    infinite, zero times infinity is the gradient.
    """
    distances = (features[:, None] - centroids).square().mean(dim=2)
    return distances.masked_fill(~present, torch.inf).min(dim=1)


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means (count, D) of groups of points (n, D), n >= count: Lloyd's algorithm from k-means++ (Arthur and
    Vassilvitskii, SODA 2007)."""
    middles = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    while len(middles) < count:
        # Equal points have no distance: then any one is as good.
        far = torch.cdist(points, middles).amin(dim=1).square().cpu() + 1e-12
        middles = torch.cat((middles, points[torch.multinomial(far, 1, generator=generator).to(points.device)]))
    for _ in range(_REFINEMENTS):
        nearest = torch.cdist(points, middles).argmin(dim=1)
        held = functional.one_hot(nearest, count).to(points)
        means = held.T @ points / held.sum(dim=0).clamp(min=1)[:, None]
        middles = torch.where((held.sum(dim=0) > 0)[:, None], means, middles)
    return middles


class CEM(ClientDefense):
    """Noisy features of VGG11's first layers, (N, channels, H/4, H/4) by default, within 0..1 but for the noise.

    The layers up to the cut, a 3x3 convolution to few channels and a sigmoid. They are trained jointly with a
    recogniser under the noise that is added later; the regulariser (:class:`Clusters`) reaches the client's network
    alone. At the start of every pass the features of each identity are grouped anew.
    """

    name = "cem"
    summary = "noisy features of VGG11's first layers, trained to say little but who it is (conditional entropy)"
    reference = "Conditional Entropy Maximization for Collaborative Inference, CVPR 2025"
    fidelity = "simplified"
    weakened: ClassVar[Mapping[str, Any]] = {"cut": 1, "channels": 64, "noise": 0.0, "weight": 0.0}
    hidden = "noise: on the features"
    learns = "the client's layers, jointly with a recogniser, and the regulariser's groups of features"
    Options = CEMOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"width": 8, "epochs": 3, "batch_size": 64},
        "cpu": {"width": 16, "epochs": 12},
    }
    options: CEMOptions

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        layers: list[nn.Module] = []
        held = 3
        for channels in VGG11[: self.options.cut]:
            if channels is None:
                layers.append(nn.MaxPool2d(2))
                continue
            channels = channels * self.options.width // VGG11_WIDTH
            layers += [nn.Conv2d(held, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            held = channels
        self._side = image_size >> VGG11[: self.options.cut].count(None)
        if not self._side:
            raise ValueError(f"faces of {image_size} pixels are too small for a cut behind {self.options.cut} layers")
        self.client = nn.Sequential(*layers, nn.Conv2d(held, self.options.channels, 3, padding=1), nn.Sigmoid())

    @property
    def representation_shape(self) -> Shape:
        """(channels, h, h), h half of the last one at every pooling, rounded down."""
        return (self.options.channels, self._side, self._side)

    def fit(self, training: DefenseTraining) -> None:
        """Train the client's network and a recogniser behind it to tell the provider's identities apart."""
        options = self.options
        recogniser, head = training.make_recogniser(self.representation_shape)
        grouped: list[tuple[torch.Generator, Clusters]] = []

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            if options.weight and (not grouped or grouped[0][0] is not generator):  # a new pass has a new one
                grouped[:] = [(generator, self._grouped(training, derived(base_seed(generator), "clusters")))]
            features = self.client(faces)
            value: Tensor = head(recogniser(with_noise(features, options.noise, generator)), labels)[0]
            if options.weight:
                value = value + options.weight * grouped[0][1].penalty(
                    features.float().flatten(1), labels, options.noise
                )
            return value

        train_jointly(
            training,
            {"client": self.client, "recogniser": recogniser, "head": head},
            sgd(options.learning_rate),
            loss,
            epochs=options.epochs,
            batch_size=options.batch_size,
            schedule=step_decay(training, options.batch_size, options.epochs, MILESTONES, DECAY),
        )

    @torch.no_grad()
    def _grouped(self, training: DefenseTraining, generator: torch.Generator) -> Clusters:
        """Groups of the features that the network gives now, in training mode, as batches are normalised by."""
        features, labels, count = [], [], 0
        for faces, own in training.batches(self.options.batch_size, generator):
            features.append(self.client(faces).float().flatten(1))
            labels.append(own)
            count += len(faces)
            if count >= _MOST_FACES:
                break
        return Clusters.of(
            torch.cat(features), torch.cat(labels), training.identities, self.options.clusters, generator
        )

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """Noisy features, computed in the network's own precision."""
        return with_noise(self.features(faces), self.options.noise, generator)
