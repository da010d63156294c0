"""U-Net inversion: a network trained on public faces to undo the defence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, Capability, Knowledge, Observation
from attacks.parts.encoder import channel_statistics
from attacks.parts.exposure import Exposure
from attacks.parts.inputs import AUTO, RAW
from attacks.parts.inversion import TWO_CORES, ViewingAttack, ViewingOptions, no_pictures
from attacks.parts.states import ReaderOptions, StateReader
from attacks.parts.training import Trainer
from attacks.parts.unet_network import UNetNetwork
from bench.randomness import derived
from defenses.base import Defense
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


class UNetOptions(ViewingOptions, ReaderOptions):
    """Options of :class:`UNet`; the defaults are the published ones where there are any."""

    infer_state: bool = Field(
        True,
        description="At whitebox, read each face's state off its representation and undo the layout, where a reader "
        "fitted on public faces proves able to; at blackbox, infer the secret table from intercepted traffic first. "
        "Else train on the mixture of states, or of guesses.",
    )
    guesses: int = Field(
        0,
        ge=0,
        le=4096,
        description="At blackbox without an inferred table, how many guesses of the secret to train on; 0 draws fresh "
        "ones every step, which marginalises over what is not known; 1 is the published single guess.",
    )
    client: bool = Field(
        True,
        description="At blackbox without an inferred table, and with guesses=0, train on what the client sends of "
        "public faces, the true secret at work, instead of on guesses.",
    )


class UNet(ViewingAttack):
    """U-Net inversion under the three rungs of knowledge.

    Trained to minimise L1(g(z), X) over faces X of public identities, protected afresh in every step.
    ``oracle`` knows each state and undoes the layout (:meth:`Defense.canonical`). ``whitebox`` knows the table of
    states: where :class:`~attacks.parts.states.StateReader` can tell them apart, it does the same with the inferred
    state, else it trains on the mixture. ``blackbox`` infers the table or, where that cannot be done, trains on what
    the client sends, or guesses the secret. Of k > 1 interceptions the recoveries are averaged or, where that is better
    on held-out public faces, what was intercepted is.

    Attributes:
        reader: of states, or None where they are not to be told apart.
        reads: bool () buffer, whether the reader proved reliable, and layouts are undone.
    """

    name = "unet"
    summary = "U-Net trained on public faces to undo the defence"
    cost = "fit: minutes (trains a network); recover: hundreds of faces/s"
    reference = "PartialFace (recovery attack), ICCV 2023; U-Net, MICCAI 2015"
    needs = frozenset({Capability.PUBLIC_FACES, Capability.MECHANISM})
    uses = frozenset({Capability.TRAFFIC, Capability.PROTECTION})
    opens = frozenset({"affine", "mixture"})
    Options = UNetOptions
    presets: ClassVar = {
        "quick": {**TWO_CORES, "widths": (16, 32, 64), "images": 2_000, "state_faces": 300, "traffic": 500},
        "cpu": {**TWO_CORES, "widths": (16, 32, 64, 128), "images": 10_000, "passes": 10, "optimiser": "muon"},
        "gpu": {"loss": "l1+ssim", "images": 600_000, "early_stop": True},
        # As published: nothing added to the network or its input, no state read off, one guess.
        "paper": {
            "images": 2_000_000,
            "early_stop": True,
            "compile": True,
            "bypass": 0,
            "infer_state": False,
            "guesses": 1,
            "client": False,
            "input": RAW,
        },
    }
    options: UNetOptions

    network: UNetNetwork
    reader: StateReader | None
    reads: Tensor

    def inapplicable(self, defense: Defense) -> str | None:
        """It needs pictures: a template of one value a channel has no pixels that a network of this kind could use."""
        return no_pictures(defense)

    def build(self, adversary: Adversary) -> None:
        """Build the network for the adversary's defence, and the reader of states where one is used."""
        mechanism, states = self.mechanism, self.mechanism.states()
        self.reader, width, channels = None, None, mechanism.channels
        self._canonical, knows = False, adversary.knowledge is Knowledge.ORACLE
        if self.options.input in (AUTO, RAW):
            if (self.options.infer_state or knows) and states is not None and len(states) <= _MOST_STATES:
                reader = StateReader(adversary, mechanism)
                inferable = not reader.infers_secret or (adversary.traffic is not None and reader.inferable)
                if reader.width is not None and inferable:
                    self.reader, width = reader, reader.width
            if self.reader is None and type(mechanism).canonical is not Defense.canonical:
                # One zero representation tells how wide the layout is once the state is undone.
                drawn = mechanism.draw(1, derived(self.seed, "shape"))
                blank = torch.zeros(1, *mechanism.representation_shape, device=self.device)
                width_undone = mechanism.canonical(blank, drawn).shape[1]
                if drawn is None:
                    # What one secret does to the places of values; an order of channels the network learns by itself.
                    told = adversary.knowledge is not Knowledge.BLACKBOX
                    self._canonical = told and width_undone == channels
                else:  # states may be too many to be listed: what was drawn is known all the same
                    self._canonical = knows
                channels = width_undone if self._canonical else channels
        self.register_buffer("reads", torch.tensor(knows))
        self._build_network(channels, width)
        self._build_range()

    def _build_network(self, channels: int, width: int | None = None) -> None:
        side = max(self.mechanism.representation_shape[1:])
        network = UNetNetwork(channels, self.adversary.faces.shape[-1], self.options, width=width, side=side)
        self.network = network.to(memory_format=torch.channels_last)

    @property
    def _may_choose(self) -> bool:
        """Where layouts are undone, representations are understood as they are."""
        return not self._canonical and (self.reader is None or not bool(self.reads))

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The representations and, where the state is undone, their layout."""
        if self.reader is not None and not len(self.inputs.views):
            if self.reads:
                return representations, self.reader.layouts(self.reader.rows(representations, states))
            # Taken as they come: the network is built for layouts, and this one is as good as any.
            layout = torch.arange(representations.shape[1], device=self.reads.device)
            return representations, layout.expand(len(representations), -1)
        if self._canonical:
            return self.mechanism.canonical(representations, states), None
        return representations, None

    def _exposure(self) -> Exposure:
        inferred = self.reader is not None and self.reader.infers_secret and bool(self.reads)
        mechanism = self.reader.mechanism if self.reader is not None and inferred else None
        guesses, client = self.options.guesses, self.options.client and not self.options.guesses
        return Exposure(self.adversary, self.seed, guesses=guesses, mechanism=mechanism, client=client)

    def _learn_of_defence(self, trainer: Trainer) -> dict[str, Any]:
        """Fit the reader of states, and see whether it is right on other public faces."""
        if self.reader is None:
            return {"states_inferred": False}
        details = self.reader.fit(self.seed, self.options)
        if self.adversary.knowledge is not Knowledge.ORACLE:
            accuracy = self._reading_accuracy(self.reader, trainer)
            self.reads.fill_(accuracy >= _RELIABLE)
            details["state_inference_accuracy"] = accuracy
        return details | {"states_inferred": bool(self.reads)}

    def _reading_accuracy(self, reader: StateReader, trainer: Trainer) -> float:
        """Share of public faces whose state is read right off a fresh draw of the mechanism (as far as it is known)."""
        mechanism, generator = reader.mechanism, derived(self.seed, "states")
        listed = mechanism.states()
        right = []
        for index in torch.randint(len(trainer.faces), (_CHECK_FACES,), generator=generator).split(_CHUNK):
            sent = mechanism.protect(trainer.floats(index), generator)
            if sent.state is None or listed is None:
                raise ValueError(f"{mechanism.name} lists states but says of no face which was drawn")
            truth = row_numbers(sent.state.cpu(), listed.cpu())
            right.append(reader.rows(sent.representation, None).cpu() == truth)
        return float(torch.cat(right).float().mean())

    def _measure(self, trainer: Trainer, exposure: Exposure) -> None:
        """Set the input statistics and the mean face from public training faces."""
        sample = trainer.sample(_STATISTICS_FACES, "statistics")

        def shown() -> Iterator[tuple[Tensor, Tensor | None]]:
            for number, index in enumerate(sample.split(_CHUNK)):
                protected = exposure.protect(trainer.floats(index), "statistics", number)
                views = self._view(protected.representation)
                self._widen_range(views)
                yield self._inputs(views, protected.state)

        mean, std = channel_statistics(shown(), len(self.network.mean))
        self.network.mean.copy_(mean)
        self.network.std.copy_(std)
        self.network.mean_face.copy_(trainer.mean_face(sample, mirrored=self.options.flip))

    def infer_layout(self, observation: Observation) -> Tensor | None:
        """The canonical channel of each channel, int64 (N, k, C), where states are inferred."""
        return self.reader.infer_layout(observation.representations) if self.reader is not None and self.reads else None
