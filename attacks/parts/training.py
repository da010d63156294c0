"""How every attack that trains a network trains it: one schedule, averaged weights, one plateau rule, checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning_fabric import Fabric
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, AttackOptions, Report, Widths
from attacks.parts.exposure import chunks
from bench.images import to_float
from bench.randomness import derived

_FILE = "fit.safetensors"


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``meta`` (JSON values) to one file in ``folder``, replacing the last one.

    The JSON travels in the header of the safetensors file, so that both are renamed into place as one
    and a killed run leaves either the old checkpoint or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_FILE}.partial"
    # Scalars and views are cloned: safetensors stores each tensor contiguous and unshared.
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(stored, beside, metadata={"fit": json.dumps(meta)})
    beside.replace(folder / _FILE)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save` wrote to ``folder`` (tensors on the CPU), or None where there is nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {})["fit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}): delete it to start the fit again") from error
    return tensors, meta


def flatten_optimizer(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``optimizer.state_dict()``, named ``<parameter>/<entry>``."""
    return {
        f"{parameter}/{entry}": torch.as_tensor(value)
        for parameter, entries in state["state"].items()
        for entry, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`flatten_optimizer`: put the tensors back (learning rates are left as they are)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, entry = name.split("/")
        like = parameters[int(number)]
        if tensor.shape == like.shape:
            # The strides of the parameter too (channels last): other strides take another kernel, which
            # rounds differently, and a resumed fit would no longer equal an unbroken one.
            tensor = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        entries.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True, slots=True)
class Plateau:
    """Saturated: the last doubling of the training gained next to nothing on held-out identities.

    A loss recorded under a decaying learning rate always falls at the end, whether or not longer
    training would help. So the rule looks at the phase of constant learning rate alone, at averaged
    weights, and compares the loss at its end with the loss at half of the images: the decay neither
    counts as progress nor hides it. The gain is nothing when it is below ``relative`` of the earlier
    loss, or below ``absolute`` of what separates the floor (the mean face) from a perfect recovery: the
    second clause is what ends the training of an attack that is already next to perfect. A loss above that of the
    floor has not come to rest, however little it moves: answering the same every time would do better.

    Attributes:
        relative: share of the earlier loss.
        absolute: share of the floor's loss.
    """

    relative: float = 0.03
    absolute: float = 0.01

    def gain(self, curve: Sequence[tuple[int, float]]) -> float | None:
        """Fall of the loss over the last doubling of ``curve`` ((images, loss), ascending), or None.

        None while the curve holds no point at half of its last number of images (or less, down to a
        quarter: points further back would make progress look slower than it is).
        """
        if not curve:
            return None
        images, loss = curve[-1]
        earlier = [(n, value) for n, value in curve if images / 4 <= n <= images / 2]
        return earlier[-1][1] - loss if earlier else None

    def reached(self, curve: Sequence[tuple[int, float]], floor: float) -> bool:
        """Whether the last doubling of ``curve`` gained next to nothing; False where that is unknown."""
        gain = self.gain(curve)
        if gain is None or curve[-1][1] > (1 + self.relative) * floor:
            return False
        earlier = curve[-1][1] + gain
        return gain <= max(self.relative * earlier, self.absolute * floor)


@dataclass(frozen=True, slots=True)
class WarmHoldDecay:
    """Linear warm-up, a constant phase, linear decay to zero.

    Unlike a cosine it has a phase in which the learning rate says nothing about how long the training
    will be, so that losses at different lengths can be compared, and the decay can start early.

    Attributes:
        steps: in all.
        warmup: share of ``steps`` in the warm-up.
        decay: share of ``steps`` in the decay.
    """

    steps: int
    warmup: float
    decay: float

    @property
    def hold_end(self) -> int:
        """Step at which the decay starts unless it is brought forward."""
        return max(1, self.steps - int(self.steps * self.decay))

    def end(self, decay_start: int | None = None) -> int:
        """Number of steps in all when the decay starts at ``decay_start``: the shares are kept."""
        if decay_start is None or decay_start >= self.hold_end:
            return self.steps
        return decay_start + math.ceil(decay_start * self.decay / (1 - self.decay))

    def factor(self, step: int, decay_start: int | None = None) -> float:
        """Multiple of the full learning rate at ``step`` (0-based), in (0, 1]."""
        rise = min(1.0, (step + 1) / (self.warmup * self.steps + 1))
        start = self.hold_end if decay_start is None else decay_start
        fall = 1.0 if step < start else (self.end(start) - step) / (self.end(start) - start + 1)
        return min(rise, fall)

    def checks(self) -> list[int]:
        """Steps, ascending, at which to record the loss: the end of the hold, its halves, and between the last ones.

        Few, for validation costs time; each of the later ones has another at half of its steps.
        """
        shares = (1, 2**-0.5, 1 / 2, 8**-0.5, 1 / 4, 1 / 8, 1 / 16)
        points = {round(self.hold_end * share) for share in shares}
        return sorted(point for point in points if point >= 1)


#: Weights are averaged over about the last 1/16 of the steps so far.
_AVERAGING = 16
_SECONDS_BETWEEN_CHECKPOINTS = 60.0


class SeenStates:
    """The states that a training has met.

    Attributes:
        states: int64 (K, D), each once, on the CPU; None where none was noted.
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def add(self, states: Tensor | None) -> None:
        """Note states, int64 (n, D)."""
        if states is not None:
            known = states.cpu() if self.states is None else torch.cat((self.states, states.cpu()))
            self.states = torch.unique(known, dim=0)


class EpochBatches:
    """Which faces a step is trained on: each epoch is a permutation of its own, its remainder left out.

    Args:
        training: int64 (T,), the faces to train on.
        batch_size: B; T where there are fewer.
        seed: of the attack.
        name: of the draws, where one attack trains several networks.

    Attributes:
        size: faces per step.
    """

    def __init__(self, training: Tensor, batch_size: int, seed: int, *name: str | int) -> None:
        self.size = min(batch_size, len(training))
        self._training, self._seed, self._name = training, seed, name

    def __call__(self, step: int) -> Tensor:
        """int64 (:attr:`size`,), the faces of that step (from 0)."""
        epoch, position = divmod(step, len(self._training) // self.size)
        order = torch.randperm(len(self._training), generator=derived(self._seed, *self._name, "epoch", epoch))
        return self._training[order[position * self.size : (position + 1) * self.size]]


@dataclass(frozen=True)
class Player:
    """A module under training, its optimiser, and what it minimises: the loss of step s is ``loss(s)``."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        steps: it took.
        curve: validation loss as (images seen, loss), at the full learning rate and, last, after its decay.
        saturated: whether the last doubling at the full learning rate gained next to nothing.
        gain: what that doubling gained, where it is known.
        batch_size: images per step.
        floor: validation loss of what has learnt nothing.
    """

    steps: int
    curve: tuple[tuple[int, float], ...]
    saturated: bool
    gain: float | None
    batch_size: int
    floor: float

    def details(self) -> dict[str, Any]:
        """What a fit's report tells of its training."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "images_seen": self.steps * self.batch_size,
            "validation_loss": self.curve[-1][1],
            "floor_loss": self.floor,
            "gain_of_last_doubling": self.gain,
        }


@dataclass
class _Progress:
    """Where a training stands; with the tensors it is all that a checkpoint holds."""

    step: int = 0
    decay_start: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """One training.

    Attributes:
        what: is trained, as messages call it.
        players: take their steps in turn; the averaged weights are those of the last one's module.
        batch_size: images per step.
        learning_rate: of every player, at its peak.
        schedule: how long, and how the rate rises and falls.
        rule: when the training counts as saturated.
        validate: the loss of a module like the last player's on held-out identities.
        floor: what ``validate`` returns of one that has learnt nothing.
        least_steps: at the full learning rate, before which a flat loss is no plateau: training has hardly begun.
        early_stop: start the decay as soon as the validation loss has plateaued.
        average_buffers: average buffers too; else they are the latest (those of batch norm are averages already,
            which lag behind if averaged once more).
        fabric: device and precision.
        report: called as ``report(done, total, loss=, images_per_second=)``, counting images.
        folder: of a checkpoint, which is resumed; None for none.
        stored: modules that a checkpoint holds, by name.
        fit: JSON values that tell this training from others; a checkpoint of another one is refused.
        seen: the states met.
    """

    what: str
    players: Sequence[Player]
    batch_size: int
    learning_rate: float
    schedule: WarmHoldDecay
    rule: Plateau
    validate: Callable[[nn.Module], float]
    floor: float
    least_steps: int
    early_stop: bool = False
    average_buffers: bool = True
    fabric: Fabric
    report: Report
    folder: Path | None = None
    stored: Mapping[str, nn.Module]
    fit: Mapping[str, Any]
    seen: SeenStates

    def run(self) -> Outcome:
        """Train in place; the last player's module ends with its averaged weights, in evaluation mode.

        Raises:
            ValueError: a checkpoint of another training.
            FloatingPointError: the loss is not finite.
        """
        schedule, rule = self.schedule, self.rule
        checks, network = schedule.checks(), self.players[-1].module
        average = copy.deepcopy(network).requires_grad_(False).eval()
        progress = _Progress()
        if self.folder is not None:
            self._resume(self.folder, average, progress)
        steppers = [
            cast("torch.optim.Optimizer", self.fabric.setup_optimizers(player.optimizer)) for player in self.players
        ]
        report_every = 1 if self.fabric.device.type == "cpu" else 25
        first, saved, started = progress.step, time.monotonic(), time.monotonic()
        while progress.step < schedule.end(progress.decay_start):
            step = progress.step
            rate = self.learning_rate * schedule.factor(step, progress.decay_start)
            network.train()
            for player, stepper in zip(self.players, steppers, strict=True):
                for group in player.optimizer.param_groups:
                    group["lr"] = rate
                with self._alone(player):
                    loss = player.loss(step)
                stepper.zero_grad()
                self.fabric.backward(loss)
                stepper.step()
            progress.step = done = step + 1
            self._update(average, network, done)

            if done % report_every == 0 or done == 1:
                value = self._finite(float(loss.detach()), "loss", done)
                speed = (done - first) * self.batch_size / max(1e-9, time.monotonic() - started)
                total = schedule.end(progress.decay_start) * self.batch_size
                self.report(done * self.batch_size, total, loss=value, images_per_second=speed)
            if progress.decay_start is None and done in checks:
                progress.curve.append((done * self.batch_size, self.validate(average)))
                # The loss also rests at the floor before it starts to fall: never stop in the first quarter.
                late = done >= max(self.least_steps, schedule.hold_end // 4)
                plateaued = self.early_stop and late and rule.reached(progress.curve, self.floor)
                if done == schedule.hold_end or plateaued:
                    progress.decay_start = done
            if self.folder is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._save(self.folder, average, progress)
                saved = time.monotonic()
        if self.folder is not None and progress.step > first:
            self._save(self.folder, average, progress)

        held = tuple(progress.curve)
        final = self._finite(self.validate(average), "validation loss", progress.step)
        network.load_state_dict(average.state_dict())
        network.eval()
        begun = progress.decay_start is not None and progress.decay_start >= self.least_steps
        return Outcome(
            steps=progress.step,
            curve=(*held, (progress.step * self.batch_size, final)),
            saturated=begun and rule.reached(held, self.floor),
            gain=rule.gain(held),
            batch_size=self.batch_size,
            floor=self.floor,
        )

    def _finite(self, value: float, name: str, step: int) -> float:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.what}'s {name} became {value} at step {step}; try a lower learning rate for it "
                f"(learning_rate, now {self.learning_rate:g}) or full precision"
            )
        return value

    @contextmanager
    def _alone(self, player: Player) -> Iterator[None]:
        """Gradients for one player's weights alone."""
        others = [other.module for other in self.players if other is not player]
        for other in others:
            other.requires_grad_(False)
        try:
            yield
        finally:
            for other in others:
                other.requires_grad_(True)

    @torch.no_grad()
    def _update(self, average: nn.Module, network: nn.Module, step: int) -> None:
        """Move ``average`` towards ``network``; the window grows with training, a fixed share of it."""
        weight = min(1.0, _AVERAGING / (step + _AVERAGING - 1))
        for mean, value in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(value, weight)
        for kept, latest in zip(average.buffers(), network.buffers(), strict=True):
            if self.average_buffers and kept.is_floating_point():
                kept.lerp_(latest, weight)
            else:
                kept.copy_(latest)

    # -- resuming -----------------------------------------------------------------------------------

    def _save(self, folder: Path, average: nn.Module, progress: _Progress) -> None:
        groups = {name: module.state_dict() for name, module in self.stored.items()}
        groups["average"] = average.state_dict()
        for number, player in enumerate(self.players):
            groups[f"optimizer{number}"] = flatten_optimizer(player.optimizer.state_dict())
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        if self.seen.states is not None:
            tensors["seen"] = self.seen.states
        save(folder, tensors, {"fit": dict(self.fit), "progress": asdict(progress)})

    def _resume(self, folder: Path, average: nn.Module, progress: _Progress) -> None:
        """Load the checkpoint in ``folder``, if there is one."""
        stored = load(folder)
        if stored is None:
            return
        tensors, meta = stored
        if meta["fit"] != self.fit:
            raise ValueError(f"{folder} holds the checkpoint of another fit: delete it, or name another folder")

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        for name, module in {**self.stored, "average": average}.items():
            module.load_state_dict(under(f"{name}/"))
        for number, player in enumerate(self.players):
            restore_optimizer(player.optimizer, under(f"optimizer{number}/"))
        self.seen.states = tensors.get("seen")
        progress.step, progress.decay_start = meta["progress"]["step"], meta["progress"]["decay_start"]
        progress.curve = [(int(images), float(loss)) for images, loss in meta["progress"]["curve"]]


# -- training -----------------------------------------------------------------------------------------


#: ITU-R BT.601 luma weights of R, G, B.
_LUMA = (0.299, 0.587, 0.114)
#: Faces that give the statistics of an encoder's input, and how many of them at once.
_STATISTICS_FACES = 1024
_CHUNK = 64
#: Before so many steps at the full learning rate, a flat loss is no plateau: training has hardly begun.
_LEAST_STEPS = 200


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


def at(faces: Tensor, index: Tensor) -> Tensor:
    """``faces[index]``, wherever either lies."""
    return faces[index.to(faces.device)]


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
