"""U-Net inversion: a network trained on public faces to undo the defence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, AttackOptions, Capability, Knowledge, Observation
from attacks.parts.exposure import Exposure, chunks
from attacks.parts.inversion import TWO_CORES, InversionAttack, InversionOptions, pick
from attacks.parts.states import StateReader
from attacks.parts.unet_network import UNetNetwork
from bench.images import to_float
from bench.randomness import derived
from defenses.layout import row_numbers

#: Faces whose representations give the input statistics.
_STATISTICS_FACES = 512
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: The most states that are told apart, the public faces on which that is checked, and the least share of them that has
#: to be right: on less nothing can be built.
_MOST_STATES = 256
_CHECK_FACES = 512
_RELIABLE = 0.95


class UNetOptions(InversionOptions):
    """Options of :class:`UNet`; the defaults are the published ones where there are any.

    Attributes:
        infer_state: at ``whitebox``, read each face's state off its representation and undo the layout, where a reader
            fitted on public faces proves able to; at ``blackbox``, infer the secret table from intercepted traffic
            first. Else train on the mixture of states, or of guesses.
        state_faces: public faces that the reader of states learns from.
        traffic: intercepted faces that a secret table is inferred from.
        guesses: at ``blackbox`` without an inferred table, how many guesses of the secret to train on; 0 draws fresh
            ones every step, which marginalises over what is not known; 1 is the published single guess.
        invariance: what a defence that permutes channels cannot hide: ``sorted`` shows the network the channels of
            each colour in the order of their energies, ``mean`` their mean and mean magnitude; the state is not
            inferred then. Representations are colour-major, so each third of the channels is one colour.
    """

    infer_state: bool = True
    state_faces: int = Field(default=800, ge=16)
    traffic: int = Field(default=1000, ge=1)
    guesses: int = Field(default=0, ge=0, le=4096)
    invariance: Literal["none", "sorted", "mean"] = "none"


class UNet(InversionAttack):
    """U-Net inversion under the three rungs of knowledge.

    Trained to minimise L1(g(z), X) over faces X of public identities, protected afresh in every step.
    ``oracle`` knows each state and undoes the layout (:meth:`Defense.canonical`). ``whitebox`` knows the table of
    states: where :class:`~attacks.parts.states.StateReader` can tell them apart, it does the same with the inferred
    state, else it trains on the mixture. ``blackbox`` infers the table or, where that cannot be done, guesses the
    secret. Of k > 1 interceptions the recoveries are averaged.

    Attributes:
        reader: of states, or None where they are not to be told apart.
        reads: bool () buffer, whether the reader proved reliable, and layouts are undone.
    """

    name: ClassVar[str] = "unet"
    summary: ClassVar[str] = "U-Net trained on public faces to undo the defence"
    cost: ClassVar[str] = "fit: minutes (trains a network); recover: hundreds of faces/s"
    budgets: ClassVar[Mapping[str, str]] = {"steps": "steps"}
    reference: ClassVar[str] = "PartialFace (recovery attack), ICCV 2023; U-Net, MICCAI 2015"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM})
    uses: ClassVar[frozenset[Capability]] = frozenset({Capability.TRAFFIC})
    Options: ClassVar[type[AttackOptions]] = UNetOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {**TWO_CORES, "widths": (16, 32, 64), "images": 2_000, "state_faces": 300, "traffic": 500},
        "cpu": {**TWO_CORES, "widths": (16, 32, 64, 128), "images": 16_000, "passes": 16},
        "gpu": {"loss": "l1+ssim", "images": 600_000, "early_stop": True},
        # As published: nothing added to the network, no state read off, one guess.
        "paper": {"images": 2_000_000, "early_stop": True, "bypass": 0, "infer_state": False, "guesses": 1},
    }
    options: UNetOptions

    network: UNetNetwork
    reader: StateReader | None
    reads: Tensor

    def build(self, adversary: Adversary) -> None:
        """Build the network for the adversary's defence, and the reader of states where one is used."""
        mechanism, seed = self.mechanism, self.seed
        states, shape = mechanism.states(), mechanism.representation_shape
        knows, invariant = adversary.knowledge is Knowledge.ORACLE, self.options.invariance != "none"

        self.reader, width, channels = None, None, shape[0]
        countable = states is not None and len(states) <= _MOST_STATES
        if (self.options.infer_state or knows) and countable and not invariant:
            reader = StateReader()
            reader.prepare(adversary, seed)
            inferable = not reader.infers_secret or (adversary.traffic is not None and reader.inferable)
            if reader.classifier is not None and inferable:
                self.reader, width = reader, len(reader.classifier.bias)
        self.register_buffer("reads", torch.tensor(knows))
        if invariant:
            channels = invariant_view(torch.zeros(1, *shape), self.options.invariance).shape[1]
        self._canonical = knows and self.reader is None and states is not None and not invariant
        if self._canonical:
            # One zero representation tells how wide the layout is once the state is undone.
            blank = torch.zeros(1, *shape, device=self.device)
            channels = mechanism.canonical(blank, mechanism.draw(1, derived(seed, "shape"))).shape[1]
        self.network = UNetNetwork(channels, adversary.faces.shape[-1], self.options, width=width)
        self.network = self.network.to(memory_format=torch.channels_last)
        self._build_range(shape[0])

    def _see(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network takes: the representations and, where the state is undone, their channels' places."""
        if self.options.invariance != "none":
            return invariant_view(representations, self.options.invariance), None
        if self.reader is not None:
            if self.reads:
                return representations, self.reader.places(self.reader.rows(representations, states))
            # Taken as they come: the network is built for places, and these are as good as any.
            return representations, torch.arange(representations.shape[1], device=self.reads.device).expand(
                len(representations), -1
            )
        if self._canonical:
            return self.mechanism.canonical(representations, states), None
        return representations, None

    # -- training -----------------------------------------------------------------------------------

    def _exposure(self, adversary: Adversary, seed: int) -> Exposure:
        inferred = self.reader is not None and self.reader.infers_secret and bool(self.reads)
        mechanism = self.reader.mechanism if self.reader is not None and inferred else None
        return Exposure(adversary, seed, guesses=self.options.guesses, mechanism=mechanism)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        return self._see(representations, states)

    def _learn_of_defence(self, adversary: Adversary, training: Tensor, seed: int) -> dict[str, Any]:
        """Fit the reader of states, and see whether it is right on other public faces."""
        if self.reader is None:
            return {"states_inferred": False}
        details = self.reader.fit(adversary, seed, faces=self.options.state_faces, traffic=self.options.traffic)
        if adversary.knowledge is not Knowledge.ORACLE:
            accuracy = self._reading_accuracy(self.reader, adversary.faces, seed)
            self.reads.fill_(accuracy >= _RELIABLE)
            details["state_inference_accuracy"] = accuracy
        return details | {"states_inferred": bool(self.reads)}

    def _reading_accuracy(self, reader: StateReader, faces: Tensor, seed: int) -> float:
        """Share of public faces whose state is read right off a fresh draw of the mechanism (as far as it is known)."""
        mechanism, generator = reader.mechanism, derived(seed, "states")
        listed = mechanism.states()
        index = torch.randint(len(faces), (_CHECK_FACES,), generator=generator)
        right = []
        for chunk in chunks(faces[index.to(faces.device)], _CHUNK):
            sent = mechanism.protect(to_float(chunk.to(self.reads.device)), generator)
            if sent.state is None or listed is None:
                raise ValueError(f"{mechanism.name} lists states but says of no face which was drawn")
            truth = row_numbers(sent.state.cpu(), listed.cpu())
            right.append(reader.rows(sent.representation, None).cpu() == truth)
        return float(torch.cat(right).float().mean())

    def _measure(self, faces: Tensor, training: Tensor, exposure: Exposure, seed: int) -> None:
        """Set the input statistics and the mean face from public training faces."""
        device = self.network.mean.device
        sample = pick(faces, training, _STATISTICS_FACES, derived(seed, "statistics"))
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

    # -- recovering -----------------------------------------------------------------------------------

    def run(self, observation: Observation) -> Tensor:
        """Faces (N, 3, H, W), not clipped; the average over each face's k interceptions.

        Raises:
            ValueError: representations outside the range that training saw (the attack would be driven with input it
                was never meant for), or no states at ``oracle``.
        """
        representations = observation.representations
        n, k = representations.shape[:2]
        knows = self.adversary.knowledge is Knowledge.ORACLE
        if knows and observation.states is None and self.mechanism.draw(1, torch.Generator()) is not None:
            raise ValueError("unet at oracle needs the states of the intercepted faces")
        self._check_range(representations)
        states = None if observation.states is None else observation.states.flatten(0, 1)
        device = self.network.mean.device
        recovered = []
        for start in range(0, n * k, _CHUNK):
            part = slice(start, start + _CHUNK)
            seen = self._see(representations.flatten(0, 1)[part].to(device), None if states is None else states[part])
            recovered.append(self.network(*seen))
        faces = torch.cat(recovered)
        return faces.reshape(n, k, *faces.shape[1:]).mean(dim=1)

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """The canonical place of each channel, int64 (N, k, C), where states are inferred."""
        if self.reader is None or not self.reads or self.adversary.knowledge is Knowledge.ORACLE:
            return None
        representations = observation.representations
        parts = []
        for chunk in chunks(representations.flatten(0, 1), _CHUNK):
            places = self.reader.places(self.reader.rows(chunk.to(self.reads.device), None))
            assert places is not None  # a reader with a classifier has a table
            parts.append(places)
        return torch.cat(parts).view(*representations.shape[:2], -1)


def invariant_view(representations: Tensor, kind: str) -> Tensor:
    """What stays the same when the channels of a colour are permuted.

    Args:
        representations: (N, C, h, w); C is cut into three colours where 3 divides it, else taken as one.
        kind: ``sorted``: (N, C, h, w), the maps of each colour by falling energy; ``mean``: (N, 2 colours, h, w),
            the mean and the mean magnitude of each colour's maps.
    """
    colours = 3 if representations.shape[1] % 3 == 0 else 1
    maps = representations.unflatten(1, (colours, -1))
    if kind == "sorted":
        order = maps.square().mean(dim=(3, 4)).argsort(dim=2, descending=True, stable=True)
        ranked: Tensor = maps.gather(2, order[..., None, None].expand_as(maps)).flatten(1, 2)
        return ranked
    view: Tensor = torch.cat((maps.mean(dim=2), maps.abs().mean(dim=2)), dim=1)
    return view
