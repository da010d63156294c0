"""U-Net inversion: a network trained on public faces to undo the defence."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightning_fabric import Fabric
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from attacks import checkpoint
from attacks.base import Adversary, AttackOptions, Capability, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.exposure import Exposure, chunks, flip_some, split_identities, to_float
from attacks.layout import ChannelLayout, probe
from attacks.plateau import Plateau
from attacks.schedule import WarmHoldDecay
from attacks.seeds import base_seed, derived
from attacks.ssim import ssim
from attacks.state_inference import StateClassifier
from defenses.base import Defense

#: Faces whose representations give the input statistics, and held-out ones that give the loss curve.
_STATISTICS_FACES = 512
_VALIDATION_FACES = 256
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: For the classifier of states: examples to fit per state, the most states tried, the least accuracy.
_EXAMPLES_PER_STATE = 24
_MOST_STATES = 256
_RELIABLE = 0.95
#: Weights are averaged over about the last 1/16 of the steps so far.
_AVERAGING = 16
#: Before so many steps at the full learning rate, a flat loss is no plateau: training has hardly begun.
_LEAST_STEPS = 200
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
#: Tolerances of the input-range check.
_RANGE_MARGIN = 0.5
_OUTSIDE_SHARE = 1e-3
_LEAST_SPREAD = 0.01
_SPREAD_FACES = 8

_TWO_CORES: Mapping[str, Any] = {"stem_stride": 2, "batch_size": 16, "learning_rate": 2e-3, "loss": "l1+ssim"}


def _split(value: object) -> object:
    """``"16,32,64"``, as the command line passes it, to its parts."""
    return [part for part in value.replace(" ", "").split(",") if part] if isinstance(value, str) else value


Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=8192)], ...], BeforeValidator(_split), Field(min_length=1, max_length=8)
]


class UNetOptions(AttackOptions):
    """Options of :class:`UNet`; the defaults are the published ones where there are any.

    Attributes:
        widths: channels per level, from the finest to the bottleneck.
        stem_stride: the finest level works on pixels gathered in squares of this side (lossless
            space-to-depth); 1 is the published network, 2 is several times cheaper.
        bypass: side of a linear convolution from the input straight to the output; 0 for none.
        norm: normalisation after each convolution.
        loss: ``l1`` as published, or ``l1+ssim``: L1 + ``ssim_weight`` (1 - SSIM).
        ssim_weight: see ``loss``.
        learning_rate: of Adam, held after a linear warm-up, then decayed linearly to zero.
        batch_size: faces per step (fewer where there are fewer public faces).
        images: faces to train on in all, repeats counted.
        passes: least number of times that each public face is shown; where ``images`` are fewer, there are more, so
            that an attacker with more faces also trains longer.
        warmup: share of the training over which the learning rate rises.
        decay: share of the training, at the end, over which it falls to zero.
        early_stop: start the decay as soon as the validation loss has plateaued.
        flip: mirror half of the faces before they are protected.
        infer_state: at ``whitebox``, read each face's state off its representation and undo the layout,
            where a classifier fitted on public faces proves able to; else train on the mixture.
        guesses: at ``blackbox``, how many guesses of the secret to train on; 0 draws fresh ones every
            step, which marginalises over what is not known; 1 is the published single guess.
        validation: share of the public identities held out for the loss curve.
        plateau: relative gain of the last doubling below which the training counts as saturated.
    """

    widths: Widths = (64, 128, 256, 512, 1024)
    stem_stride: Literal[1, 2, 4] = 1
    bypass: Literal[0, 1, 3, 5, 7] = 3
    norm: Literal["batch", "none"] = "batch"
    loss: Literal["l1", "l1+ssim"] = "l1"
    ssim_weight: float = Field(default=0.2, gt=0, le=10, allow_inf_nan=False)
    learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(default=64, ge=2, le=65536)
    images: int = Field(default=1_000_000, ge=1)
    passes: int = Field(default=0, ge=0, le=100_000)
    warmup: float = Field(default=0.03, ge=0, le=0.5)
    decay: float = Field(default=0.3, ge=0, le=0.9)
    early_stop: bool = False
    flip: bool = True
    infer_state: bool = True
    guesses: int = Field(default=0, ge=0, le=4096)
    validation: float = Field(default=0.1, gt=0, lt=1)
    plateau: float = Field(default=0.03, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _whole_strides(cls, values: Any) -> Any:
        """``stem_stride=2`` and ``bypass=3`` reach a Literal of integers as strings from the command line."""
        if isinstance(values, dict):
            values = dict(values)
            for name in ("stem_stride", "bypass"):
                if isinstance(values.get(name), str) and values[name].strip().isdigit():
                    values[name] = int(values[name])
        return values

    @model_validator(mode="after")
    def _room_for_a_plateau(self) -> UNetOptions:
        if self.warmup + self.decay > 0.95:
            raise ValueError("warmup + decay must leave at least 5 % of the images at the full learning rate")
        return self


# -- the network --------------------------------------------------------------------------------------


class _DoubleConvolution(nn.Sequential):
    """Two 3x3 convolutions, each with normalisation and ReLU (Ronneberger et al. 2015, padded)."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class _Projection(nn.Module):
    """A 1x1 convolution whose weights follow the places of the channels, sample by sample."""

    def __init__(self, width: int, channels: int, outputs: int) -> None:
        """
        Args:
            width: places there are.
            channels: places filled in any one sample.
            outputs: channels out.
        """
        super().__init__()
        bound = (3 / channels) ** 0.5
        self.weight = nn.Parameter(torch.empty(width, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:
        """float (N, C, h, w) and int64 (N, C) to (N, outputs, h, w), channels last."""
        n, _, height, width = x.shape
        weight = self.weight.expand(n, -1, -1) if places is None else self.weight[places]
        flat = x.flatten(2).transpose(1, 2)
        out = torch.bmm(flat, weight)
        out = out + self.bias.to(out.dtype)
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)


class UNetNetwork(nn.Module):
    """Representation (N, C, h, w) to face (N, 3, H, W): mean face + linear bypass + U-Net.

    The output is linear, not squashed. Both trained terms start at zero, so that an untrained network
    returns the mean public face. Two ramps with the pixel's row and column join the input: faces are
    aligned, so position says what to expect, and where a defence has lost the low frequencies they
    must be put back by position.
    """

    mean: Tensor
    std: Tensor
    mean_face: Tensor

    def __init__(self, channels: int, image_size: int, options: UNetOptions, *, width: int | None = None) -> None:
        """
        Args:
            channels: C of the input.
            image_size: H = W of the faces.
            options: widths and layout.
            width: how many places the channels of a sample may take; None where they are always the same.
        """
        super().__init__()
        self.image_size, self.stride = image_size, options.stem_stride
        widths = options.widths
        self.register_buffer("mean", torch.zeros(width or channels))
        self.register_buffer("std", torch.ones(width or channels))
        self.register_buffer("mean_face", torch.full((3, image_size, image_size), 0.5))
        # Gathering s x s pixels multiplies the input channels by s^2; a projection first keeps a wide
        # representation from costing more than all the rest.
        self.project: _Projection | None = None
        if width is not None or (self.stride > 1 and channels > widths[0]):
            self.project = _Projection(width or channels, channels, min(channels, widths[0]))
            channels = min(channels, widths[0])
        self.bypass: nn.Module | None = None
        if options.bypass:
            self.bypass = nn.Conv2d(channels, 3, options.bypass, padding=options.bypass // 2)
            nn.init.zeros_(self.bypass.weight)
            assert self.bypass.bias is not None
            nn.init.zeros_(self.bypass.bias)
        first = (channels + 2) * self.stride**2
        self.down = nn.ModuleList(
            _DoubleConvolution(a, b, options.norm) for a, b in zip((first, *widths), widths, strict=False)
        )
        # A 1x1 convolution to four channels a pixel and a shuffle is a 2x2 transposed convolution, and
        # faster on a CPU.
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in itertools.pairwise(widths)
        )
        self.merge = nn.ModuleList(_DoubleConvolution(2 * a, a, options.norm) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 3 * self.stride**2, 1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def _standardise(self, x: Tensor, places: Tensor | None) -> Tensor:
        mean, std = (self.mean, self.std) if places is None else (self.mean[places], self.std[places])
        return (x - mean[..., None, None]) / std[..., None, None]

    def _fit_to_face(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, H, W) by interpolation, then padded to what the levels divide."""
        size = self.image_size
        if x.shape[-2:] != (size, size):
            shrinks = x.shape[-2] > size or x.shape[-1] > size
            x = functional.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
        extra = -size % (self.stride * 2 ** (len(self.down) - 1))
        return functional.pad(x, (0, extra, 0, extra), mode="replicate") if extra else x

    def forward(self, representation: Tensor, places: Tensor | None = None) -> Tensor:
        """float (N, C, h, w), and int64 (N, C) where the places vary, to float32 (N, 3, H, W), not clipped."""
        x = self._fit_to_face(self._standardise(representation, places))
        if self.project is not None:
            x = self.project(x, places)
        x = x.contiguous(memory_format=torch.channels_last)
        size = self.image_size
        linear = 0.0 if self.bypass is None else self.bypass(x)[..., :size, :size].float()

        ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        ramps = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).expand(len(x), -1, -1, -1)
        x = torch.cat((x, ramps), dim=1)
        x = functional.pixel_unshuffle(x, self.stride) if self.stride > 1 else x
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        x = self.head(x)
        x = functional.pixel_shuffle(x, self.stride) if self.stride > 1 else x
        return self.mean_face + linear + x[..., :size, :size].float()


# -- the attack ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What a prepared attack remembers of its adversary.

    Held outside the module's attributes: the defence is the adversary's, not a part of the attack's weights.
    """

    knowledge: Knowledge
    mechanism: Defense
    fabric: Fabric
    canonical: bool
    state_accuracy: float | None


@dataclass
class _Progress:
    """Where a fit stands; with the tensors it is all that a checkpoint holds."""

    step: int = 0
    decay_start: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


class UNet(RecoveryAttack):
    """U-Net inversion under the three rungs of knowledge.

    Trained to minimise L1(g(z), X) over faces X of public identities, protected afresh in every step.
    ``oracle`` knows each state and undoes the layout (:meth:`Defense.canonical`). ``whitebox`` knows the
    table of states: where :class:`StateClassifier` can tell them apart, it does the same with the
    inferred state, else it trains on the mixture. ``blackbox`` guesses the secret. Of k > 1
    interceptions the recoveries are averaged.
    """

    name: ClassVar[str] = "unet"
    summary: ClassVar[str] = "U-Net trained on public faces to undo the defence"
    reference: ClassVar[str] = "PartialFace (recovery attack), ICCV 2023; U-Net, MICCAI 2015"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM})
    Options: ClassVar[type[AttackOptions]] = UNetOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # A few hundred or thousand steps are all two cores can afford: small batches and a higher rate use
        # them best, the first level at half resolution halves the cost of each, and SSIM in the loss recovers
        # more by every measure, L1 included.
        "quick": {**_TWO_CORES, "widths": (16, 32, 64), "images": 2_000},
        "cpu": {**_TWO_CORES, "widths": (16, 32, 64, 128), "images": 16_000, "passes": 16},
        "gpu": {"loss": "l1+ssim", "images": 600_000, "early_stop": True},
        # As published: nothing added to the network, no state read off, one guess.
        "paper": {"images": 2_000_000, "early_stop": True, "bypass": 0, "infer_state": False, "guesses": 1},
    }
    options: UNetOptions

    network: UNetNetwork
    classifier: StateClassifier | None
    layout: ChannelLayout | None
    low: Tensor
    high: Tensor

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__(options)
        self._setting: _Setting | None = None

    def prepare(self, adversary: Adversary) -> None:
        """Build the network for the adversary's defence, and fit the classifier of states where one is used.

        Raises:
            ValueError: faces are not uint8 (M, 3, H, H), or identities do not match them.
        """
        faces = adversary.faces
        if faces.dtype != torch.uint8 or faces.ndim != 4 or faces.shape[1] != 3 or faces.shape[2] != faces.shape[3]:
            raise ValueError(f"unet expects public faces uint8 (M, 3, H, H), got {faces.dtype} {tuple(faces.shape)}")
        if adversary.identities.shape != faces.shape[:1] or not len(faces):
            raise ValueError(
                f"unet expects one identity per public face, got {len(faces)} faces and "
                f"{tuple(adversary.identities.shape)} identities"
            )
        seed = base_seed(adversary.generator)
        device = adversary.fabric.device
        mechanism = adversary.mechanism(derived(seed, "mechanism")).to(device)
        shape = mechanism.representation_shape

        states = mechanism.states()
        layout = None
        if adversary.knowledge is not Knowledge.BLACKBOX and states is not None and len(states) <= _MOST_STATES:
            layout = probe(mechanism, states)
        self.classifier, accuracy = None, None
        if adversary.knowledge is Knowledge.WHITEBOX and self.options.infer_state and layout and layout.varies:
            self.classifier, accuracy = _classifier_of_states(mechanism, layout, faces, seed)
        undoes = adversary.knowledge is Knowledge.ORACLE or self.classifier is not None
        self.layout = layout if undoes and layout and layout.varies else None

        channels = shape[0]
        canonical = adversary.knowledge is Knowledge.ORACLE and layout is None
        if canonical:
            # One zero representation tells how wide the layout is once the state is undone.
            blank = torch.zeros(1, *shape, device=device)
            channels = mechanism.canonical(blank, mechanism.draw(1, derived(seed, "shape"))).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived(seed, "weights").initial_seed())
            width = None if self.layout is None else self.layout.width
            self.network = UNetNetwork(channels, faces.shape[-1], self.options, width=width)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.register_buffer("low", torch.full((shape[0],), torch.inf))
        self.register_buffer("high", torch.full((shape[0],), -torch.inf))
        self.to(device)
        self._setting = _Setting(adversary.knowledge, mechanism, adversary.fabric, canonical, accuracy)

    def _prepared(self) -> _Setting:
        if self._setting is None:
            raise ValueError("unet has to be prepared or fitted before it is used")
        return self._setting

    def _see(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network takes: the representations and, where the state is undone, their channels' places."""
        setting = self._prepared()
        if self.classifier is not None and self.layout is not None:
            return representations, self.layout.places[self.classifier(representations)]
        if self.layout is not None and states is not None:
            return representations, self.layout.places[self.layout.row_of(states)]
        if setting.canonical:
            return setting.mechanism.canonical(representations, states), None
        return representations, None

    # -- training -----------------------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Train on public faces; some identities are held out for the loss curve.

        Raises:
            ValueError: unusable faces (see :meth:`prepare`), fewer than two identities, or a checkpoint
                of another fit.
            FloatingPointError: the loss is not finite.
        """
        self.prepare(adversary)
        options, setting, fabric = self.options, self._prepared(), adversary.fabric
        seed, device = base_seed(adversary.generator), fabric.device
        training, held_out = split_identities(adversary.identities, options.validation, derived(seed, "identities"))
        exposure = Exposure(adversary, seed, guesses=options.guesses)
        # A short training is not worth a long validation.
        images = max(options.images, options.passes * len(training))
        most = min(_VALIDATION_FACES, max(_CHUNK, images // 50))
        validation = _pick(adversary.faces, held_out, most, derived(seed, "validation")).to(device)
        self._measure(adversary.faces, training, exposure, seed)
        floor = float((to_float(validation) - self.network.mean_face).abs().mean())

        faces = adversary.faces.to(device)
        batch = min(options.batch_size, len(training))
        schedule = WarmHoldDecay(math.ceil(images / batch), options.warmup, options.decay)
        checks, rule = schedule.checks(), Plateau(relative=options.plateau)
        # Fused: one kernel instead of a loop over parameters, on CPU and GPU alike.
        optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.learning_rate, fused=device.type in ("cpu", "cuda")
        )
        average = copy.deepcopy(self.network).requires_grad_(False).eval()
        progress, seen = _Progress(), None
        countable = setting.mechanism.states() is not None
        fingerprint = {
            "options": options.model_dump(mode="json"),
            "seed": seed,
            "faces": list(faces.shape),
            "knowledge": str(adversary.knowledge),
        }
        if adversary.checkpoint is not None:
            seen = self._resume(adversary.checkpoint, fingerprint, average, optimizer, progress)
        model, optimizer = fabric.setup(self.network, optimizer)
        model.train()

        report_every = 1 if device.type == "cpu" else 25
        saved = started = time.monotonic()
        first_step = progress.step
        while progress.step < schedule.end(progress.decay_start):
            step = progress.step
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule.factor(step, progress.decay_start)
            generator = derived(seed, "faces", step)
            target = to_float(faces[_batch(training, batch, step, seed).to(device)])
            if options.flip:
                target = flip_some(target, generator)
            protected = exposure.protect(target, "protect", step)
            if countable and protected.state is not None:
                seen = protected.state if seen is None else torch.cat((seen, protected.state.to(seen.device)))
                seen = torch.unique(seen, dim=0)
            self._widen_range(protected.representation)
            loss = self._loss(model(*self._see(protected.representation, protected.state)), target)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            progress.step += 1
            _update_average(average, self.network, progress.step)

            done = progress.step
            if done % report_every == 0 or done == 1:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"unet: the loss became {value} at step {done}; try a lower learning_rate "
                        f"(now {options.learning_rate:g}) or full precision"
                    )
                speed = (done - first_step) * batch / max(1e-9, time.monotonic() - started)
                total = schedule.end(progress.decay_start) * batch
                adversary.report(done * batch, total, loss=value, images_per_second=speed)
            if progress.decay_start is None and done in checks:
                progress.curve.append((done * batch, self._validate(average, validation, exposure)))
                # The loss also rests at the floor before it starts to fall: never stop in the first quarter.
                late = done >= max(_LEAST_STEPS, schedule.hold_end // 4)
                if done == schedule.hold_end or (options.early_stop and late and rule.reached(progress.curve, floor)):
                    progress.decay_start = done
            if adversary.checkpoint is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._save(adversary.checkpoint, fingerprint, average, optimizer, progress, seen)
                saved = time.monotonic()
        if adversary.checkpoint is not None and progress.step > first_step:
            self._save(adversary.checkpoint, fingerprint, average, optimizer, progress, seen)

        held = tuple(progress.curve)
        final = self._validate(average, validation, exposure)
        if not math.isfinite(final):
            raise FloatingPointError(f"unet: the validation loss is {final}; try a lower learning_rate")
        self.network.load_state_dict(average.state_dict())
        self.eval()
        gain = rule.gain(held)
        return FitReport(
            saturated=progress.decay_start is not None
            and progress.decay_start >= _LEAST_STEPS
            and rule.reached(held, floor),
            states_seen=None if seen is None else seen.cpu(),
            curve=(*held, (progress.step * batch, final)),
            details={
                "steps": progress.step,
                "batch_size": batch,
                "images_seen": progress.step * batch,
                "epochs": progress.step * batch / len(training),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "training_faces": len(training),
                "validation_faces": len(validation),
                "validation_loss": final,
                "floor_loss": floor,
                "gain_of_last_doubling": gain,
                "stopped_early": progress.step < schedule.steps,
                "state_inference_accuracy": setting.state_accuracy,
                "states_inferred": self.classifier is not None,
                "input_range": [float(self.low.min()), float(self.high.max())],
            },
        )

    def _measure(self, faces: Tensor, training: Tensor, exposure: Exposure, seed: int) -> None:
        """Set the input statistics and the mean face from public training faces."""
        device = self.network.mean.device
        sample = _pick(faces, training, _STATISTICS_FACES, derived(seed, "statistics"))
        total, squares, count = (torch.zeros(len(self.network.mean), dtype=torch.float64) for _ in range(3))
        average = torch.zeros(faces.shape[1:], dtype=torch.float64)
        for number, chunk in enumerate(chunks(sample, _CHUNK)):
            protected = exposure.protect(to_float(chunk.to(device)), "statistics", number)
            self._widen_range(protected.representation)
            seen, places = self._see(protected.representation, protected.state)
            if places is None:
                places = torch.arange(seen.shape[1]).expand(len(seen), -1)
            flat, at = seen.flatten(2).double().cpu(), places.flatten().cpu()
            total.index_add_(0, at, flat.sum(dim=2).flatten())
            squares.index_add_(0, at, flat.square().sum(dim=2).flatten())
            count.index_add_(0, at, torch.full_like(at, flat.shape[2], dtype=torch.float64))
            average += chunk.cpu().double().sum(dim=0) / (255 * len(sample))
        count.clamp_(min=1)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A channel that never varies carries nothing; dividing it by its rounding error would.
        std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
        self.network.mean.copy_(mean)
        self.network.std.copy_(std)
        if self.options.flip:
            average = (average + average.flip(-1)) / 2
        self.network.mean_face.copy_(average)

    def _loss(self, recovered: Tensor, faces: Tensor) -> Tensor:
        loss = functional.l1_loss(recovered, faces)
        if self.options.loss == "l1+ssim":
            loss = loss + self.options.ssim_weight * (1 - ssim(recovered, faces)).mean()
        return loss

    @torch.no_grad()
    def _validate(self, network: UNetNetwork, faces: Tensor, exposure: Exposure) -> float:
        """L1 on held-out identities, the same draws every time; L1 whatever the loss, to compare with the floor."""
        total = 0.0
        for number, chunk in enumerate(chunks(faces, _CHUNK)):
            target = to_float(chunk)
            protected = exposure.protect(target, "validate", number)
            with self._prepared().fabric.autocast():
                recovered = network(*self._see(protected.representation, protected.state))
            total += float((recovered.clamp(0, 1) - target).abs().mean()) * len(chunk)
        return total / len(faces)

    # -- recovering -----------------------------------------------------------------------------------

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped; the average over each face's k interceptions.

        Raises:
            ValueError: not fitted; representations of another shape, not finite, or outside the range
                that training saw (the attack would be driven with input it was never meant for).
        """
        setting = self._prepared()
        representations = observation.representations
        n, k = representations.shape[:2]
        expected = setting.mechanism.representation_shape
        if tuple(representations.shape[2:]) != tuple(expected):
            raise ValueError(f"unet was trained on representations {expected}, got {tuple(representations.shape[2:])}")
        knows = setting.knowledge is Knowledge.ORACLE and setting.mechanism.draw(1, torch.Generator()) is not None
        if knows and observation.states is None:
            raise ValueError("unet at oracle needs the states of the intercepted faces")
        self._check_range(representations)
        states = None if observation.states is None else observation.states.flatten(0, 1)
        self.eval()
        device = self.network.mean.device
        recovered = []
        for start in range(0, n * k, _CHUNK):
            part = slice(start, start + _CHUNK)
            seen = self._see(representations.flatten(0, 1)[part].to(device), None if states is None else states[part])
            recovered.append(self.network(*seen))
        if not recovered:
            return torch.zeros(0, 3, self.network.image_size, self.network.image_size)
        faces = torch.cat(recovered)
        return faces.reshape(n, k, *faces.shape[1:]).mean(dim=1).to(representations.device)

    def _widen_range(self, representations: Tensor) -> None:
        low, high = representations.amin(dim=(0, 2, 3)), representations.amax(dim=(0, 2, 3))
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def _check_range(self, representations: Tensor) -> None:
        """Refuse input unlike the representations of public faces.

        Per channel, at most 0.1 % of the values may lie further outside the range seen in training than half
        its width: another scale or offset breaks that, an unusual face does not. Input of too small a
        scale stays inside the range; it is told by a spread below 1 % of that range over eight faces or more.

        Raises:
            ValueError: as above, or values that are not finite.
        """
        if not torch.isfinite(representations).all():
            raise ValueError("unet was handed representations that are not finite")
        if not representations.numel():
            return
        values = representations.detach().to(self.low.device)
        width = (self.high - self.low).clamp(min=1e-6)
        low = (self.low - _RANGE_MARGIN * width)[:, None, None]
        high = (self.high + _RANGE_MARGIN * width)[:, None, None]
        outside = float(((values < low) | (values > high)).float().mean())
        spread = float((values.amax(dim=(0, 1, 3, 4)) - values.amin(dim=(0, 1, 3, 4))).div(width).max())
        small = len(values) >= _SPREAD_FACES and spread < _LEAST_SPREAD
        if outside > _OUTSIDE_SHARE or small:
            raise ValueError(
                f"unet was handed representations from {float(values.min()):.4g} to {float(values.max()):.4g}, but "
                f"trained on {float(self.low.min()):.4g} to {float(self.high.max()):.4g}: they must come from the "
                f"defence it was trained on, un-normalised"
            )

    # -- resuming -------------------------------------------------------------------------------------

    def _save(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        average: UNetNetwork,
        optimizer: torch.optim.Optimizer,
        progress: _Progress,
        seen: Tensor | None,
    ) -> None:
        tensors = {f"attack/{name}": value for name, value in self.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
        tensors |= {
            f"optimizer/{name}": value for name, value in checkpoint.flatten_optimizer(optimizer.state_dict()).items()
        }
        if seen is not None:
            tensors["seen"] = seen
        checkpoint.save(folder, tensors, {"fit": fingerprint, "progress": asdict(progress)})

    def _resume(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        average: UNetNetwork,
        optimizer: torch.optim.Optimizer,
        progress: _Progress,
    ) -> Tensor | None:
        """Load the checkpoint in ``folder`` into all of these, if there is one; returns the states seen."""
        stored = checkpoint.load(folder)
        if stored is None:
            return None
        tensors, meta = stored
        if meta["fit"] != fingerprint:
            raise ValueError(f"{folder} holds the checkpoint of another fit: delete it, or name another folder")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.load_state_dict(under("attack/"))
        average.load_state_dict(under("average/"))
        checkpoint.restore_optimizer(optimizer, under("optimizer/"))
        progress.step, progress.decay_start = meta["progress"]["step"], meta["progress"]["decay_start"]
        progress.curve = [(int(images), float(loss)) for images, loss in meta["progress"]["curve"]]
        return tensors.get("seen")


# -- pieces -------------------------------------------------------------------------------------------


def _pick(faces: Tensor, index: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` of the faces at ``index``, at random."""
    return faces[index[torch.randperm(len(index), generator=generator)[:most]].to(faces.device)]


def _batch(training: Tensor, batch: int, step: int, seed: int) -> Tensor:
    """Indices of the faces of one step: each epoch is a permutation of its own, its remainder left out."""
    epoch, position = divmod(step, len(training) // batch)
    order = torch.randperm(len(training), generator=derived(seed, "epoch", epoch))
    return training[order[position * batch : (position + 1) * batch]]


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move ``average`` towards ``network``; the window grows with training, a fixed share of it."""
    weight = min(1.0, _AVERAGING / (step + _AVERAGING - 1))
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, weight)
        else:
            mean.copy_(value)


def _classifier_of_states(
    mechanism: Defense, layout: ChannelLayout, faces: Tensor, seed: int
) -> tuple[StateClassifier | None, float]:
    """A classifier of states fitted on public faces, and its accuracy on other draws of them.

    None where it is right for fewer than ``_RELIABLE`` of the faces, too few to build upon.
    """
    device = layout.places.device
    classifier = StateClassifier(len(layout.states), mechanism.channels).to(device)
    count = len(layout.states) * _EXAMPLES_PER_STATE
    generator = derived(seed, "states")
    sample = faces[torch.randint(len(faces), (2 * count,), generator=generator).to(faces.device)]
    parts, rows = [], []
    for chunk in chunks(sample, _CHUNK):
        protected = mechanism.protect(to_float(chunk.to(device)), generator)
        if protected.state is None:
            raise ValueError(f"{mechanism.name} lists states but says of no face which was drawn")
        parts.append(classifier.features(protected.representation))
        rows.append(layout.row_of(protected.state))
    features, classes = torch.cat(parts), torch.cat(rows)
    classifier.fit(features[:count], classes[:count])
    accuracy = float((classifier.predict(features[count:]) == classes[count:]).float().mean())
    return (classifier if accuracy >= _RELIABLE else None), accuracy
