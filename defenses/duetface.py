"""DuetFace: the server gets high frequencies alone, and of the low ones what a client's network makes of them.

Mi et al., *DuetFace: Collaborative Privacy-Preserving Face Recognition via Channel Splitting in the Frequency Domain*,
ACM Multimedia 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench.nets.iresnet import halved
from bench.nets.mobilefacenet import MobileFaceNet
from defenses.base import Defense, DefenseOptions, DefenseTraining, Shape
from defenses.client import sgd, step_decay, train_jointly
from defenses.frequency import CHANNELS, COLOURS, FrequencyOperator, block_dct

#: What the client keeps of each colour; the other 54 channels are sent.
CLIENT_CHANNELS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 24)
SERVER_CHANNELS = tuple(channel for channel in range(CHANNELS) if channel not in CLIENT_CHANNELS)
#: (last layer, channels, halvings) of the client's feature maps, in MobileFaceNet, and the halvings of the server's
#: stages that they gate.
TAPS = ((6, 64, 2), (13, 128, 3), (16, 128, 4), (17, 512, 4))
SERVER_HALVINGS = (1, 2, 3, 4)
#: Convex outline of a face that is aligned as usual (eyes at (38, 52) and (74, 52) of 112 pixels): (x, y) of 112.
OUTLINE = (
    *((8, 48), (22, 36), (40, 32), (72, 32), (90, 36), (104, 48), (101, 70)),
    *((93, 90), (78, 106), (56, 112), (34, 106), (19, 90), (11, 70)),
)


class DuetFaceOptions(DefenseOptions):
    sends: Literal["masks", "features", "channels"] = Field(
        default="masks",
        description="beside its high frequencies: masks, the attention maps of the client's network (the paper); "
        "features, its raw feature maps (the released code); channels, nothing",
    )
    gate: Literal["paper", "official"] = Field(
        default="paper",
        description="what makes a mask of feature maps: paper, weights that are learnt; official, drawn anew in every "
        "call and never trained",
    )
    roi: Literal["outline", "none"] = Field(
        default="outline", description="masks are kept within the outline of an aligned face, or everywhere"
    )
    epochs: int = Field(
        default=24, ge=1, le=10_000, description="passes over the faces that train the client's network"
    )
    gate_epochs: int = Field(default=8, ge=1, le=10_000, description="passes that train the weights of the gates")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="faces per step of both trainings")
    learning_rate: float = Field(
        default=0.1, gt=0, le=10, allow_inf_nan=False, description="of SGD, divided by 10 at 10/24, 18/24 and 22/24"
    )


class DuetFace(Defense):
    """High-frequency channels and the client's attention, as parts: ``channels`` (162, H, W), and of each stage one.

    The masks of ``sends=masks`` are (1, H/2, W/2) to (1, H/16, W/16), within [0, 1]; the feature maps of
    ``sends=features`` (64, H/4, W/4), (128, H/8, W/8), (128, H/16, W/16) and (512, H/16, W/16). The released server
    multiplies what the masks tell onto its own features, s + w mask s with s = sigmoid(features); here a recogniser
    takes all parts as channels, and finds out by itself what they are good for.
    """

    name = "duetface"
    summary = "high-frequency channels, and attention masks that a client's network makes of the low ones"
    reference = (
        "Mi et al., DuetFace: Collaborative Privacy-Preserving Face Recognition via Channel Splitting in the Frequency "
        "Domain, ACM MM 2022"
    )
    fidelity = "simplified"
    hidden = "the ten lowest frequencies of each colour, which stay at the client; nothing is secret"
    weakened: ClassVar[Mapping[str, Any]] = {"sends": "channels"}
    trainable = True
    learns = "a client's network on the low frequencies, then the weights that make masks of its feature maps"
    departures: ClassVar[Mapping[str, str]] = {
        "gate=official": "weights of the masks are drawn anew in every call and never trained: two runs differ",
        "sends=features": "the client's raw feature maps are sent, and the server makes the masks",
    }
    Options = DuetFaceOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {"epochs": 1, "gate_epochs": 1, "batch_size": 32},
        "cpu": {"epochs": 4, "gate_epochs": 1},
    }
    options: DuetFaceOptions
    server_channels: Tensor
    client_channels: Tensor
    roi: Tensor

    def __init__(self, options: DefenseOptions | None = None, *, image_size: int = 112) -> None:
        super().__init__(options, image_size=image_size)
        self.register_buffer("server_channels", torch.tensor(SERVER_CHANNELS))
        self.register_buffer("client_channels", torch.tensor(CLIENT_CHANNELS))
        outline = torch.tensor(OUTLINE, dtype=torch.float64) * (image_size / 112)
        shown = inside(outline, image_size) if self.options.roi == "outline" else torch.ones(image_size, image_size)
        self.register_buffer("roi", shown.float())
        self.client = nn.Sequential(*self._client_layers(self._network(embedding_size=2)))
        self.gates = nn.ParameterList(nn.Parameter(_official_gate(width, None)) for _, width, _ in TAPS)

    def _network(self, embedding_size: int) -> MobileFaceNet:
        size = (self.image_size, self.image_size)
        channels = COLOURS * len(CLIENT_CHANNELS)
        return MobileFaceNet(in_channels=channels, input_size=size, embedding_size=embedding_size)

    @staticmethod
    def _client_layers(network: MobileFaceNet) -> list[nn.Module]:
        """What the client runs: the spectrum brought to one scale, and the layers up to the last feature map."""
        return [nn.BatchNorm2d(COLOURS * len(CLIENT_CHANNELS), affine=False), *network.features]

    @property
    def parts(self) -> Mapping[str, Shape]:
        """``channels``, and ``mask_1`` to ``mask_4`` or ``features_1`` to ``features_4``."""
        size, sends = (self.image_size, self.image_size), self.options.sends
        parts: dict[str, Shape] = {"channels": (COLOURS * len(SERVER_CHANNELS), *size)}
        for stage, ((_, width, halvings), server) in enumerate(zip(TAPS, SERVER_HALVINGS, strict=True), 1):
            if sends == "masks":
                parts[f"mask_{stage}"] = (1, *halved(size, server))
            elif sends == "features":
                parts[f"features_{stage}"] = (width, *halved(size, halvings))
        return parts

    @property
    def representation_shape(self) -> Shape:
        """(162 and the channels of the other parts, H, W), packed."""
        return (sum(shape[0] for shape in self.parts.values()), self.image_size, self.image_size)

    # -- what is learnt --------------------------------------------------------------------------

    def fit(self, training: DefenseTraining) -> None:
        """Train the client's network to recognise; then the gates, jointly with a recogniser of all that is sent."""
        options = self.options
        if options.sends == "channels":
            return
        gated = options.sends == "masks" and options.gate == "paper"
        total = training.images * (options.epochs + gated * options.gate_epochs)
        self._train_client(_stage(training, "client", 0, total))
        if gated:
            self._train_gates(_stage(training, "gates", training.images * options.epochs, total))

    def _train(self, training: DefenseTraining, epochs: int, networks: dict[str, nn.Module], loss: Any) -> None:
        options = self.options
        train_jointly(
            training,
            networks,
            sgd(options.learning_rate),
            loss,
            epochs=epochs,
            batch_size=options.batch_size,
            schedule=step_decay(training, options.batch_size, epochs, (10 / 24, 18 / 24, 22 / 24), 0.1),
        )

    def _train_client(self, training: DefenseTraining) -> None:
        _, head = training.make_recogniser(self.representation_shape)
        assert isinstance(head.weight, Tensor)
        network = self._network(head.weight.shape[1]).to(self.roi.device)
        network.features = self.client  # trained below the embedding, which is thrown away

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            value: Tensor = head(network(block_dct(faces, self.client_channels)), labels)[0]
            return value

        self._train(training, self.options.epochs, {"network": network, "head": head}, loss)

    def _train_gates(self, training: DefenseTraining) -> None:
        self.client.requires_grad_(False).eval()
        recogniser, head = training.make_recogniser(self.representation_shape)

        def loss(faces: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            value: Tensor = head(recogniser(self.transform(faces, None, generator)), labels)[0]
            return value

        networks = {"gates": self.gates, "recogniser": recogniser, "head": head}
        self._train(training, self.options.gate_epochs, networks, loss)

    # -- what is sent ----------------------------------------------------------------------------

    def transform(self, faces: Tensor, state: Tensor | None, generator: torch.Generator) -> Tensor:
        parts = {"channels": block_dct(faces, self.server_channels)}
        if self.options.sends != "channels":
            for stage, maps in enumerate(self.tapped(faces), 1):
                if self.options.sends == "features":
                    parts[f"features_{stage}"] = maps
                else:
                    parts[f"mask_{stage}"] = self._mask(stage, maps, generator)
        return self.pack(parts)

    def linear_operator(self, state: Tensor | None) -> FrequencyOperator:
        """Of the high frequencies."""
        return FrequencyOperator(self.image_size, self.server_channels)

    @property
    def linear_channels(self) -> Tensor | None:
        """The part ``channels``, beside which a network's maps are sent."""
        high = COLOURS * len(SERVER_CHANNELS)
        return None if self.channels == high else torch.arange(high)

    def tapped(self, faces: Tensor) -> list[Tensor]:
        """The client's four feature maps: (N, 64, H/4, W/4) to (N, 512, H/16, W/16), in the faces' type."""
        last = {layer for layer, _, _ in TAPS}
        maps, found = block_dct(faces, self.client_channels), []
        with torch.autocast(faces.device.type, enabled=False):
            maps = maps.to(self.roi.dtype)
            for number, layer in enumerate(self.client, start=-1):  # the layers of MobileFaceNet from 0 on
                maps = layer(maps)
                if number in last:
                    found.append(maps.to(faces.dtype))
        return found

    def _mask(self, stage: int, maps: Tensor, generator: torch.Generator) -> Tensor:
        weights = self.gates[stage - 1]
        if self.options.gate == "official":
            weights = _official_gate(len(weights), generator)
        with torch.autocast(maps.device.type, enabled=False):
            return attention_mask(maps, weights.to(maps), self.roi.to(maps), self.parts[f"mask_{stage}"][1:])


def _stage(training: DefenseTraining, name: str, before: int, total: int) -> DefenseTraining:
    """A part of a fit, with a folder and a share of the progress of its own."""

    def report(done: int, whole: int, **fields: Any) -> None:
        training.report(before + done, total, **fields)

    return replace(training, folder=None if training.folder is None else training.folder / name, report=report)


def _official_gate(width: int, generator: torch.Generator | None) -> Tensor:
    """The mean over its outputs of a 1x1 convolution with fresh weights, (width,); torch's initial distribution."""
    bound = width**-0.5
    device = None if generator is None else generator.device
    drawn = torch.rand(width, width, generator=generator, device=device)
    return (2 * drawn - 1).mul_(bound).mean(dim=0)


def attention_mask(maps: Tensor, weights: Tensor, roi: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a client's feature maps (N, C, h, w) lie high: masks (N, 1, *size) from 0 to 1 each.

    A 1x1 convolution whose outputs are averaged is one sum of the maps by ``weights`` (C,); its bias drops out with the
    minimum. ``roi`` (H, W), or (N, 1, H, W) of each face, is 1 where masks are kept; maps so small that none of their
    points lies within are kept everywhere. A constant mask becomes 0: the released code divides by its range.
    """
    weighted = torch.einsum("nchw,c->nhw", maps, weights)[:, None]
    attention = functional.interpolate(weighted, size, mode="bilinear", align_corners=False)
    roi = roi if roi.ndim == 4 else roi[None, None]
    within = functional.interpolate(roi, size, mode="bilinear", align_corners=True)
    return _to_unit_range(_to_unit_range(attention) * torch.where(within.any(), within, torch.ones_like(within)))


def _to_unit_range(maps: Tensor) -> Tensor:
    """Each map (N, 1, h, w) less its minimum, over its range."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def inside(outline: Tensor, size: int) -> Tensor:
    """Which points (x, y) of the integer grid lie in a convex polygon, (P, 2) in clockwise order: bool (size, size)."""
    y, x = torch.meshgrid(
        torch.arange(size, dtype=outline.dtype), torch.arange(size, dtype=outline.dtype), indexing="ij"
    )
    edge = outline.roll(-1, 0) - outline
    (ex, ey), (px, py) = edge.T[..., None, None], outline.T[..., None, None]
    within: Tensor = (ex * (y - py) - ey * (x - px) >= 0).all(dim=0)
    return within
