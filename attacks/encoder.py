"""Face encoders for attacks, one to train and published ones, and what training on few identities takes."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, AttackOptions
from attacks.descent import Descent, EpochBatches, Outcome, Player, SeenStates
from attacks.exposure import chunks, to_float
from attacks.plateau import Plateau
from attacks.schedule import WarmHoldDecay
from attacks.seeds import derived
from attacks.widths import Widths

#: Maps of at least this side are halved by the first convolution: what a face needs, at a quarter of the cost.
_STRIDED_FROM = 32
_SLOPE = 0.25
#: ITU-R BT.601 luma weights of R, G, B.
_LUMA = (0.299, 0.587, 0.114)
#: Faces that give the statistics of an encoder's input, and how many of them at once.
_STATISTICS_FACES = 1024
_CHUNK = 64
#: Before so many steps at the full learning rate, a flat loss is no plateau: training has hardly begun.
_LEAST_STEPS = 200


class MapNormalisation(nn.Module):
    """Brings what a defence sends to one scale: channels to mean 0 and variance 1, then each map to mean square 1.

    The channels' statistics are measured once (:meth:`measure`) and kept. A random defence sends, in one channel, maps
    whose energies differ by orders of magnitude from face to face; the second step lets the faint ones be seen as well.
    It costs a picture its contrast, which says nothing of a person. Maps too small to have a contrast of their own
    (templates) keep their size.

    Attributes:
        mean, std: float32 (C,), or one value per place (see :class:`Encoder`).
    """

    #: Values in a map from which on it is divided by its own root mean square.
    smallest_map = 64
    #: Root mean square, relative to the channel's, below which a map counts as empty and is not blown up.
    faintest = 1e-3

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Set the statistics from representations (n, C, h, w), each batch with the places int64 (n, C) of its maps."""
        count, total, squares = (torch.zeros(len(self.mean), dtype=torch.float64) for _ in range(3))
        for representation, places in batches:
            if places is None:
                places = torch.arange(representation.shape[1]).expand(len(representation), -1)
            at, maps = places.flatten().cpu(), representation.flatten(2).flatten(0, 1).double().cpu()
            count.index_add_(0, at, torch.full_like(at, maps.shape[1], dtype=torch.float64))
            total.index_add_(0, at, maps.sum(dim=1))
            squares.index_add_(0, at, maps.square().sum(dim=1))
        count.clamp_(min=1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A channel that never varies carries nothing; divided by its rounding error it would look as if it did.
        varies = std > 1e-6 * torch.maximum(mean.abs(), std.max())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, torch.ones_like(std)))

    def forward(self, representation: Tensor, places: Tensor | None = None) -> Tensor:
        """(N, C, h, w) of any scale, and int64 (N, C) where places vary, to float32 (N, C, h, w)."""
        mean, std = (self.mean, self.std) if places is None else (self.mean[places], self.std[places])
        x = (representation.float() - mean[..., None, None]) / std[..., None, None]
        if x.shape[2] * x.shape[3] < self.smallest_map:
            return x
        power = x.square().mean(dim=(2, 3), keepdim=True)
        return x * torch.rsqrt(power.clamp_min(self.faintest**2))


class PlacedConvolution(nn.Module):
    """A 3x3 convolution whose filters follow the places of the channels, sample by sample.

    Where a defence sends, in one channel, a map of this meaning for one face and of that for the next, each map is met
    by the filters of its meaning. That equals spreading the maps over all places, zero elsewhere, and an ordinary
    convolution, at the cost of the maps that are there.

    Args:
        places: how many there are.
        channels: maps of a sample.
        outputs: channels out.
        stride: of the convolution.
    """

    def __init__(self, places: int, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        bound = (2 / channels) ** 0.5 / 3
        self.weight = nn.Parameter(torch.empty(places, 9 * outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """float (N, C, h, w) and int64 (N, C) to (N, outputs, ceil(h / stride), ceil(w / stride))."""
        n, channels, height, width = x.shape
        columns = functional.unfold(x, 3, padding=1, stride=self.stride)
        weight = self.weight[places].view(n, channels * 9, -1)
        out = torch.bmm(weight.transpose(1, 2), columns)
        return out.view(n, -1, math.ceil(height / self.stride), math.ceil(width / self.stride))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input (He et al., CVPR 2016, figure 5, left).

    The shortcut is a 1x1 convolution where shapes change; the activation is leaky, as face recognisers have it.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and the shortcut.
        kernel: side of the two convolutions, odd.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, outputs, ceil(h / stride), ceil(w / stride))."""
        return functional.leaky_relu(self.residual(x) + self.shortcut(x), _SLOPE)


class Encoder(nn.Module):
    """A face or a protected representation, (N, C, h, w), to an embedding.

    A residual network whose stages halve the maps, read out by a fully connected layer that keeps the place of every
    feature: faces are aligned, and averaging over them would throw that away. What has too few places to be a picture
    (a template) meets the width of the last stage from the start: the narrow layers that suffice for the many places
    of a picture would squeeze it.

    Args:
        shape: (C, h, w) of the input; any sizes, a template (D, 1, 1) too.
        widths: channels of the first convolution and of each stage.
        blocks: residual blocks a stage.
        embedding_size: D.
        places: how many meanings a channel may have from sample to sample; None where it is always the same.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        widths: Sequence[int],
        blocks: int,
        embedding_size: int,
        places: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        stride = 2 if min(height, width) >= _STRIDED_FROM else 1
        kernel = 1 if height == width == 1 else 3
        if height * width < MapNormalisation.smallest_map:
            widths = [widths[-1]] * len(widths)
        self.normalisation = MapNormalisation(places or channels)
        self.first: nn.Module = (
            nn.Conv2d(channels, widths[0], kernel, stride=stride, padding=kernel // 2, bias=False)
            if places is None
            else PlacedConvolution(places, channels, widths[0], stride)
        )
        self.stem = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.LeakyReLU(_SLOPE, inplace=True))
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        self.stages = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(widths):
            more = (ResidualBlock(outputs, outputs, 1, kernel) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(ResidualBlock(inputs, outputs, 2, kernel), *more))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        self.linear = nn.Linear(widths[-1] * height * width, embedding_size, bias=False)
        # Its shift lets a student give what all faces have in common to a teacher.
        self.embedding_norm = nn.BatchNorm1d(embedding_size)

    def forward(self, representation: Tensor, places: Tensor | None = None) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of (N, C, h, w), with int64 (N, C) where places vary.

        Raises:
            ValueError: another shape than it was built for.
        """
        return self.read_out(self.stage_outputs(representation, places)[-1])

    def stage_outputs(self, representation: Tensor, places: Tensor | None = None) -> list[Tensor]:
        """The maps (N, width, h / 2^i, w / 2^i) behind each stage, the stem's too; arguments as :meth:`forward`."""
        if tuple(representation.shape[1:]) != tuple(self.shape):
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"the encoder takes representations (N, {sizes}), got {tuple(representation.shape)}")
        x = self.normalisation(representation, places)
        x = self.first(x.contiguous(memory_format=torch.channels_last)) if places is None else self.first(x, places)
        outputs = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs

    def read_out(self, features: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, from the last of :meth:`stage_outputs`."""
        embedding: Tensor = self.embedding_norm(self.linear(features.flatten(1)).float())
        return embedding

    @torch.no_grad()
    def aim_at(self, embeddings: Tensor) -> None:
        """Start with the mean and the spread of embeddings (N, D) that are to be imitated."""
        self.embedding_norm.bias.copy_(embeddings.mean(dim=0))
        self.embedding_norm.weight.copy_(embeddings.std(dim=0, correction=0))

    @torch.no_grad()
    def start_from(self, other: Encoder) -> int:
        """Take over the learned values of ``other`` wherever the shapes agree; returns how many values that were.

        Of an encoder of another kind of input that is all but the first convolution. Input statistics stay.
        """
        own, taken = self.state_dict(), 0
        for name, value in other.state_dict().items():
            if not name.startswith("normalisation.") and name in own and own[name].shape == value.shape:
                own[name].copy_(value)
                taken += value.numel()
        return taken


class OnnxEncoder(nn.Module):
    """A published face recogniser from an ONNX file: faces to embeddings, nothing to train.

    One input, RGB (N, 3, H, W) as (255 x - 127.5) / 128 of faces x in [0, 1], and one output (N, D): the form in which
    the field publishes them. Faces of another size are resized; free sizes mean 112 x 112. The weights stay in the
    file: what ``state_dict()`` carries is its digest, by which another file is found out.

    Attributes:
        embedding_size: D.
        digest: uint8 (32,) buffer, SHA-256 of the file.
    """

    digest: Tensor

    def __init__(self, path: Path, device: torch.device) -> None:
        """
        Args:
            path: the file.
            device: runs on CUDA where this says so and onnxruntime can, else on the processor.

        Raises:
            ValueError: there is no such file, or it is no ONNX model of that form.
        """
        super().__init__()
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"teacher {path} does not exist: name the ONNX file of a face recogniser")
        content = path.read_bytes()
        self.path = path
        self._loaded = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        self.register_buffer("digest", self._loaded.clone())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle workers would spin between batches and take the cores from torch, which works in turns with them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors, which are raised as well
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise ValueError(f"teacher {path} is no ONNX model that onnxruntime can load") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shapes = [list(one.shape) for one in (*inputs, *outputs)]
        if [len(shape) for shape in shapes] != [4, 2] or shapes[0][1] != 3 or not isinstance(shapes[1][1], int):
            raise ValueError(f"teacher {path} must map (N, 3, H, W) to (N, D), but has inputs and outputs {shapes}")
        self._input = inputs[0].name
        self._batch, _, height, width = (size if isinstance(size, int) else None for size in shapes[0])
        self._size = (height or 112, width or 112)
        self.embedding_size: int = shapes[1][1]

    @torch.no_grad()
    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings float32 (N, D), not normalised, of faces (N, 3, H, W) in [0, 1], on their device.

        Raises:
            ValueError: the digest that was loaded is that of another file, or the embeddings are not finite.
        """
        if not torch.equal(self.digest.cpu(), self._loaded):
            raise ValueError(f"teacher {self.path} is not the file that the attack was fitted with: fit it again")
        pixels = faces.float()
        if pixels.shape[-2:] != self._size:
            pixels = functional.interpolate(pixels, self._size, mode="bilinear", antialias=True).clamp(0, 1)
        pixels = ((255 * pixels - 127.5) / 128).cpu()
        parts = []
        for chunk in pixels.split(self._batch or max(1, len(pixels))):
            missing = 0 if self._batch is None else self._batch - len(chunk)
            full = torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1)))
            (embeddings,) = self._session.run(None, {self._input: full.contiguous().numpy()})
            parts.append(torch.from_numpy(embeddings)[: len(chunk)])
        found = torch.cat(parts).to(faces.device, torch.float32)
        if not torch.isfinite(found).all():
            raise ValueError(f"teacher {self.path} returned embeddings that are not finite")
        return found


class MarginSoftmax(nn.Module):
    """CosFace: softmax over cosines to one centre per identity, a margin on the right one.

    Wang et al., CVPR 2018, equation 4: the logits are s (cos t_y - m) for the identity y and s cos t_j for the others.
    """

    def __init__(self, embedding_size: int, identities: int, *, scale: float, margin: float) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.centres = nn.Parameter(torch.randn(identities, embedding_size))

    def forward(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings (N, D), any scale, of the identities int64 (N,) in 0..K-1."""
        # float32 under autocast too: s times a cosine of 8 bits is too coarse for a softmax.
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = functional.normalize(embeddings.float(), dim=1) @ functional.normalize(self.centres, dim=1).T
            margins = self.margin * functional.one_hot(identities, len(self.centres))
            return functional.cross_entropy(self.scale * (cosine - margins), identities)


def vary(faces: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Faces as other cameras would have seen them: mirrored, moved, scaled, turned, re-coloured, partly covered.

    An attacker with few public identities has to keep a network from telling people by exposure or crop. Only
    half of the faces are moved by fractions of a pixel: resampling blurs, and a network that saw nothing but blurred
    faces would not know the fine detail that many defences send.

    Args:
        faces: float (N, 3, H, W) in [0, 1].
        strength: 0 leaves only the mirroring, 1 is meant for a hundred identities.
        generator: a CPU generator; how much is drawn depends on N alone.

    Returns:
        float (N, 3, H, W) in [0, 1]; ``faces`` is left alone.
    """
    count = len(faces)
    unit = torch.rand(12, count, generator=generator).to(faces.device)
    signed = 2 * unit - 1
    mirrored = torch.where((unit[0] < 0.5)[:, None, None, None], faces.flip(-1), faces)
    if not strength:
        return mirrored
    moved = _move(
        mirrored,
        scale=torch.exp(0.12 * strength * signed[1]),
        angle=math.radians(8) * strength * signed[2],
        shift=0.06 * strength * signed[3:5].T,
    )
    varied = torch.where((unit[5] < 0.5)[:, None, None, None], moved, mirrored)

    def amount(of: Tensor, most: float) -> Tensor:
        return (strength * most * of)[:, None, None, None]

    luma = (varied * varied.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    saturation = 1 + amount(signed[6], 0.4)
    varied = luma + saturation * (varied - luma)
    centre = luma.mean(dim=(2, 3), keepdim=True)
    varied = (centre + (1 + amount(signed[7], 0.3)) * (varied - centre) + amount(signed[8], 0.2)).clamp(0, 1)
    return _cover(varied, top=unit[9], left=unit[10], side=0.4 * strength * (2 * unit[11] - 1).clamp(min=0))


def _move(faces: Tensor, *, scale: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Scaled and turned about the centre and shifted (in shares of the side); the border is repeated."""
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack(
        (
            torch.stack((cosine, -sine, 2 * shift[:, 0]), dim=1),
            torch.stack((sine, cosine, 2 * shift[:, 1]), dim=1),
        ),
        dim=1,
    )
    grid = functional.affine_grid(rows.to(faces.dtype), list(faces.shape), align_corners=False)
    return functional.grid_sample(faces, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _cover(faces: Tensor, *, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """A grey square of ``side`` (share of the image's) over each face, wholly inside it."""
    height, width = faces.shape[2:]

    def inside(pixels: int, place: Tensor) -> Tensor:
        centres = (torch.arange(pixels, device=faces.device) + 0.5) / pixels
        start = (place * (1 - side))[:, None]
        return (centres >= start) & (centres < start + side[:, None])

    mask = inside(height, top)[:, :, None] & inside(width, left)[:, None, :]
    return faces.masked_fill(mask[:, None], 0.5)


# -- training -----------------------------------------------------------------------------------------


class TrainingOptions(AttackOptions):
    """Options of an attack that trains encoders.

    Attributes:
        widths: channels of the first convolution and of each stage.
        blocks: residual blocks a stage.
        augmentation: how strongly public faces are varied (:func:`vary`); 0 only mirrors them.
        weight_decay: of AdamW.
        batch_size: faces per step (fewer where there are fewer public faces).
        warmup: share of a training over which the learning rate rises.
        decay: share of a training, at the end, over which it falls to zero.
        plateau: relative gain of the last doubling below which a training counts as saturated.
    """

    widths: Widths = (64, 128, 256, 512)
    blocks: int = Field(default=2, ge=1, le=16)
    augmentation: float = Field(default=1.0, ge=0, le=2)
    weight_decay: float = Field(default=0.05, ge=0, le=10, allow_inf_nan=False)
    batch_size: int = Field(default=64, ge=2, le=65536)
    warmup: float = Field(default=0.03, ge=0, le=0.5)
    decay: float = Field(default=0.4, ge=0, le=0.9)
    plateau: float = Field(default=0.03, gt=0, lt=1)

    @model_validator(mode="after")
    def _room_for_a_plateau(self) -> Self:
        if self.warmup + self.decay > 0.95:
            raise ValueError("warmup + decay must leave at least 5 % of the steps at the full learning rate")
        return self


@dataclass(frozen=True)
class Training:
    """One training of a fit: what is trained, on what, and for how long.

    Attributes:
        name: what is trained, as messages call it; its checkpoints lie in a folder of that name.
        module: returns the loss of a batch.
        batch: ``batch(faces, index, step)``, from faces (n, 3, H, W) in [0, 1] that are the public faces ``index``: the
            module's arguments, and the states that were drawn, int64 (n, D), or None.
        validate: loss of a module like ``module`` on held-out identities.
        floor: what ``validate`` returns of a module that has learnt nothing.
        steps: to train for.
        learning_rate: at its peak.
        early_stop: start the decay of the learning rate as soon as the validation loss has plateaued.
    """

    name: str
    module: nn.Module
    batch: Callable[[Tensor, Tensor, int], tuple[tuple[Any, ...], Tensor | None]]
    validate: Callable[[nn.Module], float]
    floor: float
    steps: int
    learning_rate: float
    early_stop: bool


class Trainer:
    """Trains modules one after the other, in one fit, on varied public faces, with resuming and averaged weights.

    Args:
        attack: its name, for messages.
        adversary: whose public faces are trained on.
        seed: the attack's own.
        training: int64 (T,), the faces to train on.
        options: of the attack.
        total: images that all trainings together see at most, for the progress.

    Attributes:
        batch_size: faces per step.
    """

    def __init__(
        self,
        attack: str,
        adversary: Adversary,
        seed: int,
        training: Tensor,
        options: TrainingOptions,
        total: int,
    ) -> None:
        self.attack = attack
        self.adversary, self.seed, self.training = adversary, seed, training
        self.fabric, self.device = adversary.fabric, adversary.fabric.device
        self.options = options
        self.batch_size = min(options.batch_size, len(training))
        self._faces = adversary.faces.to(self.device)
        self._done, self._total = 0, total

    def statistics(self, faces: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Numbered chunks of training faces, uint8, for the statistics of an encoder's input."""
        order = torch.randperm(len(self.training), generator=derived(self.seed, "statistics"))
        sample = at(faces, self.training[order[:_STATISTICS_FACES]])
        yield from enumerate(chunk.to(self.device) for chunk in chunks(sample, _CHUNK))

    def train(self, training: Training, seen: SeenStates | None = None) -> Outcome:
        """Train the module in place; it ends with its averaged weights.

        Args:
            training: what, on what and for how long.
            seen: takes the states that it meets.

        Raises:
            ValueError: the checkpoint is that of another fit.
            FloatingPointError: a loss is not finite.
        """
        options, adversary = self.options, self.adversary
        batches = EpochBatches(self.training, options.batch_size, self.seed, training.name)
        planned, before = training.steps * self.batch_size, self._done
        seen = seen or SeenStates()
        model = self.fabric.setup_module(training.module)

        def loss(step: int) -> Tensor:
            index = batches(step).to(self.device)
            draws = derived(self.seed, training.name, "vary", step)
            faces = vary(to_float(self._faces[index]), options.augmentation, draws)
            inputs, states = training.batch(faces, index, step)
            seen.add(states)
            value: Tensor = model(*inputs)
            return value

        def report(done: int, total: int, **fields: float) -> None:
            adversary.report(before + done, self._total - (planned - total), **fields)

        optimizer = torch.optim.AdamW(
            training.module.parameters(),
            lr=training.learning_rate,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        outcome = Descent(
            what=f"{self.attack}: the {training.name}",
            players=[Player(training.module, optimizer, loss)],
            batch_size=self.batch_size,
            learning_rate=training.learning_rate,
            schedule=WarmHoldDecay(training.steps, options.warmup, options.decay),
            rule=Plateau(relative=options.plateau),
            validate=training.validate,
            floor=training.floor,
            least_steps=_LEAST_STEPS,
            early_stop=training.early_stop,
            fabric=self.fabric,
            report=report,
            folder=None if adversary.checkpoint is None else adversary.checkpoint / training.name,
            stored={"module": training.module},
            fit={
                "options": options.model_dump(mode="json"),
                "seed": self.seed,
                "faces": list(adversary.faces.shape),
                "knowledge": str(adversary.knowledge),
            },
            seen=seen,
        ).run()
        self._done += outcome.steps * self.batch_size
        self._total -= planned - outcome.steps * self.batch_size
        return outcome


def at(faces: Tensor, index: Tensor) -> Tensor:
    """``faces[index]``, wherever either lies."""
    return faces[index.to(faces.device)]
