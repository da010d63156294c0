"""U-Net inversion: a network trained on public faces to undo the defence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning_fabric import Fabric
from pydantic import Field
from torch import Tensor

from attacks.base import Adversary, AttackOptions, Capability, Knowledge, Observation
from attacks.exposure import Exposure, chunks, to_float
from attacks.inversion import InversionAttack, InversionOptions, pick
from attacks.layout import ChannelLayout, probe
from attacks.seeds import base_seed, derived
from attacks.state_inference import StateClassifier
from attacks.unet_network import UNetNetwork
from defenses.base import Defense

#: Faces whose representations give the input statistics.
_STATISTICS_FACES = 512
#: Faces at once outside training, where nothing is gained by the batch.
_CHUNK = 64
#: For the classifier of states: examples to fit per state, the most states tried, the least accuracy.
_EXAMPLES_PER_STATE = 24
_MOST_STATES = 256
_RELIABLE = 0.95

_TWO_CORES: Mapping[str, Any] = {"stem_stride": 2, "batch_size": 16, "learning_rate": 2e-3, "loss": "l1+ssim"}


class UNetOptions(InversionOptions):
    """Options of :class:`UNet`; the defaults are the published ones where there are any.

    Attributes:
        infer_state: at ``whitebox``, read each face's state off its representation and undo the layout,
            where a classifier fitted on public faces proves able to; else train on the mixture.
        guesses: at ``blackbox``, how many guesses of the secret to train on; 0 draws fresh ones every
            step, which marginalises over what is not known; 1 is the published single guess.
        invariance: what a defence that permutes channels cannot hide: ``sorted`` shows the network the channels of
            each colour in the order of their energies, ``mean`` their mean and mean magnitude; the state is not
            inferred then. Representations are colour-major, so each third of the channels is one colour.
    """

    infer_state: bool = True
    guesses: int = Field(default=0, ge=0, le=4096)
    invariance: Literal["none", "sorted", "mean"] = "none"


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


class UNet(InversionAttack):
    """U-Net inversion under the three rungs of knowledge.

    Trained to minimise L1(g(z), X) over faces X of public identities, protected afresh in every step.
    ``oracle`` knows each state and undoes the layout (:meth:`Defense.canonical`). ``whitebox`` knows the
    table of states: where :class:`StateClassifier` can tell them apart, it does the same with the
    inferred state, else it trains on the mixture. ``blackbox`` guesses the secret. Of k > 1
    interceptions the recoveries are averaged.
    """

    name: ClassVar[str] = "unet"
    summary: ClassVar[str] = "U-Net trained on public faces to undo the defence"
    cost: ClassVar[str] = "fit: minutes (trains a network); recover: hundreds of faces/s"
    budgets: ClassVar[Mapping[str, str]] = {"steps": "steps"}
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
        invariant = self.options.invariance != "none"
        countable = states is not None and len(states) <= _MOST_STATES
        if adversary.knowledge is not Knowledge.BLACKBOX and countable and not invariant:
            layout = probe(mechanism, states)
        self.classifier, accuracy = None, None
        if adversary.knowledge is Knowledge.WHITEBOX and self.options.infer_state and layout and layout.varies:
            self.classifier, accuracy = _classifier_of_states(mechanism, layout, faces, seed)
        undoes = adversary.knowledge is Knowledge.ORACLE or self.classifier is not None
        self.layout = layout if undoes and layout and layout.varies else None

        channels = shape[0]
        if invariant:
            channels = invariant_view(torch.zeros(1, *shape), self.options.invariance).shape[1]
        canonical = adversary.knowledge is Knowledge.ORACLE and layout is None and states is not None and not invariant
        if canonical:
            # One zero representation tells how wide the layout is once the state is undone.
            blank = torch.zeros(1, *shape, device=device)
            channels = mechanism.canonical(blank, mechanism.draw(1, derived(seed, "shape"))).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived(seed, "weights").initial_seed())
            width = None if self.layout is None else self.layout.width
            self.network = UNetNetwork(channels, faces.shape[-1], self.options, width=width)
        self.network = self.network.to(memory_format=torch.channels_last)
        self._build_range(shape[0])
        self.to(device)
        self._setting = _Setting(adversary.knowledge, mechanism, adversary.fabric, canonical, accuracy)

    def _prepared(self) -> _Setting:
        if self._setting is None:
            raise ValueError("unet has to be prepared or fitted before it is used")
        return self._setting

    def _see(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the network takes: the representations and, where the state is undone, their channels' places."""
        setting = self._prepared()
        if self.options.invariance != "none":
            return invariant_view(representations, self.options.invariance), None
        if self.classifier is not None and self.layout is not None:
            return representations, self.layout.places[self.classifier(representations)]
        if self.layout is not None and states is not None:
            return representations, self.layout.places[self.layout.row_of(states)]
        if setting.canonical:
            return setting.mechanism.canonical(representations, states), None
        return representations, None

    # -- training -----------------------------------------------------------------------------------

    def _exposure(self, adversary: Adversary, seed: int) -> Exposure:
        return Exposure(adversary, seed, guesses=self.options.guesses)

    def _inputs(self, representations: Tensor, states: Tensor | None) -> tuple[Tensor | None, ...]:
        return self._see(representations, states)

    def _learn_of_defence(self, adversary: Adversary, training: Tensor, seed: int) -> dict[str, Any]:
        return {
            "state_inference_accuracy": self._prepared().state_accuracy,
            "states_inferred": self.classifier is not None,
        }

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

    def infer_places(self, observation: Observation) -> Tensor | None:
        """The canonical place of each channel, int64 (N, k, C), where states are inferred."""
        if self.classifier is None or self.layout is None:
            return None
        representations = observation.representations
        parts = [self.classifier(part.to(self.low.device)) for part in chunks(representations.flatten(0, 1), _CHUNK)]
        places = self.layout.places[torch.cat(parts)]
        return places.view(*representations.shape[:2], -1)


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
