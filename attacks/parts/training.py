"""How every attack that trains a network trains it: one loop, averaged weights, one plateau rule, checkpoints."""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attacks.base import Adversary, AttackOptions, FitReport
from attacks.parts.exposure import split_identities
from bench.errors import first_line
from bench.files import parse_json, replacing
from bench.graphs import Beside, Replayed
from bench.images import to_float
from bench.memory import Parts
from bench.randomness import derived

_FILE = "fit.safetensors"
#: Weights are averaged over about the last 1/16 of the steps so far.
_AVERAGING = 16
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
#: Held-out faces that give a loss curve: at most, and at least where the training is short.
_VALIDATION_FACES = 256
_LEAST_VALIDATION_FACES = 64


class TrainingOptions(AttackOptions):
    """How an attack trains a network; every attack that does has these options."""

    batch_size: int = Field(
        default=64, ge=2, le=65536, description="Faces per step (fewer where there are fewer public faces)."
    )
    learning_rate: float = Field(
        1e-3, gt=0, le=1, description="Learning rate of Adam, held after a linear warm-up, then falling linearly to 0."
    )
    warmup: float = Field(0.03, ge=0, le=0.5, description="Share of a training over which the rate rises.")
    decay: float = Field(0.3, ge=0, le=0.9, description="Share of a training, at its end, over which it falls.")
    early_stop: bool = Field(False, description="Start the decay as soon as the validation loss has plateaued.")
    compile: bool = Field(
        False,
        description="On a CUDA device, compile the network (torch.compile) where its steps are replayed: half a minute "
        "at first, which some twenty thousand steps win back.",
    )
    validation: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the public identities held out for the loss curve."
    )
    plateau: float = Field(
        0.03, gt=0, lt=1, description="Relative gain of the last doubling below which a training counts as saturated."
    )

    @model_validator(mode="after")
    def _room_for_a_plateau(self) -> Self:
        if self.warmup + self.decay > 0.95:
            raise ValueError("warmup + decay must leave at least 5 % of the steps at the full learning rate")
        return self


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

    def beats(self, loss: float, floor: float) -> bool:
        """Whether ``loss`` is better than the floor's by more than what counts as nothing."""
        return loss < (1 - max(self.relative, self.absolute)) * floor

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
    will be, so that losses at different lengths can be compared, and the decay can start early. ``warmup`` and
    ``decay`` are shares of the ``steps`` in all.
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


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a fit.

    Attributes:
        network: is trained in place, and ends with its averaged weights, in evaluation mode.
        loss: ``loss(*inputs(step))`` is what it minimises in that step.
        inputs: what a loss is made of that differs from step to step, whatever the network has learnt. Where these are
            tensors on a CUDA device, passes are replayed (:class:`bench.graphs.Replayed`): a loss may then depend on
            nothing else but what is the same in every step. By default the number of the step alone, of which nothing
            can be replayed.
        validate: the loss of a module like ``network`` on held-out identities.
        floor: what ``validate`` returns of one that has learnt nothing.
        steps: to train for.
        name: of the network, as messages, draws and checkpoints call it, where a fit trains several.
        learning_rate: at its peak; None for that of the options.
        early_stop: as the option; None for that.
        optimizer: makes the optimiser of a module's parameters.
        rival: a module trained in turn before the network, and its loss; never averaged.
        least_steps: at the full learning rate, before which a flat loss is no plateau: training has hardly begun.
        average_buffers: average buffers too; else they are the latest (those of batch norm are averages already,
            which lag behind if averaged once more).
        stored: what a checkpoint holds in place of the network, where there is more to it.
        later: steps of trainings that follow, for the progress.
        cut: the module, and its method, whose pass is cut into parts where an accelerator's memory is full
            (:class:`bench.memory.Parts`); None for the network itself.
    """

    network: nn.Module
    loss: Callable[..., Tensor]
    validate: Callable[[nn.Module], float]
    floor: float
    steps: int
    inputs: Callable[[int], tuple[Any, ...]] = lambda step: (step,)
    name: str = ""
    learning_rate: float | None = None
    early_stop: bool | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    rival: tuple[nn.Module, Callable[[int], Tensor]] | None = None
    least_steps: int = 200
    average_buffers: bool = True
    stored: nn.Module | None = None
    later: int = 0
    cut: tuple[nn.Module, str] | None = None


@dataclass
class _Progress:
    """Where a training stands; with the tensors it is all that a checkpoint holds."""

    step: int = 0
    decay_start: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """Trains the networks of one fit, one after the other, on public faces, with resuming and averaged weights.

    Every draw derives from the seed and the number of the step, so that a resumed training equals an unbroken one.

    ``held_out`` is the least share of the identities to hold out, where ``options.validation`` may be too little;
    ``fit`` are options that tell this fit from others, whose checkpoint is refused, by default ``options``.

    Attributes:
        faces: uint8 (M, 3, H, W), all public faces, on the device.
        fit: what tells it from other fits, as a checkpoint records it.
        training, held_out: int64, indices of the faces to train on and of those to validate with, of other identities.
        batch_size: faces per step.
        states_seen: int64 (K, D), the states trained on, each once, on the CPU; None where none was noted.

    Raises:
        ValueError: fewer than two identities.
    """

    def __init__(
        self,
        attack: str,
        adversary: Adversary,
        seed: int,
        options: TrainingOptions,
        *,
        held_out: float = 0.0,
        fit: AttackOptions | None = None,
    ) -> None:
        self.attack, self.adversary, self.seed, self.options = attack, adversary, seed, options
        self.fabric, self.device = adversary.fabric, adversary.fabric.device
        self.faces = adversary.faces.to(self.device)
        share = max(options.validation, held_out)
        self.training, self.held_out = split_identities(adversary.identities, share, derived(seed, "identities"))
        self.batch_size = min(options.batch_size, len(self.training))
        self.states_seen: Tensor | None = None
        self.fit = {
            "options": (fit or options).model_dump(mode="json"),
            "seed": seed,
            "faces": list(adversary.faces.shape),
            "knowledge": str(adversary.knowledge),
        }
        self._done = 0

    # -- faces --------------------------------------------------------------------------------------

    def floats(self, index: Tensor) -> Tensor:
        """The faces at ``index``, int64 (b,), as float32 (b, 3, H, W) in [0, 1]."""
        return to_float(self.faces[index.to(self.device)])

    def batch(self, step: int, *name: str) -> Tensor:
        """int64 (:attr:`batch_size`,), the faces of that step (from 0) of the training called ``name``.

        Each epoch is a permutation of its own, its remainder left out.
        """
        epoch, position = divmod(step, len(self.training) // self.batch_size)
        order = torch.randperm(len(self.training), generator=derived(self.seed, *name, "epoch", epoch))
        return self.training[order[position * self.batch_size : (position + 1) * self.batch_size]]

    def sample(self, count: int, *name: str) -> Tensor:
        """Indices of at most ``count`` training faces, at random."""
        return self.training[torch.randperm(len(self.training), generator=derived(self.seed, *name))[:count]]

    def validation(self, images: float = math.inf) -> Tensor:
        """Indices of held-out faces to validate with; fewer for a training of few ``images``, to take its share."""
        most = int(min(_VALIDATION_FACES, max(_LEAST_VALIDATION_FACES, images // 50)))
        return self.held_out[torch.randperm(len(self.held_out), generator=derived(self.seed, "validation"))[:most]]

    def mean_face(self, index: Tensor | None = None, *, mirrored: bool = True) -> Tensor:
        """Mean of the faces at ``index``, by default all to train on, and mirrored: float32 (3, H, W) in [0, 1]."""
        index = self.training if index is None else index
        total = torch.zeros(self.faces.shape[1:], dtype=torch.float64)
        for part in index.split(1024):
            total += self.faces[part.to(self.device)].sum(dim=0).cpu()  # whole numbers: exact on every device
        mean = total / (255 * len(index))
        return ((mean + mean.flip(-1)) / 2 if mirrored else mean).to(self.device, torch.float32)

    def floor(self, index: Tensor) -> float:
        """L1 of the mean face on the faces at ``index``."""
        return float((self.floats(index) - self.mean_face()).abs().mean())

    # -- training -----------------------------------------------------------------------------------

    def note(self, states: Tensor | None) -> None:
        """Count states, int64 (n, D), as trained on."""
        if states is not None:
            known = states.cpu() if self.states_seen is None else torch.cat((self.states_seen, states.cpu()))
            self.states_seen = torch.unique(known, dim=0)

    def train_on_faces(
        self,
        network: nn.Module,
        loss: Callable[..., Tensor],
        recover: Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]],
        *,
        images: int,
        **more: Any,
    ) -> FitReport:
        """Train a network that recovers faces on ``images``, repeats counted; ``more`` is of :class:`Training`.

        ``recover(network, index, number)``, by the network or its average, gives faces (b, 3, H, W) for batch
        ``number`` of held-out faces, those at ``index``, and what they should be. The loss curve is L1 between them,
        whatever the loss, to compare with the floor.
        """
        validation = self.validation(images)

        @torch.no_grad()
        def validate(module: nn.Module) -> float:
            total = 0.0
            for number, index in enumerate(validation.split(64)):
                faces, target = recover(module, index, number)
                total += float((faces.clamp(0, 1) - target).abs().mean()) * len(index)
            return total / len(validation)

        rest = {"steps": math.ceil(images / self.batch_size), **more}
        training = Training(network=network, loss=loss, validate=validate, floor=self.floor(validation), **rest)
        report = self.train(training)
        return replace(report, details=report.details | {"validation_faces": len(validation)})

    def train(self, training: Training) -> FitReport:
        """Train the network in place.

        Raises:
            ValueError: the checkpoint is that of another fit.
            FloatingPointError: a loss is not finite.
        """
        options, network = self.options, training.network
        schedule, rule = WarmHoldDecay(training.steps, options.warmup, options.decay), Plateau(options.plateau)
        checks, batch_size = schedule.checks(), self.batch_size
        peak = options.learning_rate if training.learning_rate is None else training.learning_rate
        early_stop = options.early_stop if training.early_stop is None else training.early_stop
        average = copy.deepcopy(network).requires_grad_(False).eval()
        modules = [network] if training.rival is None else [training.rival[0], network]
        # Fused: one kernel instead of a loop over parameters, on CPU and GPU alike.
        fused = self.device.type in ("cpu", "cuda")
        optimizers = [training.optimizer(module.parameters(), lr=peak, fused=fused) for module in modules]
        checkpoint = _Checkpoint(self, training, average, modules, optimizers)
        progress = checkpoint.resume()
        steppers = [cast("torch.optim.Optimizer", self.fabric.setup_optimizers(each)) for each in optimizers]
        averaging = _Average(average, network, buffers=training.average_buffers)
        report_every = 1 if self.device.type == "cpu" else 25
        first, saved, started = progress.step, time.monotonic(), time.monotonic()

        def finite(value: float, name: str) -> float:
            if not math.isfinite(value):
                what = f"{self.attack}: the {training.name}" if training.name else self.attack
                raise FloatingPointError(
                    f"{what}'s {name} became {value} at step {progress.step}; try a lower learning rate for it "
                    f"(learning_rate, now {peak:g}) or full precision"
                )
            return value

        cut, method = training.cut or (network, "forward")
        what = f"the training of {self.attack} {training.name}".strip()
        parts = Parts([cut, average] if cut is network else [cut], what, method)

        def validated() -> float:
            with parts:
                return training.validate(average)

        def passes(stepper: torch.optim.Optimizer, turn: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor]:
            loss = turn(*inputs)
            stepper.zero_grad()
            self.fabric.backward(loss)
            return (loss.detach(),)

        own = Replayed(
            functools.partial(passes, steppers[-1], training.loss),
            network.parameters(),
            self.device,
            whole=lambda: not parts.cuts,
            compiled=network if options.compile else None,
        )
        beside = Beside(self.device)
        turns: list[Callable[[int], tuple[Tensor, ...]]] = [lambda step: own(*beside(lambda: training.inputs(step)))]
        if training.rival is not None:
            turns.insert(0, functools.partial(passes, steppers[0], training.rival[1]))

        while progress.step < schedule.end(progress.decay_start):
            step = progress.step
            network.train()
            for module, turn, optimizer, stepper in zip(modules, turns, optimizers, steppers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule.factor(step, progress.decay_start)
                if training.rival is not None:
                    for other in modules:
                        other.requires_grad_(other is module)
                with parts:
                    (loss,) = parts.step(functools.partial(turn, step))
                stepper.step()
            progress.step = done = step + 1
            averaging.update(done)

            if done % report_every == 0 or done == 1:
                value = finite(float(loss), "loss")
                speed = (done - first) * batch_size / max(1e-9, time.monotonic() - started)
                total = (schedule.end(progress.decay_start) + training.later) * batch_size
                seen, total = self._done + done * batch_size, self._done + total
                self.adversary.report(seen, total, loss=value, images_per_second=speed)
            if progress.decay_start is None and done in checks:
                progress.curve.append((done * batch_size, validated()))
                # The loss also rests at the floor before it starts to fall: never stop in the first quarter.
                late = done >= max(training.least_steps, schedule.hold_end // 4)
                plateaued = early_stop and late and rule.reached(progress.curve, training.floor)
                if done == schedule.hold_end or plateaued:
                    progress.decay_start = done
            if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                checkpoint.save(progress)
                saved = time.monotonic()
        if progress.step > first:
            checkpoint.save(progress)

        held = tuple(progress.curve)
        final = finite(validated(), "validation loss")
        network.load_state_dict(average.state_dict())
        network.eval()
        self._done += progress.step * batch_size
        begun = progress.decay_start is not None and progress.decay_start >= training.least_steps
        # At the floor a loss rests because nothing was learnt, which does not say that nothing can be.
        learnt = rule.beats(final, training.floor)
        return FitReport(
            saturated=begun and learnt and rule.reached(held, training.floor),
            states_seen=self.states_seen,
            curve=(*held, (progress.step * batch_size, final)),
            details={
                "steps": progress.step,
                "batch_size": batch_size,
                "images_seen": progress.step * batch_size,
                "validation_loss": final,
                "floor_loss": training.floor,
                "gain_of_last_doubling": rule.gain(held),
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "training_faces": len(self.training),
            },
        )


class _Average:
    """Moves ``average`` towards ``network``; the window grows with training, a fixed share of it.

    Both are walked through once: on small networks that takes longer than a step's arithmetic here. Who trains changes
    values in place.
    """

    def __init__(self, average: nn.Module, network: nn.Module, *, buffers: bool) -> None:
        means, values = (list[Tensor](module.parameters()) for module in (average, network))
        self._kept: list[Tensor] = []
        self._latest: list[Tensor] = []
        for mean, latest in zip(average.buffers(), network.buffers(), strict=True):
            if buffers and mean.is_floating_point():
                means.append(mean)
                values.append(latest)
            else:
                self._kept.append(mean)
                self._latest.append(latest)
        self._means, self._values = means, values

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After so many steps."""
        weight = min(1.0, _AVERAGING / (step + _AVERAGING - 1))
        torch._foreach_lerp_(self._means, self._values, weight)
        if self._kept:
            torch._foreach_copy_(self._kept, self._latest)


class _Checkpoint:
    """What a killed training goes on from; does nothing where the adversary names no folder."""

    def __init__(
        self,
        trainer: Trainer,
        training: Training,
        average: nn.Module,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        folder = trainer.adversary.checkpoint
        self._folder = None if folder is None else folder / training.name
        self._trainer, self._optimizers = trainer, optimizers
        stored = [*modules[:-1], training.stored or training.network]
        self._modules = {**{f"module{number}": module for number, module in enumerate(stored)}, "average": average}

    def save(self, progress: _Progress) -> None:
        if self._folder is None:
            return
        groups = {name: module.state_dict() for name, module in self._modules.items()}
        for number, optimizer in enumerate(self._optimizers):
            groups[f"optimizer{number}"] = flatten_optimizer(optimizer.state_dict())
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        if self._trainer.states_seen is not None:
            tensors["seen"] = self._trainer.states_seen
        save(self._folder, tensors, {"fit": self._trainer.fit, "progress": asdict(progress)})

    def resume(self) -> _Progress:
        """Load what is stored, if anything is; where the training stands."""
        stored = None if self._folder is None else load(self._folder)
        if stored is None:
            return _Progress()
        tensors, meta = stored
        if meta.get("fit") != self._trainer.fit:
            raise ValueError(f"{self._folder} holds the checkpoint of another fit: delete it, or name another folder")
        try:
            return self._restored(tensors, meta["progress"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._folder} holds a damaged checkpoint ({first_line(error)}): delete it to start the fit again"
            ) from error

    def _restored(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> _Progress:

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        for name, module in self._modules.items():
            module.load_state_dict(under(f"{name}/"))
        for number, optimizer in enumerate(self._optimizers):
            restore_optimizer(optimizer, under(f"optimizer{number}/"))
        self._trainer.states_seen = tensors.get("seen")
        curve = [(int(images), float(loss)) for images, loss in progress["curve"]]
        start = progress["decay_start"]
        return _Progress(int(progress["step"]), None if start is None else int(start), curve)


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``meta`` (JSON values) to one file in ``folder``, replacing the last one.

    The JSON travels in the header of the safetensors file, so that a killed run leaves either the old checkpoint or
    the new one.
    """
    # Scalars and views are cloned: safetensors stores each tensor contiguous and unshared.
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(folder / _FILE) as beside:
        save_file(stored, beside, metadata={"fit": json.dumps(meta)})


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
            meta = dict(parse_json((file.metadata() or {})["fit"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
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
