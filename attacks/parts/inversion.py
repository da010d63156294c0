"""What the attacks that train a network to undo a defence have in common: the training and its checks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning_fabric import Fabric
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, FitReport, RecoveryAttack
from attacks.parts.exposure import Exposure, chunks, flip_some, split_identities
from attacks.parts.training import Descent, EpochBatches, Plateau, Player, SeenStates, WarmHoldDecay
from attacks.parts.unet_network import NetworkOptions
from bench.images import ssim, to_float
from bench.randomness import derived
from defenses.base import Protected

#: Held-out faces that give the loss curve, and faces whose mean is the floor it is compared with.
_VALIDATION_FACES = 256
_MEAN_FACES = 2048
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: Before so many steps at the full learning rate, a flat loss is no plateau: training has hardly begun.
_LEAST_STEPS = 200
#: Tolerances of the input-range check.
_RANGE_MARGIN = 0.5
_OUTSIDE_SHARE = 1e-3
_LEAST_SPREAD = 0.01
_SPREAD_FACES = 8

#: Of a preset for two cores, where a few hundred or thousand steps are all one can afford: small batches and a higher
#: rate use them best, the first level at half resolution halves the cost of each, and SSIM in the loss recovers more by
#: every measure, L1 included.
TWO_CORES: Mapping[str, Any] = {"stem_stride": 2, "batch_size": 16, "learning_rate": 2e-3, "loss": "l1+ssim"}


class InversionOptions(NetworkOptions):
    """Options of a trained inversion, beside those of the network.

    Attributes:
        loss: ``l1`` as published, or ``l1+ssim``: L1 + ``ssim_weight`` (1 - SSIM).
        ssim_weight: see ``loss``.
        learning_rate: of Adam, held after a linear warm-up, then decayed linearly to zero.
        batch_size: faces per step (fewer where there are fewer public faces).
        images: faces to train on in all, repeats counted.
        passes: least number of times that each public face is shown; where ``images`` are fewer, there are more, so
            that an attacker with more faces also trains longer.
        steps: gradient steps in all, instead of what ``images`` and ``passes`` say; None: as they say.
        warmup: share of the training over which the learning rate rises.
        decay: share of the training, at the end, over which it falls to zero.
        early_stop: start the decay as soon as the validation loss has plateaued.
        flip: mirror half of the faces before they are protected.
        validation: share of the public identities held out for the loss curve.
        plateau: relative gain of the last doubling below which the training counts as saturated.
    """

    loss: Literal["l1", "l1+ssim"] = "l1"
    ssim_weight: float = Field(default=0.2, gt=0, le=10, allow_inf_nan=False)
    learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(default=64, ge=2, le=65536)
    images: int = Field(default=1_000_000, ge=1)
    passes: int = Field(default=0, ge=0, le=100_000)
    steps: int | None = Field(default=None, ge=1)
    warmup: float = Field(default=0.03, ge=0, le=0.5)
    decay: float = Field(default=0.3, ge=0, le=0.9)
    early_stop: bool = False
    flip: bool = True
    validation: float = Field(default=0.1, gt=0, lt=1)
    plateau: float = Field(default=0.03, gt=0, lt=1)

    @model_validator(mode="after")
    def _room_for_a_plateau(self) -> InversionOptions:
        if self.warmup + self.decay > 0.95:
            raise ValueError("warmup + decay must leave at least 5 % of the images at the full learning rate")
        return self


#: The faces of a step, what the network is shown of them, and their states.
_Example = tuple[Tensor, tuple[Tensor | None, ...], Tensor | None]


class InversionAttack(RecoveryAttack):
    """Trains :attr:`network` to minimise L1(prediction, X) over public faces X, protected afresh in each step.

    A subclass builds the network and the buffers in :meth:`build` (with :meth:`_build_range`), and says what the
    network is shown.

    Attributes:
        network: what is trained.
        low, high: float32 (C,) buffers, the range of each channel seen in training.
    """

    #: Steps whose examples are made at once, where that is cheaper than one by one.
    lookahead: ClassVar[int] = 1

    options: InversionOptions
    network: nn.Module
    low: Tensor
    high: Tensor

    # -- what a subclass says -----------------------------------------------------------------------

    @abstractmethod
    def _exposure(self, adversary: Adversary, seed: int) -> Exposure:
        """How public faces are protected in training."""

    def _protect(self, target: Tensor, exposure: Exposure, step: int) -> Protected:
        """The faces of a step as the defence sends them."""
        return exposure.protect(target, "protect", step)

    @abstractmethod
    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the network takes, each (N, ...), for representations (N, C, h, w) of states (N, D)."""

    def _predict(self, network: nn.Module, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """Faces (N, 3, H, W), by ``network`` or its average, from what :meth:`_inputs` made."""
        faces: Tensor = network(*inputs)
        return faces

    def _learn_of_defence(self, adversary: Adversary, training: Tensor, seed: int) -> dict[str, Any]:
        """What has to be known before training, from the public faces at ``training``; returns details of it."""
        return {}

    def _measure(self, faces: Tensor, training: Tensor, exposure: Exposure, seed: int) -> None:
        """Set the network's input statistics from public training faces."""

    def _build_range(self, channels: int) -> None:
        self.register_buffer("low", torch.full((channels,), torch.inf))
        self.register_buffer("high", torch.full((channels,), -torch.inf))

    # -- training -----------------------------------------------------------------------------------

    def fit(self, adversary: Adversary) -> FitReport:
        """Train on public faces; some identities are held out for the loss curve.

        Raises:
            ValueError: fewer than two identities, or a checkpoint of another fit.
            FloatingPointError: the loss is not finite.
        """
        options, fabric = self.options, adversary.fabric
        seed, device = self.seed, fabric.device
        training, held_out = split_identities(adversary.identities, options.validation, derived(seed, "identities"))
        training_details = self._learn_of_defence(adversary, training, seed)
        exposure = self._exposure(adversary, seed)
        # A short training is not worth a long validation.
        images = max(options.images, options.passes * len(training))
        most = min(_VALIDATION_FACES, max(_CHUNK, images // 50))
        validation = pick(adversary.faces, held_out, most, derived(seed, "validation")).to(device)
        self._measure(adversary.faces, training, exposure, seed)
        mean_face = to_float(adversary.faces[training[:_MEAN_FACES].to(adversary.faces.device)]).mean(dim=0)
        floor = float((to_float(validation) - mean_face.to(device)).abs().mean())

        faces = adversary.faces.to(device)
        batches = EpochBatches(training, options.batch_size, seed)
        schedule = WarmHoldDecay(options.steps or math.ceil(images / batches.size), options.warmup, options.decay)
        seen, countable = SeenStates(), exposure.countable
        model = fabric.setup_module(self.network)
        ahead: list[_Example] = []

        def loss(step: int) -> Tensor:
            if not ahead:
                steps = range(step, min(step + self.lookahead, schedule.steps))
                ahead.extend(self._examples(faces, batches, steps, exposure, seed))
            target, inputs, state = ahead.pop(0)
            if countable:
                seen.add(state)
            return self._loss(self._predict(model, inputs), target)

        # Fused: one kernel instead of a loop over parameters, on CPU and GPU alike.
        optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.learning_rate, fused=device.type in ("cpu", "cuda")
        )
        outcome = Descent(
            what=self.name,
            players=[Player(self.network, optimizer, loss)],
            batch_size=batches.size,
            learning_rate=options.learning_rate,
            schedule=schedule,
            rule=Plateau(relative=options.plateau),
            validate=lambda network: self._validate(network, validation, exposure, fabric),
            floor=floor,
            least_steps=_LEAST_STEPS,
            early_stop=options.early_stop,
            fabric=fabric,
            report=adversary.report,
            folder=adversary.checkpoint,
            stored={"attack": self},
            fit={
                "options": options.model_dump(mode="json"),
                "seed": seed,
                "faces": list(faces.shape),
                "knowledge": str(adversary.knowledge),
            },
            seen=seen,
        ).run()
        return FitReport(
            saturated=outcome.saturated,
            states_seen=seen.states,
            curve=outcome.curve,
            details={
                **outcome.details(),
                "epochs": outcome.steps * batches.size / len(training),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "training_faces": len(training),
                "validation_faces": len(validation),
                "stopped_early": outcome.steps < schedule.steps,
                "input_range": [float(self.low.min()), float(self.high.max())],
                **training_details,
            },
        )

    @torch.no_grad()
    def _examples(
        self, faces: Tensor, batches: EpochBatches, steps: range, exposure: Exposure, seed: int
    ) -> list[_Example]:
        """The faces of these steps, what the network is shown of each, and its state."""
        targets, protected = [], []
        for step in steps:
            target = to_float(faces[batches(step).to(faces.device)])
            if self.options.flip:
                target = flip_some(target, derived(seed, "faces", step))
            targets.append(target)
            protected.append(self._protect(target, exposure, step))
            self._widen_range(protected[-1].representation)
        states = [one.state for one in protected if one.state is not None]
        inputs = self._inputs(
            torch.cat([one.representation for one in protected]), torch.cat(states) if states else None
        )
        parts = [[None] * len(steps) if one is None else one.split(batches.size) for one in inputs]
        shown: list[tuple[Tensor | None, ...]] = list(zip(*parts, strict=True))
        return list(zip(targets, shown, [one.state for one in protected], strict=True))

    def _loss(self, recovered: Tensor, faces: Tensor) -> Tensor:
        loss = functional.l1_loss(recovered, faces)
        if self.options.loss == "l1+ssim":
            loss = loss + self.options.ssim_weight * (1 - ssim(recovered, faces)).mean()
        return loss

    @torch.no_grad()
    def _validate(self, network: nn.Module, faces: Tensor, exposure: Exposure, fabric: Fabric) -> float:
        """L1 on held-out identities, the same draws every time; L1 whatever the loss, to compare with the floor."""
        total = 0.0
        for number, chunk in enumerate(chunks(faces, _CHUNK)):
            target = to_float(chunk)
            protected = exposure.protect(target, "validate", number)
            with fabric.autocast():
                recovered = self._predict(network, self._inputs(protected.representation, protected.state))
            total += float((recovered.clamp(0, 1) - target).abs().mean()) * len(chunk)
        return total / len(faces)

    # -- what it is shown ----------------------------------------------------------------------------

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
            ValueError: as above.
        """
        values = representations.detach().to(self.low.device)
        width = (self.high - self.low).clamp(min=1e-6)
        low = (self.low - _RANGE_MARGIN * width)[:, None, None]
        high = (self.high + _RANGE_MARGIN * width)[:, None, None]
        outside = float(((values < low) | (values > high)).float().mean())
        spread = float((values.amax(dim=(0, 1, 3, 4)) - values.amin(dim=(0, 1, 3, 4))).div(width).max())
        small = len(values) >= _SPREAD_FACES and spread < _LEAST_SPREAD
        if outside > _OUTSIDE_SHARE or small:
            raise ValueError(
                f"{self.name} was handed representations from {float(values.min()):.4g} to "
                f"{float(values.max()):.4g}, but trained on {float(self.low.min()):.4g} to "
                f"{float(self.high.max()):.4g}: they must come from the "
                f"defence it was trained on, un-normalised"
            )


# -- pieces -------------------------------------------------------------------------------------------


def pick(faces: Tensor, index: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` of the faces at ``index``, at random."""
    return faces[index[torch.randperm(len(index), generator=generator)[:most]].to(faces.device)]
