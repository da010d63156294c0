"""The recogniser: input normalisation, backbone, embedding."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from bench.images import channels_last
from bench.nets.backbones import BACKBONES


class InputNormalisation(nn.Module):
    """Brings representations of any scale to one: channels to mean 0 and variance 1, then maps to mean square 1.

    Defences send what they send: colours in [0, 1], DCT coefficients of +-750. A batch norm without affine parameters
    would do, but it would measure 27 maps of full resolution at every step, a fifth of a training step on two cores,
    for statistics that do not move. This layer measures the first batches of training and then keeps what it has.
    Training and inference see the same map.

    Each map is then divided by its own root mean square. A random defence sends, in one channel, maps that differ in
    energy by orders of magnitude from face to face (PartialFace: another frequency for every state); on a common scale
    the faint ones would hardly reach the network. Of a picture this takes the contrast, which says nothing of a
    person. Maps of fewer than :attr:`smallest_map` values (templates) keep their size, which is what they carry.

    Attributes:
        mean, variance: float32 (C,), over all images and places measured.
        batches: int64 scalar, batches measured so far.
    """

    #: Batches measured. 64 batches of 128 faces at 64x64 give each channel 33 million values.
    measured = 64
    #: Relative to a channel's mean square: a constant channel maps to about zero, never to amplified rounding noise.
    epsilon = 1e-6
    #: Values in a map from which on its size is no more than its contrast.
    smallest_map = 64
    #: Root mean square below which a map is taken for empty: a constant map must not become amplified rounding noise.
    faintest = 1e-3

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._seen = 0
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]

    def forward(self, representation: Tensor) -> Tensor:
        """(N, C, h, w) of any scale to float32 (N, C, h, w)."""
        x = representation.to(self.mean.dtype)
        # A Python count spares a GPU one synchronisation a step; the buffer is what checkpoints carry.
        if self.training and self._seen < self.measured:
            self._seen = int(self.batches)
            if self._seen < self.measured:
                self._measure(x)
        floor = self.epsilon * (self.variance + self.mean.square())
        # Three passes over what is the largest thing in training: batch_norm alone takes as long on a CPU.
        x = (x - self.mean[:, None, None]).mul_(torch.rsqrt(self.variance + floor + 1e-12)[:, None, None])
        if (places := x.shape[2] * x.shape[3]) < self.smallest_map:
            return x
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) / math.sqrt(places)
        return x.div(size.clamp_min(self.faintest))

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        mean, variance = self._moments(x)
        self.batches += 1
        self._seen += 1
        # The variance over batches is the mean of their variances plus the variance of their means (Chan et al. 1979).
        weight = 1 / self.batches.to(mean.dtype)
        shift = mean - self.mean
        self.mean += weight * shift
        self.variance.mul_(1 - weight).add_(weight * (variance + (1 - weight) * shift.square()))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel of a batch, (C,); overridden where several processes share a batch."""
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, variance


def _recount(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, InputNormalisation)
    module._seen = int(module.batches)


class RecogniserSpec(BaseModel):
    """What a recogniser is built from. Frozen; unknown names and values out of range are a ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(description="A name in `bench.nets.backbones.BACKBONES`.")
    representation_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="(C, h, w) of its input.")
    embedding_size: int = Field(ge=2, description="Dimensions D of the embedding.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Before the last linear layer, in training.")
    image_size: PositiveInt | None = Field(
        None, description="Side in pixels of the faces behind its input; none: that of the input."
    )

    @property
    def reduced(self) -> int:
        """How many times half as large as a face its input is, to the nearest whole number."""
        side = max(self.representation_shape[1:])
        return 0 if self.image_size is None else max(0, round(math.log2(self.image_size / side)))


class Recogniser(nn.Module):
    """Maps a protected representation to an embedding.

    Args:
        spec: what to build; weights come from torch's global generator (see :func:`build_recogniser`).

    Raises:
        UsageError: an unknown backbone.
    """

    def __init__(self, spec: RecogniserSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, height, width = spec.representation_shape
        self.normalisation = InputNormalisation(channels)
        self.backbone = BACKBONES.get(spec.backbone)(
            in_channels=channels,
            input_size=(height, width),
            embedding_size=spec.embedding_size,
            dropout=spec.dropout,
            reduced=spec.reduced,
        )

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def parameter_count(self) -> int:
        """Learned values, all layers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, representation: Tensor) -> Tensor:
        """Embeddings, float32 (N, D), not normalised, from representations (N, C, h, w) of any scale.

        Raises:
            ValueError: another shape than the recogniser was built for.
        """
        embedding: Tensor = self.backbone(self._normalised(representation))
        return embedding

    def maps(self, representation: Tensor) -> Tensor:
        """The backbone's last feature map, (N, C', h', w'), which its embedding is made of.

        Of a backbone that has none, the embedding as a map of one place, (N, D, 1, 1).

        Raises:
            ValueError: another shape than the recogniser was built for.
        """
        x = self._normalised(representation)
        last = getattr(self.backbone, "maps", None)
        maps: Tensor = self.backbone(x)[..., None, None] if last is None else last(x)
        return maps

    def _normalised(self, representation: Tensor) -> Tensor:
        """What the backbone is fed."""
        if tuple(representation.shape[1:]) != self.spec.representation_shape:
            raise ValueError(
                f"this recogniser takes representations (N, {', '.join(map(str, self.spec.representation_shape))}), "
                f"got {tuple(representation.shape)}"
            )
        device = representation.device.type
        x: Tensor = self.normalisation(representation)
        if device == "cpu":
            x = channels_last(x)
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        # An accelerator reorders second: that moves half of the bytes.
        return x.contiguous(memory_format=torch.channels_last)

    def embed(self, representation: Tensor) -> Tensor:
        """Unit embeddings, float32 (N, D), whose dot products are cosines."""
        return F.normalize(self(representation).float())


class TemplateReader(Recogniser):
    """What stands for the recogniser behind a template defence: what is stored, (N, T, 1, 1), is the embedding (N, T).

    ``extractor`` makes the embeddings that the defence protects.
    """

    def __init__(self, extractor: Recogniser, representation_shape: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        size = representation_shape[0]
        changes = {"representation_shape": representation_shape, "embedding_size": size}
        self.spec = extractor.spec.model_copy(update=changes)
        self.extractor = extractor

    def forward(self, representation: Tensor) -> Tensor:
        """The templates, (N, T)."""
        return representation.flatten(1)

    def embed(self, representation: Tensor) -> Tensor:
        """The templates as they are stored, float32 (N, T): what compares them may look at their length."""
        return self(representation).float()  # type: ignore[no-any-return, unused-ignore]


def build_recogniser(
    backbone: str,
    representation_shape: tuple[int, int, int],
    embedding_size: int,
    *,
    dropout: float = 0.0,
    image_size: int | None = None,
    seed: int = 0,
) -> Recogniser:
    """A recogniser with fresh weights, the same for the same ``seed``; torch's global generator is left as it was.

    The other arguments are those of :class:`RecogniserSpec`.

    Raises:
        UsageError: an unknown backbone.
    """
    spec = RecogniserSpec(
        backbone=backbone,
        representation_shape=representation_shape,
        embedding_size=embedding_size,
        dropout=dropout,
        image_size=image_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recogniser = Recogniser(spec)
    return recogniser.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, unused-ignore]
