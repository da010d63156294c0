"""Unrolled inversion: the linear estimate, then a trained network for what linear algebra cannot know, made consistent.

A proximal step learned end to end, in the manner of Adler and Oktem (*Learned Primal-Dual Reconstruction*, IEEE TMI
37(6), 2018) and of null-space networks (Schwab, Antholzer and Haltmeier, *Deep Null Space Learning for Inverse
Problems*, Inverse Problems 35(2), 2019): the network proposes a change, and only the part of it that the observation
does not contradict is applied.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Observation
from attacks.linear import EstimateOptions, Linear, LinearOptions
from attacks.parts.encoder import channel_statistics
from attacks.parts.exposure import Exposure, split_identities
from attacks.parts.inversion import TWO_CORES, InversionAttack, InversionOptions
from attacks.parts.training import Trainer
from attacks.parts.unet_network import UNetNetwork
from bench.progress import no_report
from bench.randomness import derived
from defenses.base import Defense

#: Public faces per kind of state whose linear estimates show how far these are off, and where.
_ERROR_FACES = 64
_STATISTICS_FACES = 256
_CHUNK = 32
#: Values of the representations whose linear estimates are made at once, at most; each takes eight bytes a few times.
_VALUES_AHEAD = 2**26
#: Details of the linear attack that are about the defence.
_OF_DEFENSE = frozenset({"linearity", "state_accuracy", "states_found", "states_unseen", "gain", "offset_directions"})


class UnrolledOptions(InversionOptions, EstimateOptions):
    """Options of :class:`Unrolled`: of the training, and of the linear estimate."""

    consistent: bool = Field(
        True, description="Apply only that part of the network's change which the observation does not contradict."
    )


class Unrolled(InversionAttack):
    """A U-Net fed with the linear estimate, how far it may be off, and what is not linear, trained on public faces.

    The estimate and the knowledge of states are those of :class:`~attacks.linear.Linear` on the same rung. Of k > 1
    interceptions each is treated by itself or, where they say the same and that is better on held-out public faces,
    they are estimated from together; what comes out is then made consistent with all of them. The
    network is trained without that last step: what it has to learn, the error of the linear estimate, is invisible
    to the defence anyhow.

    Attributes:
        linear: the linear attack.
        spread: float32 (kinds, 3, H, W) buffer, the root mean square error of the linear estimate of public faces, for
            each kind of state (states that say the same are of one kind).
    """

    name = "unrolled"
    summary = "linear estimate, refined by a U-Net in what the observation leaves open"
    cost = "fit: minutes (trains a network); recover: 10+ faces/s on two cores"
    reference = "Schwab et al., Deep Null Space Learning for Inverse Problems, 2019"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC})
    uses = frozenset({Capability.PROTECTION})
    opens = frozenset({"affine", "mixture", "permutation"})
    Options = UnrolledOptions
    #: Linear estimates of many faces cost little more than those of a few in the same state.
    lookahead = 32
    presets: ClassVar = {
        "quick": {**TWO_CORES, "widths": (16, 32, 64), "images": 1_000, **Linear.presets["quick"]},
        "cpu": {**TWO_CORES, "widths": (16, 32, 64, 128), "images": 16_000},
        "gpu": {"loss": "l1+ssim", "images": 600_000, "early_stop": True, **Linear.presets["gpu"]},
    }
    options: UnrolledOptions

    network: UNetNetwork
    spread: Tensor

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__(options)
        shared = self.options.model_dump(include=set(EstimateOptions.model_fields))
        self.linear = Linear(LinearOptions(**shared))

    def inapplicable(self, defense: Defense) -> str | None:
        """It starts from what the linear attack makes of it."""
        return self.linear.inapplicable(defense)

    def build(self, adversary: Adversary) -> None:
        """Build the linear attack and the network."""
        draws = derived(self.seed, "identities")
        training, _ = split_identities(adversary.identities, self.options.validation, draws)
        self.linear.prepare(_only(adversary, training))
        size = adversary.faces.shape[-1]
        self.register_buffer("spread", torch.ones(len(self.linear.maps.operators), 3, size, size))
        values = self.options.batch_size * math.prod(self.mechanism.representation_shape)
        self.lookahead = max(1, min(type(self).lookahead, _VALUES_AHEAD // values))
        channels, linear = self.linear.reader.mechanism.channels, self.linear.maps.channels
        kept = torch.ones(channels, dtype=torch.bool)
        kept[slice(None) if linear is None else linear.cpu()] = False
        self._rest = kept.nonzero().flatten()
        network = UNetNetwork(6 + len(self._rest), size, self.options)
        network.mean_face.zero_()  # it proposes a change, not a face
        self.network = network.to(memory_format=torch.channels_last)
        self._build_range()

    def _exposure(self) -> Exposure:
        return Exposure(self.adversary, self.seed, mechanism=self.linear.reader.mechanism)

    def _learn_of_defence(self, trainer: Trainer) -> dict[str, Any]:
        """Fit the linear attack on the training faces, and measure how far its estimates are off on the same."""
        report = self.linear.learn(_only(self.adversary, trainer.training))
        sample = trainer.sample(_ERROR_FACES, "spread faces")
        kinds = self.linear.kinds()
        for row, kind in enumerate(kinds):
            if kind < row:  # another state says the same
                self.spread[row] = self.spread[kind]
                continue
            squares = torch.zeros_like(self.spread[0])
            for number, index in enumerate(sample.split(_CHUNK)):
                target = trainer.floats(index)
                estimate = self.linear.rehearse(target, row, derived(self.seed, "spread", kind, number))
                squares += (estimate.to(target) - target).square().sum(dim=0)
            self.spread[row] = (squares / len(sample)).sqrt()
        return {name if name in _OF_DEFENSE else f"linear_{name}": value for name, value in report.details.items()}

    def fit(self, adversary: Adversary) -> FitReport:
        """Train as every inversion; what it reads of states is what the linear attack does."""
        report = super().fit(adversary)
        return replace(report, states_read=report.details.get("state_accuracy"))

    def _measure(self, trainer: Trainer, exposure: Exposure) -> None:
        shown: list[tuple[Tensor, Tensor | None]] = []
        for number, index in enumerate(trainer.sample(_STATISTICS_FACES, "statistics").split(_CHUNK)):
            protected = exposure.protect(trainer.floats(index), "statistics", number)
            view = self._view(protected.representation)
            self._widen_range(view)
            shown.append((self._inputs(view, protected.state)[0], None))
        mean, std = channel_statistics(shown, len(self.network.mean))
        self.network.mean.copy_(mean)
        self.network.std.copy_(std)

    def _view(self, representations: Tensor) -> Tensor:
        """Without the noise that a batch shares."""
        return self.linear.without_shared(representations[:, None])[:, 0]

    def _views_of(self, representations: Tensor) -> Tensor:
        return self.linear.without_shared(representations).flatten(0, 1)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor]:
        rows = self.linear.rows_of(states, representations)
        return (self._show(representations[:, None], rows[:, None]),)

    def _show(self, representations: Tensor, rows: Tensor) -> Tensor:
        """The linear estimate from all k interceptions, its spread from one, and the mean of what is not linear.

        float32 (N, 6 + R, H, W) of (N, k, C, h, w), of which R channels are not linear, and rows int64 (N, k).
        """
        with torch.no_grad():
            estimate = self.linear.estimate(representations, rows).to(self.spread)
        shown = [estimate, self.spread[rows[:, 0].to(self.spread.device)]]
        if len(self._rest):
            rest = representations[:, :, self._rest.to(representations.device)].mean(dim=1).to(self.spread)
            shown.append(functional.interpolate(rest, tuple(estimate.shape[2:]), mode="bilinear", align_corners=False))
        return torch.cat(shown, dim=1)

    def _predict(self, network: nn.Module, inputs: tuple[Tensor | None, ...]) -> Tensor:
        shown = inputs[0]
        assert shown is not None
        faces: Tensor = shown[:, :3] + network(shown)
        return faces

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped."""
        self._check_range(observation)
        sent = self.linear.without_shared(observation.representations)
        return self._of_rows(sent, self.linear.rows(replace(observation, representations=sent)).cpu())

    def _recover_several(self, representations: Tensor, states: Tensor | None) -> Tensor:
        sent = self.linear.without_shared(representations)
        drawn = None if states is None else states.flatten(0, 1)
        return self._of_rows(sent, self.linear.rows_of(drawn, sent.flatten(0, 1)).view(sent.shape[:2]).cpu())

    def _choose_average(self, trainer: Trainer, exposure: Exposure) -> dict[str, Any]:
        # Where states say different things, each set of them would have to be factored.
        return super()._choose_average(trainer, exposure) if not any(self.linear.kinds()) else {}

    def _of_rows(self, representations: Tensor, rows: Tensor) -> Tensor:
        """Faces from interceptions (N, k, C, h, w) of states ``rows``, int64 (N, k)."""
        faces = []
        for sent, some in zip(representations.split(_CHUNK), rows.split(_CHUNK), strict=True):
            sent = sent.to(self.device)
            if self.averages:
                mean = self._predict(self.network, (self._show(sent, some),))
            else:
                single = self._show(sent.flatten(0, 1)[:, None], some.flatten()[:, None])
                mean = self._predict(self.network, (single,)).unflatten(0, some.shape).mean(dim=1)
            faces.append(self.linear.correct(mean, sent, some).to(mean) if self.options.consistent else mean)
        return torch.cat(faces)

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """As the linear attack infers it."""
        return self.linear.infer_layout(observation)

    def infer_states(self, observation: Observation) -> Tensor | None:
        """As the linear attack infers them."""
        return self.linear.infer_states(observation)


def _only(adversary: Adversary, training: Tensor) -> Adversary:
    """The adversary with the public faces at ``training`` alone, as the linear attack gets them."""
    faces, identities = adversary.faces[training.to(adversary.faces.device)], adversary.identities[training]
    return replace(adversary, faces=faces, identities=identities, checkpoint=None, report=no_report)
