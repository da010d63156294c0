"""PRO-Face C: an obfuscated picture for people to see, and a client's feature maps for recognition.

*PRO-Face C: Privacy-Preserving Recognition of Obfuscated Face via Feature Compensation*, IEEE TIFS 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench.nets.iresnet import initialise
from bench.nets.mobilefacenet import BOTTLENECKS, Bottleneck, convolution
from bench.randomness import drawn_seed
from defenses import draws
from defenses.base import DefenseOptions, DefenseTraining, Shape
from defenses.client import ClientDefense, sgd, step_decay, train_jointly
from defenses.linear import blur_matrix, mosaic_matrix

#: Lengths in pixels of 112: the median's window, the Gaussian's and its standard deviations, the sides of a mosaic's
#: squares. A picture is cut into so many patches along a side.
MEDIAN, GAUSSIAN, DEVIATIONS, SQUARES, PATCHES = 13, 31, (2.0, 8.0), (4, 10), (2, 5)
#: Standard deviation of the blur that the client takes away: the middle of :data:`DEVIATIONS`.
BLURRED = 5.0
#: Channels of MobileFaceNet's first layers, of what the client sends at half the face's size, and of the other maps.
PUBLISHED_WIDTH, GROWTH = 64, (1, 2, 4, 8)
#: Side of the blocks of 28 x 28, as they are meant; released code has blocks of 28 values a side.
BLOCK = 2
#: When the learning rate falls to a tenth, as shares of 30 epochs.
MILESTONES, DECAY = (5 / 30, 10 / 30, 16 / 30, 22 / 30), 0.1
#: Values that a median is taken of at once.
_MEDIAN_VALUES = 2**24


class ProFaceCOptions(DefenseOptions):
    width: int = Field(
        default=64,
        ge=2,
        le=256,
        multiple_of=2,
        description="channels of the first map that is sent (2, 4, 8 times as many of the others); published: 64",
    )
    shuffle: Literal["paper", "official", "none"] = Field(
        default="paper",
        description="the first map's blocks in a random order: of 2x2 values; quarters, as in released code; or not",
    )
    strength: float = Field(
        default=1.0,
        ge=0,
        le=4,
        allow_inf_nan=False,
        description="multiple of the lengths of the obfuscation; 0 sends the picture as it is",
    )
    match: float = Field(
        default=1.0,
        ge=0,
        le=1e4,
        allow_inf_nan=False,
        description="weight of the squared distance from a plain recogniser's unit embedding; 0 trains no plain one",
    )
    table_seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the order of the blocks")
    epochs: int = Field(default=30, ge=1, le=10_000, description="passes of the joint training over the faces")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of the joint training")
    learning_rate: float = Field(
        default=0.1, gt=0, le=1, allow_inf_nan=False, description="of SGD at first; a tenth after 5, 10, 16, 22 of 30"
    )


class Client(nn.Module):
    """MobileFaceNet tapped behind its blocks, each tap enlarged and mixed by a learnt 1x1 convolution.

    (N, 3, H, W) to maps of w, 2w, 4w and 8w channels at 1/2, 1/4, 1/8 and 1/16 of the size, rounded up.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return channels * width // PUBLISHED_WIDTH

        held = width
        blocks: list[nn.Module] = [
            convolution(3, held, 3, stride=2, padding=1),
            convolution(held, held, 3, padding=1, groups=held),
        ]
        for expansion, channels, repetitions, stride in BOTTLENECKS:
            layers = []
            for repetition in range(repetitions):
                layers.append(Bottleneck(held, scaled(channels), 1 if repetition else stride, expansion))
                held = scaled(channels)
            blocks.append(nn.Sequential(*layers))
        # Tapped are the ends of the three resolutions, and the last convolution.
        self.stages = nn.ModuleList(
            [
                nn.Sequential(*blocks[:3]),
                nn.Sequential(*blocks[3:5]),
                nn.Sequential(*blocks[5:7]),
                convolution(held, 8 * width, 1),
            ]
        )
        taps = scaled(64), scaled(128), scaled(128), scaled(512)
        self.mixers = nn.ModuleList(nn.Conv2d(tap, growth * width, 1) for tap, growth in zip(taps, GROWTH, strict=True))
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The four maps, the largest first."""
        maps, side = [], x.shape[-1]
        for stage, mixer in zip(self.stages, self.mixers, strict=True):
            x, side = stage(x), (side + 1) // 2
            maps.append(mixer(functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)))
        return maps


class ProFaceC(ClientDefense):
    """Parts: ``picture`` (N, 3, H, W) in [0, 1], and ``stage-1`` .. ``stage-4``, w to 8w channels at H/2 .. H/16.

    *Picture*: cut into 4, 9, 16 or 25 patches, each under a median, a Gaussian blur or a mosaic, a third each; the
    widths of the latter two are drawn for each face. *Maps*: of a MobileFaceNet at the client that sees what a blur
    takes away from the face, the blocks of the first map in an order that provider and clients share (the secret).
    Recognition behind it is the suite's own, trained on all parts together; the published server adds the maps to the
    stages of a frozen network. In training, embeddings are drawn to those of a plain recogniser trained along, where a
    ready one is published.
    """

    name = "proface-c"
    summary = "an obfuscated picture, and feature maps of a client network that sees what was blurred away"
    reference = "PRO-Face C: Privacy-Preserving Recognition of Obfuscated Face via Feature Compensation, IEEE TIFS 2024"
    fidelity = "simplified"
    weakened: ClassVar[Mapping[str, Any]] = {"strength": 0.0, "shuffle": "none"}
    hidden = "secret: order of the first map's blocks; noise: which patch is obfuscated how"
    learns = "the client's network, jointly with a recogniser"
    departures: ClassVar[Mapping[str, str]] = {
        "shuffle=official": "a number of blocks is taken for their size: four blocks are shuffled, in one fixed order",
    }
    Options = ProFaceCOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"width": 4, "epochs": 2, "match": 0},
        "cpu": {"width": 8, "epochs": 2, "match": 0},
    }
    options: ProFaceCOptions
    order: Tensor
    mosaics: Tensor
    blurred: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        size = image_size
        self._sides = [-(-size // 2**stage) for stage in range(1, len(GROWTH) + 1)]
        self._block = self._sides[0] // 2 if self.options.shuffle == "official" else BLOCK
        drawn = torch.Generator().manual_seed(self.options.table_seed)
        self.register_buffer("order", torch.randperm((self._sides[0] // self._block) ** 2, generator=drawn))
        if self.options.shuffle == "none":
            self.order = torch.arange(len(self.order))
        mosaics = [mosaic_matrix(size, max(1, round(side * self._scale))) for side in range(SQUARES[0], SQUARES[1] + 1)]
        self.register_buffer("mosaics", torch.stack(mosaics), persistent=False)
        reach = max(1, min(size - 1, round((GAUSSIAN - 1) / 2 * size / 112)))
        self.register_buffer("blurred", blur_matrix(size, BLURRED * size / 112, reach), persistent=False)
        self.client = Client(self.options.width)

    @property
    def _scale(self) -> float:
        """Pixels of the face for a pixel of the template, times the strength."""
        return self.options.strength * self.image_size / 112

    @property
    def parts(self) -> dict[str, Shape]:
        """``picture`` and ``stage-1`` to ``stage-4``."""
        maps = {
            f"stage-{number}": (growth * self.options.width, side, side)
            for number, (growth, side) in enumerate(zip(GROWTH, self._sides, strict=True), start=1)
        }
        return {"picture": (3, self.image_size, self.image_size), **maps}

    @property
    def representation_shape(self) -> Shape:
        """(3 + 15 w, H, W)."""
        return (sum(shape[0] for shape in self.parts.values()), self.image_size, self.image_size)

    @property
    def secret(self) -> dict[str, Tensor]:
        """``order`` of the first map's blocks, where it is not that of the released code."""
        return {"order": self.order} if self.options.shuffle == "paper" else {}

    def guess(self, generator: torch.Generator) -> Self:
        """The mechanism with another order, and the same network, which is public."""
        if not self.secret:
            return self
        seed = drawn_seed(generator)
        other = type(self)(self.options.model_copy(update={"table_seed": seed}), image_size=self.image_size)
        other.client = self.client
        return other.train(self.training)

    # -- what it sends ---------------------------------------------------------------------------

    def obfuscated(self, faces: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures (N, 3, H, W) in which every patch is filtered in one of three ways."""
        if not self.options.strength:
            return faces
        count, size = len(faces), self.image_size

        def uniform(*shape: int) -> Tensor:
            return draws.uniform(shape, generator, faces.device)

        grid = PATCHES[0] + (uniform(count) * (PATCHES[1] - PATCHES[0] + 1)).long()
        filters = (3 * uniform(count, PATCHES[1], PATCHES[1])).long()
        deviation = self._scale * (DEVIATIONS[0] + (DEVIATIONS[1] - DEVIATIONS[0]) * uniform(count))
        mosaic = self.mosaics[(uniform(count) * len(self.mosaics)).long()]
        reach = max(1, min(size - 1, round((GAUSSIAN - 1) / 2 * self._scale)))
        blur = blur_matrix(size, deviation, reach)
        patch = torch.arange(size, device=faces.device) * grid[:, None] // size  # (N, H)
        chosen = filters[torch.arange(count, device=faces.device)[:, None, None], patch[:, :, None], patch[:, None]]
        blurred, squares = (filtered(faces, matrix[:, None]) for matrix in (blur, mosaic))
        picture = torch.where((chosen == 1)[:, None], blurred, squares)
        # Most of the time goes into medians: they are taken where they are shown.
        shown = chosen == 2
        picture.permute(0, 2, 3, 1)[shown] = self._medians(faces, shown)
        return picture

    def _medians(self, faces: Tensor, shown: Tensor) -> Tensor:
        """Medians (M, 3) of the windows around the pixels of faces (N, 3, H, W) that are ``shown``, bool (N, H, W)."""
        reach = min(round((MEDIAN * self._scale - 1) / 2), self.image_size - 1)
        window = 2 * max(0, reach) + 1
        padded = functional.pad(faces, (window // 2,) * 4, mode="reflect")
        at_once = max(1, _MEDIAN_VALUES // (3 * self.image_size**2 * window**2))
        windows = padded.unfold(2, window, 1).unfold(3, window, 1).permute(0, 2, 3, 1, 4, 5)
        parts = zip(windows.split(at_once), shown.split(at_once), strict=True)
        return torch.cat([part[where].flatten(2).median(dim=2).values for part, where in parts])

    def _maps(self, faces: Tensor) -> list[Tensor]:
        """What the client's network makes of the faces, the first map shuffled."""
        first, *others = self.client(faces - filtered(faces, self.blurred))
        return [shuffled(first, self.order, self._block), *others]

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        """All parts; the maps are computed in the network's own precision."""
        with torch.autocast(faces.device.type, enabled=False):
            maps = self._maps(faces.to(next(self.client.parameters()).dtype))
        return self._packed(self.obfuscated(faces, generator), [part.to(faces.dtype) for part in maps])

    def _packed(self, picture: Tensor, maps: list[Tensor]) -> Tensor:
        return self.pack(dict(zip(self.parts, (picture, *maps), strict=True)))

    def canonical(self, representation: Tensor, state: Tensor | None) -> Tensor:
        """With the blocks of the first map back in their places; maps of another size are left alone."""
        if representation.shape[1:] != self.representation_shape:
            return representation
        parts = self.unpack(representation)
        parts["stage-1"] = shuffled(parts["stage-1"], self.order.argsort(), self._block)
        return self.pack(parts)

    # -- how it is trained -----------------------------------------------------------------------

    def fit(self, training: DefenseTraining) -> None:
        """Train the client's network and a recogniser behind all parts, drawn to a plain one that learns beside it."""
        options = self.options
        recogniser, head = training.make_recogniser(self.representation_shape)
        networks = {"client": self.client, "recogniser": recogniser, "head": head}
        if options.match:
            networks["plain"] = plain = training.make_recogniser((3, self.image_size, self.image_size))[0]

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            sent = self._packed(self.obfuscated(faces, generator), self._maps(faces))
            embeddings = recogniser(sent)
            value: Tensor = head(embeddings, labels)[0]
            if options.match:
                # One head for both: they share the centres of the identities, and so a space.
                target = plain(faces)
                value = value + head(target, labels)[0]
                off = functional.normalize(embeddings) - functional.normalize(target.detach())
                value = value + options.match * off.square().sum(dim=1).mean()
            return value

        train_jointly(
            training,
            networks,
            sgd(options.learning_rate),
            loss,
            epochs=options.epochs,
            batch_size=options.batch_size,
            schedule=step_decay(training, options.batch_size, options.epochs, MILESTONES, DECAY),
        )


def filtered(faces: Tensor, matrix: Tensor) -> Tensor:
    """Faces (N, 3, H, W) whose rows and columns are both filtered by a matrix (..., H, H), at full precision."""
    matrix = matrix.to(faces)
    with torch.autocast(faces.device.type, enabled=False):
        return matrix @ faces @ matrix.mT


def shuffled(maps: Tensor, order: Tensor, block: int) -> Tensor:
    """Maps (N, C, h, w) whose block i is block ``order[i]`` of the original, counted row by row; int64 (B,).

    Blocks are ``block`` values a side, sqrt(B) of them; what is left over at the lower and right border stays.
    """
    count = math.isqrt(len(order))
    side = count * block
    cut = maps[:, :, :side, :side].unflatten(3, (count, block)).unflatten(2, (count, block))  # (N, C, b, s, b, s)
    rows = cut.transpose(3, 4).flatten(2, 3)[:, :, order.to(maps.device)]
    out = maps.clone()
    out[:, :, :side, :side] = rows.unflatten(2, (count, count)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return out
