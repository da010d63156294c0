"""Reads the state of each intercepted face, and under a black box the secret table itself, off what was intercepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attacks.base import Adversary, Knowledge
from attacks.exposure import Exposure
from attacks.layout import ChannelLayout, probe
from attacks.places import PlaceClassifier, fit_places, infer_table
from attacks.seeds import derived
from defenses.base import Defense


@dataclass(frozen=True)
class _Situation:
    """What the reader was prepared for; outside the module's attributes, as a defence is not a part of an attack."""

    knowledge: Knowledge
    mechanism: Defense
    layout: ChannelLayout | None
    device: torch.device


class StateReader(nn.Module):
    """Which of its states a defence drew for each representation.

    * ``oracle``: told.
    * ``whitebox``: the known table's row that is likeliest under :class:`~attacks.places.PlaceClassifier`.
    * ``blackbox``: as there, in a table that is inferred from intercepted traffic first, and becomes
      the :attr:`mechanism` the attack works with.

    A defence whose layout never varies (and is no secret) has one state, which needs no reading.

    Attributes:
        classifier: of maps into places, or None where nothing is to be told apart.
        table: int64 (K, C) buffer, the places of each state; under a black box rows of -1 stand for states not found.
    """

    table: Tensor
    classifier: PlaceClassifier | None

    def __init__(self) -> None:
        super().__init__()
        self._situation: _Situation | None = None
        self._imitation: tuple[Tensor, Defense] | None = None

    def prepare(self, adversary: Adversary, seed: int) -> None:
        """Build what :meth:`fit` fills."""
        device = adversary.fabric.device
        mechanism = adversary.mechanism(derived(seed, "mechanism")).to(device)
        layout = probe(mechanism, mechanism.states())
        secret = adversary.knowledge is Knowledge.BLACKBOX and bool(mechanism.secret)
        if layout is None or not (layout.varies or secret):
            self.classifier = None
            self.register_buffer("table", torch.zeros(0, 0, dtype=torch.int64))
        else:
            height, width = mechanism.representation_shape[1:]
            self.classifier = PlaceClassifier(height, width, layout.width)
            self.register_buffer("table", torch.full_like(layout.places, -1) if secret else layout.places.clone())
        self._situation = _Situation(adversary.knowledge, mechanism, layout, device)
        self._imitation = None
        self.to(device)

    def _prepared(self) -> _Situation:
        if self._situation is None:
            raise ValueError("the reader of states has to be prepared before it is used")
        return self._situation

    @property
    def infers_secret(self) -> bool:
        """Whether the table has to be inferred."""
        situation = self._prepared()
        return situation.knowledge is Knowledge.BLACKBOX and self.classifier is not None

    @property
    def inferable(self) -> bool:
        """Whether the defence can be described by a table that was inferred."""
        return type(self._prepared().mechanism).with_places is not Defense.with_places

    @property
    def mechanism(self) -> Defense:
        """The defence in use or, under a black box, what was found out about it."""
        situation = self._prepared()
        if not self.infers_secret:
            return situation.mechanism
        found = self.table[(self.table >= 0).all(dim=1)]
        if not len(found):
            return situation.mechanism
        if self._imitation is None or not torch.equal(self._imitation[0], found):
            self._imitation = found.clone(), situation.mechanism.with_places(found).to(situation.device)
        return self._imitation[1]

    def fit(self, adversary: Adversary, seed: int, *, faces: int, traffic: int) -> dict[str, Any]:
        """Fit the classifier on public faces and, under a black box, infer the table from intercepted traffic.

        Args:
            adversary: as for :meth:`prepare`.
            seed: of the draws.
            faces: public faces to fit the classifier on (as many more check it).
            traffic: intercepted faces to infer the table from.

        Returns:
            ``map_accuracy`` on public faces; under a black box also ``intercepted`` and ``states_found``.

        Raises:
            ValueError: a black box without intercepted traffic.
        """
        situation = self._prepared()
        if self.classifier is None:
            return {}
        exposure = Exposure(adversary, seed)
        layout = None if self.infers_secret else situation.layout
        accuracy = fit_places(self.classifier, adversary.faces, exposure, layout, seed, faces)
        details: dict[str, Any] = {"map_accuracy": accuracy}
        if self.infers_secret:
            if not self.inferable:
                raise ValueError(f"{situation.mechanism.name} is not described by the places of its channels")
            if adversary.traffic is None:
                raise ValueError("a secret table is inferred from intercepted traffic, and none was given")
            likelihoods = torch.cat([self.classifier(batch).cpu() for batch in adversary.traffic(traffic)])
            found, counts = infer_table(likelihoods, len(self.table))
            # The defence knows what layouts it can have (PartialFace: the same for every colour), a reading does not.
            imitation = situation.mechanism.with_places(found.to(situation.device))
            consistent = probe(imitation, imitation.states())
            if consistent is not None:
                found = consistent.places
            self.table.fill_(-1)
            self.table[: len(found)] = found.to(self.table.device)
            details |= {"intercepted": len(likelihoods), "states_found": len(found), "faces_per_state": counts.tolist()}
        return details

    def rows(self, representations: Tensor, states: Tensor | None) -> Tensor:
        """The row of :attr:`mechanism`'s states that each representation (N, C, h, w) was sent under: int64 (N,).

        Args:
            representations: what was intercepted.
            states: int64 (N, D), the true states, where they are known.
        """
        situation = self._prepared()
        if situation.knowledge is Knowledge.ORACLE and situation.layout is not None:
            if states is None and situation.mechanism.states() is not None:
                raise ValueError("at oracle the states of the intercepted faces are needed")
            if states is not None:
                return situation.layout.row_of(states)
        if self.classifier is None:
            return torch.zeros(len(representations), dtype=torch.int64, device=situation.device)
        known = self.table[(self.table >= 0).all(dim=1)]
        return self.classifier.rows(self.classifier(representations), known if len(known) else self.table.clamp(min=0))

    def places(self, rows: Tensor) -> Tensor | None:
        """The canonical place of each channel, int64 (N, C), for rows from :meth:`rows`; None without a layout."""
        situation = self._prepared()
        if self.classifier is not None:
            return self.table[rows.to(self.table.device)]
        return None if situation.layout is None else situation.layout.places[rows.to(situation.device)]
