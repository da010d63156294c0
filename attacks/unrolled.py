"""Unrolled inversion: the linear estimate, then a trained network for what linear algebra cannot know, made consistent.

A proximal step learned end to end, in the manner of Adler and Oktem (*Learned Primal-Dual Reconstruction*, IEEE TMI
37(6), 2018) and of null-space networks (Schwab, Antholzer and Haltmeier, *Deep Null Space Learning for Inverse
Problems*, Inverse Problems 35(2), 2019): the network proposes a change, and only the part of it that the observation
does not contradict is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.base import Adversary, AttackOptions, Capability, FitReport, Observation
from attacks.linear import Linear, LinearOptions
from attacks.parts.exposure import Exposure, chunks, split_identities
from attacks.parts.inversion import TWO_CORES, InversionAttack, InversionOptions, pick
from attacks.parts.unet_network import UNetNetwork
from bench.images import to_float
from bench.randomness import derived
from defenses.base import Defense

#: Public faces per kind of state whose linear estimates show how far these are off, and where.
_ERROR_FACES = 64
_STATISTICS_FACES = 256
_CHUNK = 32


class UnrolledOptions(InversionOptions):
    """Options of :class:`Unrolled`.

    Attributes:
        consistent: apply only that part of the network's change which the observation does not contradict.
        rank, prior_faces, place_faces, traffic, memory: of the linear estimate, as in
            :class:`~attacks.linear.LinearOptions`.
    """

    consistent: bool = True
    rank: int = Field(default=400, ge=1, le=20_000)
    prior_faces: int = Field(default=4000, ge=2)
    place_faces: int = Field(default=800, ge=16)
    traffic: int = Field(default=1000, ge=1)
    memory: int = Field(default=2048, ge=64)


class Unrolled(InversionAttack):
    """A U-Net fed with the linear estimate and with how far it may be off, trained on public faces.

    The estimate and the knowledge of states are those of :class:`~attacks.linear.Linear` on the same rung. Of k > 1
    interceptions each is treated by itself; their average is then made consistent with all of them together. The
    network is trained without that last step: what it has to learn, the error of the linear estimate, is invisible
    to the defence anyhow.

    Attributes:
        linear: the linear attack.
        spread: float32 (kinds, 3, H, W) buffer, the root mean square error of the linear estimate of public faces, for
            each kind of state (states that say the same are of one kind).
    """

    name: ClassVar[str] = "unrolled"
    summary: ClassVar[str] = "linear estimate, refined by a U-Net in what the observation leaves open"
    cost: ClassVar[str] = "fit: minutes (trains a network); recover: 10+ faces/s on two cores"
    reference: ClassVar[str] = "Schwab et al., Deep Null Space Learning for Inverse Problems, 2019"
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.PUBLIC_FACES, Capability.MECHANISM, Capability.TRAFFIC}
    )
    Options: ClassVar[type[AttackOptions]] = UnrolledOptions
    #: Linear estimates of many faces cost little more than those of a few in the same state.
    lookahead: ClassVar[int] = 32
    budgets: ClassVar[Mapping[str, str]] = {"steps": "steps"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {
            **TWO_CORES,
            "widths": (16, 32, 64),
            "images": 1_000,
            "rank": 100,
            "place_faces": 300,
            "traffic": 500,
        },
        "cpu": {**TWO_CORES, "widths": (16, 32, 64, 128), "images": 16_000},
        "gpu": {
            "loss": "l1+ssim",
            "images": 600_000,
            "early_stop": True,
            "rank": 1000,
            "prior_faces": 20_000,
        },
    }
    options: UnrolledOptions

    spread: Tensor

    def __init__(self, options: AttackOptions | None = None) -> None:
        super().__init__(options)
        chosen = self.options
        self.linear = Linear(
            LinearOptions(
                rank=chosen.rank,
                prior_faces=chosen.prior_faces,
                place_faces=chosen.place_faces,
                traffic=chosen.traffic,
                memory=chosen.memory,
            )
        )

    # -- building -----------------------------------------------------------------------------------

    def inapplicable(self, defense: Defense) -> str | None:
        """It starts from what the linear attack makes of it."""
        return self.linear.inapplicable(defense)

    def build(self, adversary: Adversary) -> None:
        """Build the linear attack and the network.

        Raises:
            ValueError: as :meth:`Linear.build`.
        """
        seed = self.seed
        training, _ = split_identities(adversary.identities, self.options.validation, derived(seed, "identities"))
        self.linear.prepare(_only(adversary, training))
        mechanism = self.linear.reader.mechanism
        states = mechanism.states()
        size = adversary.faces.shape[-1]
        self.register_buffer("spread", torch.ones(1 if states is None else len(states), 3, size, size))
        network = UNetNetwork(6, size, self.options)
        network.mean_face.zero_()  # it proposes a change, not a face
        self.network = network.to(memory_format=torch.channels_last)
        self._build_range(mechanism.channels)

    def _exposure(self, adversary: Adversary, seed: int) -> Exposure:
        return Exposure(adversary, seed, mechanism=self.linear.reader.mechanism)

    # -- training -----------------------------------------------------------------------------------

    def _learn_of_defence(self, adversary: Adversary, training: Tensor, seed: int) -> dict[str, Any]:
        """Fit the linear attack on the training faces, and measure how far its estimates are off on the same."""
        report: FitReport = self.linear.learn(_only(adversary, training))
        rows = range(len(self.linear.kinds()))
        faces = pick(adversary.faces, training, _ERROR_FACES, derived(seed, "spread faces")).to(self.spread.device)
        mechanism = self.linear.reader.mechanism
        listed = mechanism.states()
        measured: dict[int, Tensor] = {}
        for row in rows:
            kind = self.linear.kinds()[row]
            if kind not in measured:
                squares = torch.zeros_like(self.spread[0])
                for number, chunk in enumerate(chunks(faces, _CHUNK)):
                    target = to_float(chunk)
                    state = None if listed is None else listed[row].expand(len(target), -1).cpu()
                    sent = mechanism.protect(target, derived(seed, "spread", kind, number), state=state)
                    estimate = self.linear.estimate(sent.representation[:, None], torch.full((len(target), 1), row))
                    squares += (estimate.to(target) - target).square().sum(dim=0)
                measured[kind] = (squares / len(faces)).sqrt()
            self.spread[row] = measured[kind]
        return {f"linear_{name}": value for name, value in report.details.items()}

    def _measure(self, faces: Tensor, training: Tensor, exposure: Exposure, seed: int) -> None:
        sample = pick(faces, training, _STATISTICS_FACES, derived(seed, "statistics"))
        shown = []
        for number, chunk in enumerate(chunks(sample, _CHUNK)):
            protected = exposure.protect(to_float(chunk.to(self.spread.device)), "statistics", number)
            self._widen_range(protected.representation)
            rows = self._rows_in_training(protected.state, len(chunk))
            shown.append(self._show(self._estimate(protected.representation, rows), rows).cpu())
        inputs = torch.cat(shown)
        assert isinstance(self.network, UNetNetwork)
        self.network.mean.copy_(inputs.mean(dim=(0, 2, 3)))
        self.network.std.copy_(inputs.std(dim=(0, 2, 3)).clamp(min=1e-6))

    def _rows_in_training(self, states: Tensor | None, count: int) -> Tensor:
        return self.linear.rows_of(states, count)

    def _estimate(self, representations: Tensor, rows: Tensor) -> Tensor:
        """Linear estimates from one interception each, float32 (N, 3, H, W)."""
        with torch.no_grad():
            return self.linear.estimate(representations[:, None], rows[:, None]).to(self.spread)

    def _show(self, estimate: Tensor, rows: Tensor) -> Tensor:
        """What the network sees: the estimate and its spread, (N, 6, H, W)."""
        return torch.cat((estimate, self.spread[rows.to(self.spread.device)]), dim=1)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        rows = self._rows_in_training(states, len(representations))
        return (self._show(self._estimate(representations, rows), rows),)

    def _predict(self, network: nn.Module, inputs: tuple[Tensor | None, ...]) -> Tensor:
        shown = inputs[0]
        assert shown is not None
        faces: Tensor = shown[:, :3] + network(shown)
        return faces

    # -- recovering -----------------------------------------------------------------------------------

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped.

        Raises:
            ValueError: representations outside the range of training.
        """
        representations = observation.representations
        self._check_range(representations)
        n, k = representations.shape[:2]
        states = None if observation.states is None else observation.states.flatten(0, 1)
        rows = self.linear.reader.rows(representations.flatten(0, 1), states).view(n, k).cpu()
        parts = []
        for start in range(0, n, _CHUNK):
            sent, own = representations[start : start + _CHUNK].to(self.spread.device), rows[start : start + _CHUNK]
            estimate = self._estimate(sent.flatten(0, 1), own.flatten())
            single = self._predict(self.network, (self._show(estimate, own.flatten()),))
            faces = single.unflatten(0, own.shape).mean(dim=1)
            parts.append(self.linear.correct(faces, sent, own).to(faces) if self.options.consistent else faces)
        return torch.cat(parts)

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """As the linear attack infers them."""
        return self.linear.infer_layout(observation)


def _only(adversary: Adversary, training: Tensor) -> Adversary:
    """The adversary with the public faces at ``training`` alone, as the linear attack gets them."""
    return Adversary(
        faces=adversary.faces[training.to(adversary.faces.device)],
        identities=adversary.identities[training],
        knowledge=adversary.knowledge,
        mechanism=adversary.mechanism,
        generator=adversary.generator,
        fabric=adversary.fabric,
        traffic=adversary.traffic,
    )
