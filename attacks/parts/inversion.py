"""What the attacks that train a network to undo a defence have in common: the training and its checks."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, FitReport, Knowledge, Observation, RecoveryAttack
from attacks.parts.exposure import Exposure, in_chunks, tamed
from attacks.parts.inputs import AUTO, Example, InputOptions, Inputs, names_of
from attacks.parts.losses import reconstruction
from attacks.parts.training import Trainer, TrainingOptions
from attacks.parts.unet_network import NetworkOptions
from bench.memory import in_halves
from bench.muon import Muon
from bench.nets.augmentation import augment
from bench.nets.options import AugmentationOptions
from bench.randomness import derived, seeded
from defenses.base import Defense, Protected

#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: Public faces on which views are measured, and others on which they are compared, at most; of wide representations
#: there are fewer, an eighth of these at least.
_INPUT_FACES, _UNSEEN_FACES, _INPUT_VALUES = 512, 64, 2**23
#: Held-out public faces, and interceptions of each, on which it is tried what to average: recoveries, or what was sent.
_SEVERAL_FACES, _SEVERAL = 64, 4
#: Tolerances of the input-range check.
_RANGE_MARGIN = 0.5
_OUTSIDE_SHARE = 1e-3
_OUTSIDE_FACES = 0.25
_LEAST_SPREAD = 0.01
_SPREAD_FACES = 8

#: What a learning rate of Adam is as a share of a matrix's norm: .05 for .002.
_MUON_SHARE = 25.0

#: Of a preset for two cores, where a few hundred or thousand steps are all one can afford: small batches and a higher
#: rate use them best, the first level at half resolution halves the cost of each, and SSIM in the loss recovers more by
#: every measure, L1 included.
TWO_CORES: Mapping[str, Any] = {"stem_stride": 2, "batch_size": 16, "learning_rate": 2e-3, "loss": "l1+ssim"}


class InversionOptions(TrainingOptions, NetworkOptions):
    """Options of a trained inversion, beside those of the network."""

    loss: Literal["l1", "l1+ssim"] = Field(
        default="l1", description="l1 as published, or l1+ssim: L1 + ssim_weight (1 - SSIM)."
    )
    ssim_weight: float = Field(default=0.2, gt=0, le=10, description="Weight of 1 - SSIM, where loss has it.")
    optimiser: Literal["adam", "muon"] = Field(
        "adam",
        description="adam, or muon: steps of convolutions are orthogonal matrices, whose share of a weight's norm is "
        f"{_MUON_SHARE:g} times the learning rate, and those of the rest Adam's.",
    )
    images: int = Field(1_000_000, ge=1, description="Faces to train on in all, repeats counted.")
    passes: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Least number of times that each public face is shown; where images are fewer, there are more, so "
        "that an attacker with more faces also trains longer.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Gradient steps in all, instead of what images and passes say."
    )
    flip: bool = Field(True, description="Mirror half of the faces before they are protected.")


#: The faces of a step, what the network is shown of them, and their states.
_Example = tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]


class InversionAttack(RecoveryAttack):
    """Trains :attr:`network` to minimise L1(prediction, X) over public faces X, protected afresh in each step.

    A subclass builds the network and the buffers in :meth:`build` (with :meth:`_build_range`), and says what the
    network is shown.

    Attributes:
        network: what is trained.
        low, high: float32 (C,) buffers, the range of each channel seen in training.
        averages: bool () buffer, whether the average of several interceptions is shown, not that of recoveries taken.
    """

    #: Steps whose examples are made at once, where that is cheaper than one by one.
    lookahead = 1
    budgets: ClassVar = {"steps": "steps"}

    options: InversionOptions
    network: nn.Module
    low: Tensor
    high: Tensor
    averages: Tensor

    def _exposure(self) -> Exposure:
        """How public faces are protected in training."""
        return Exposure(self.adversary, self.seed)

    def _protect(self, target: Tensor, exposure: Exposure, step: int) -> Protected:
        """The faces of a step as the defence sends them."""
        return exposure.protect(target, "protect", step)

    def _view(self, representations: Tensor) -> Tensor:
        """What takes the place of representations, (N, C, h, w), whatever their states: they themselves."""
        return representations

    @abstractmethod
    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the network takes, each (N, ...), for views (N, C', h, w) of representations of states (N, D)."""

    def _predict(self, network: nn.Module, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """Faces (N, 3, H, W), by ``network`` or its average, from what :meth:`_inputs` made, and nothing else."""
        faces: Tensor = network(*inputs)
        return faces

    def _learn_of_defence(self, trainer: Trainer) -> dict[str, Any]:
        """What has to be known before training, from the faces to train on; returns details of it."""
        return {}

    def _choose_input(self, trainer: Trainer, exposure: Exposure) -> dict[str, Any]:
        """What :meth:`_view` is to be; returns details of it."""
        return {}

    @abstractmethod
    def _measure(self, trainer: Trainer, exposure: Exposure) -> None:
        """Set the network's input statistics, and the range, from public training faces."""

    def _build_range(self) -> None:
        self.register_buffer("averages", torch.tensor(False))
        self.register_buffer("low", torch.full((self.mechanism.channels,), torch.inf))
        self.register_buffer("high", torch.full((self.mechanism.channels,), -torch.inf))

    def fit(self, adversary: Adversary) -> FitReport:
        """Train on public faces; some identities are held out for the loss curve."""
        options = self.options
        trainer = Trainer(self.name, adversary, self.seed, options)
        details = self._learn_of_defence(trainer)
        exposure = self._exposure()
        details |= self._choose_input(trainer, exposure)
        self._measure(trainer, exposure)
        images = max(options.images, options.passes * len(trainer.training))
        steps, countable = options.steps or math.ceil(images / trainer.batch_size), exposure.countable
        model = adversary.fabric.setup_module(self.network)
        ahead: dict[int, _Example] = {}

        def inputs(step: int) -> tuple[Tensor | None, ...]:
            ahead.pop(step - 1, None)
            if step not in ahead:
                # Always the same steps together, so that a resumed training equals an unbroken one to the last bit.
                start = step - step % self.lookahead
                together = range(start, min(start + self.lookahead, steps))
                ahead.update(zip(together, self._examples(trainer, together, exposure), strict=True))
            target, shown, state = ahead[step]
            if countable:
                trainer.note(state)
            return target, *shown

        def loss(target: Tensor, *shown: Tensor | None) -> Tensor:
            recovered = self._predict(model, shown)
            return reconstruction(recovered, target, options.ssim_weight if options.loss == "l1+ssim" else 0)

        def recover(network: nn.Module, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
            target = trainer.floats(index)
            protected = exposure.protect(target, "validate", number)
            with trainer.fabric.autocast():
                return self._predict(
                    network, self._inputs(self._view(protected.representation), protected.state)
                ), target

        def optimizer(parameters: Iterator[nn.Parameter], **rates: Any) -> torch.optim.Optimizer:
            if options.optimiser == "adam":
                return torch.optim.Adam(parameters, **rates)
            adam = functools.partial(torch.optim.Adam, fused=rates.pop("fused"))
            return Muon(self.network, adam, share=_MUON_SHARE, **rates)

        report = trainer.train_on_faces(
            self.network,
            loss,
            recover,
            inputs=inputs,
            optimizer=optimizer,
            images=images,
            steps=steps,
            stored=self,
        )
        details |= {
            "epochs": report.details["steps"] * trainer.batch_size / len(trainer.training),
            "stopped_early": report.details["steps"] < steps,
            "input_range": [float(self.low.min()), float(self.high.max())],
            **self._choose_average(trainer, exposure),
        }
        return replace(report, details=report.details | details)

    @torch.no_grad()
    def _examples(self, trainer: Trainer, steps: range, exposure: Exposure) -> list[_Example]:
        """The faces of these steps, what the network is shown of each, and its state."""
        targets, views, drawn = [], [], []
        mirroring = AugmentationOptions(flip=0.5 if self.options.flip else 0)
        for step in steps:
            target = augment(trainer.floats(trainer.batch(step)), mirroring, derived(self.seed, "faces", step))
            targets.append(target)
            protected = self._protect(target, exposure, step)
            views.append(self._view(protected.representation))
            drawn.append(protected.state)
            self._widen_range(views[-1])
        states = [state for state in drawn if state is not None]
        inputs = self._inputs(torch.cat(views), torch.cat(states) if states else None)
        parts = [[None] * len(steps) if value is None else value.split(trainer.batch_size) for value in inputs]
        shown: list[tuple[Tensor | None, ...]] = list(zip(*parts, strict=True))
        return list(zip(targets, shown, drawn, strict=True))

    @torch.no_grad()
    def _choose_average(self, trainer: Trainer, exposure: Exposure) -> dict[str, Any]:
        """Try on held-out public faces what is to be averaged; nothing where the same is sent every time."""
        target = trainer.floats(trainer.validation()[:_SEVERAL_FACES])
        sent = [exposure.protect(target, "several", number) for number in range(_SEVERAL)]
        several = torch.stack([part.representation for part in sent], dim=1)
        states = [part.state for part in sent if part.state is not None]
        if torch.equal(several[:, 0], several[:, 1]):
            return {}
        self.network.eval()
        drawn, losses = torch.stack(states, dim=1) if states else None, []
        for averages in (False, True):
            self.averages.fill_(averages)
            recovered = self._recover_several(several, drawn).clamp(0, 1)
            losses.append(float((recovered - target).abs().mean()))
        self.averages.fill_(losses[1] < losses[0])
        return {"averages_interceptions": bool(self.averages)}

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped, out of each face's k interceptions together."""
        self._check_range(observation)
        return self._recover_several(observation.representations, observation.states)

    def _recover_several(self, representations: Tensor, states: Tensor | None) -> Tensor:
        """Faces (N, 3, H, W) from interceptions (N, k, C, h, w) of states int64 (N, k, D), where these are known."""
        if self.averages:
            representations = representations.mean(dim=1, keepdim=True)
            states = None if states is None else states[:, :1]
        count = representations.shape[:2]
        flat, drawn = representations.flatten(0, 1), None if states is None else states.flatten(0, 1)

        def recover(rows: slice) -> Tensor:
            return self._recover(flat[rows].to(self.device), None if drawn is None else drawn[rows])

        recovered = torch.cat(list(in_halves(recover, len(flat), _CHUNK, f"attack {self.name}")))
        return recovered.view(*count, *recovered.shape[1:]).mean(dim=1)

    def _recover(self, representations: Tensor, states: Tensor | None) -> Tensor:
        """Faces (M, 3, H, W) from one interception each, (M, C, h, w)."""
        return self._predict(self.network, self._inputs(self._view(representations), states))

    def _widen_range(self, views: Tensor) -> None:
        energy = torch.linalg.vector_norm(views.flatten(1), dim=1).square()
        wild = (energy > tamed(energy))[:, None]  # a face of a wild scale would let anything pass
        low = views.amin(dim=(2, 3)).masked_fill(wild, torch.inf).amin(dim=0)
        high = views.amax(dim=(2, 3)).masked_fill(wild, -torch.inf).amax(dim=0)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def _views_of(self, representations: Tensor) -> Tensor:
        """Views (N k, C', h, w) of interceptions (N, k, C, h, w)."""
        return in_chunks(self._view, representations.flatten(0, 1))

    def _check_range(self, observation: Observation) -> None:
        """Refuse input unlike the representations of public faces, and a missing state.

        Per channel, at most 0.1 % of a face's values may lie further outside the range seen in training than half
        its width: another scale or offset breaks that, an unusual face does not. One face may, and a quarter of them:
        a defence that sends a few at a scale of their own is attacked all the same. Input of too small a
        scale stays inside the range; it is told by a spread below 1 % of that range over eight faces or more.
        """
        knows = self.adversary.knowledge is Knowledge.ORACLE
        if knows and observation.states is None and self.mechanism.draw(1, torch.Generator()) is not None:
            raise ValueError(f"{self.name} at oracle needs the states of the intercepted faces")
        values = self._views_of(observation.representations.detach().to(self.low.device))
        width = (self.high - self.low).clamp(min=1e-6)
        low = (self.low - _RANGE_MARGIN * width)[:, None, None]
        high = (self.high + _RANGE_MARGIN * width)[:, None, None]
        outside = ((values < low) | (values > high)).float().mean(dim=(1, 2, 3)).view(len(observation), -1).mean(dim=1)
        strangers = int((outside > _OUTSIDE_SHARE).sum())
        spread = float((values.amax(dim=(0, 2, 3)) - values.amin(dim=(0, 2, 3))).div(width).max())
        small = len(observation) >= _SPREAD_FACES and spread < _LEAST_SPREAD
        if strangers > max(1, _OUTSIDE_FACES * len(observation)) or small:
            raise ValueError(
                f"{self.name} was handed representations from {float(values.min()):.4g} to "
                f"{float(values.max()):.4g}, but trained on {float(self.low.min()):.4g} to "
                f"{float(self.high.max()):.4g}: they must come from the "
                f"defence it was trained on, un-normalised"
            )


class ViewingOptions(InversionOptions, InputOptions):
    """Options of a trained inversion whose network is shown views of the representation."""


class ViewingAttack(InversionAttack):
    """Whose network is shown the representation, or the views of it that bring out most of the face.

    The views are chosen before training, on held-out public faces (:meth:`~attacks.parts.inputs.Inputs.choose`), and
    the network is built for them. A subclass says in :meth:`_build_network` how, and in :attr:`_may_choose` where it
    understands representations as they are.

    Attributes:
        inputs: the views.
    """

    options: ViewingOptions
    inputs: Inputs

    @abstractmethod
    def _build_network(self, channels: int) -> None:
        """Make :attr:`network` for maps of so many channels."""

    @property
    def _may_choose(self) -> bool:
        """Whether views may be shown in place of the representation."""
        return True

    def _pinned(self, count: int) -> Tensor | None:
        """States of ``count`` faces on which views are tried, int64 (count, D); None for such as are drawn."""
        return None

    def _build_range(self) -> None:
        super()._build_range()
        self.inputs = Inputs(self.mechanism.mixed_in)

    def _view(self, representations: Tensor) -> Tensor:
        views: Tensor = self.inputs(representations)
        return views

    def _rebuild(self) -> None:
        """Make network and range anew for the views, with the first weights that such a network would have had."""
        if not len(self.inputs.views):
            return
        device, blank = self.device, torch.zeros(1, *self.mechanism.representation_shape, device=self.device)
        channels = self.inputs(blank).shape[1]
        with seeded(self.seed, "weights"):
            self._build_network(channels)
        for name, value in (("low", torch.inf), ("high", -torch.inf)):
            setattr(self, name, torch.full((channels,), value, device=device))
        self.network.to(device)

    @torch.no_grad()
    def _choose_input(self, trainer: Trainer, exposure: Exposure) -> dict[str, Any]:
        text, losses = self.options.input, {}
        if not self._may_choose:
            return {"input": self.inputs.name}
        values = math.prod(self.mechanism.representation_shape)

        def sent(index: Tensor, name: str, *, pinned: bool = True) -> Tensor:
            parts = enumerate(index.split(_CHUNK))
            states = self._pinned if pinned else lambda count: None
            protected = [exposure.protect(trainer.floats(i), name, n, state=states(len(i))) for n, i in parts]
            return torch.cat([part.representation for part in protected])

        def example(index: Tensor, most: int, name: str) -> Example:
            index = index[: max(most // 8, min(most, _INPUT_VALUES // values))]
            return Example(trainer.floats(index), sent(index, name), lambda: sent(index, f"{name} again"))

        index = trainer.sample(_INPUT_FACES, "input")
        known = example(index, _INPUT_FACES, "input")
        if text == AUTO:
            unseen = example(trainer.validation(), _UNSEEN_FACES, "input of others")
            losses = self.inputs.choose(known, unseen, self.seed)
        else:
            self.inputs.pin(names_of(text), known)
        of_one_state = self._pinned(1) is not None
        mixed = sent(index[: len(known.sent)], "input of all states", pinned=False) if of_one_state else known.sent
        self.inputs.limit(mixed)
        self._rebuild()
        return {"input": self.inputs.name, "input_losses": losses}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module; the network is made for the stored views first."""
        if self.inputs.restore(state_dict, "inputs."):
            self._rebuild()
        return super().load_state_dict(state_dict, strict, assign)


def no_pictures(defense: Defense) -> str | None:
    """Why a network of convolutions cannot work on what ``defense`` sends: no maps of several pixels a side."""
    channels, height, width = defense.representation_shape
    if min(height, width) < 2:
        return f"{defense.name} sends ({channels}, {height}, {width}): no pictures that a U-Net could undo"
    return None
