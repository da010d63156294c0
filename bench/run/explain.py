"""``bench explain``: which frequencies the recogniser and the attacks of a run rely on, and whether expressions pass.

Everything that was trained comes out of the cache beside the run; what is found goes to ``explain.json`` in its folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attacks.base import Observation, RecoveryAttack
from bench.data.faces import FaceSet
from bench.data.synthetic import Conditions, Identities, draw_conditions, draw_identities, render
from bench.errors import UsageError
from bench.files import write_text
from bench.measures import Measure
from bench.metrics.attribution import Function, gradient_energy, members, occlusion
from bench.metrics.bootstrap import mean_estimate
from bench.nets.heads import MarginHead
from bench.nets.recogniser import build_recogniser
from bench.randomness import Streams
from bench.recognition.embed import embed_faces
from bench.recognition.options import TrainingOptions
from bench.recognition.processes import Processes
from bench.recognition.training import build_head, train
from bench.results import Explanation, Expression, Reliance
from bench.run.archive import EXPLANATION
from bench.run.attacker import AttackStages, Interception
from bench.run.observe import opened
from defenses.base import Defense
from defenses.frequency import CHANNELS, COLOURS, frequencies_of

#: Frequencies of all colours.
COUNT = COLOURS * CHANNELS

#: Random directions of an output along which gradients are looked at.
_DIRECTIONS = 16
#: Faces of which a function is differentiated at a time.
_BATCH = 4


def explain(directory: Path, *, faces: int = 16, seconds: float = 300.0, people: int = 0) -> tuple[Explanation, Path]:
    """What the recogniser and the attacks of a run rely on, and with ``people`` whether expressions get through.

    Args:
        directory: the run's folder.
        faces: victim images to look at, at most.
        seconds: longest time for the frequencies of one attack; one that needs more is left out, with the reason.
        people: rendered people whose expressions are told apart behind the defence and without it; 0 leaves it out.

    Returns:
        What was found, and the file that holds it.

    Raises:
        UsageError: the defence sends no frequencies and no expressions were asked for; or as
            :func:`bench.run.observe.opened`.
        MissingError, DataError: as :func:`bench.run.observe.opened`.
    """
    run, pipeline, attacks = opened(directory)
    config, stages = pipeline.config, attacks.stages
    defense = stages.defense(config.defense, config.defense_options)
    probes = attacks.selection.attacked[:faces]
    found: dict[str, Any] = {}
    sent = None
    if sends_frequencies(defense):
        counts = torch.zeros(COUNT, dtype=torch.int64)
        if run.result.utility is not None:
            recogniser = stages.recogniser(defense).eval()

            def embed(representation: Tensor) -> Tensor:
                return functional.normalize(recogniser(representation).float())

            with stages.bars.task("what the recogniser relies on"):
                found["recogniser"] = _of_recogniser(embed, attacks, defense, probes)
        found["attacks"] = {}
        for name, configs in pipeline.attack_configs.items():
            if name not in run.result.attack_results:
                continue
            attack, _ = attacks.fitted(configs[-1], defense)
            if isinstance(attack, RecoveryAttack):
                batches = list(attacks.observations(attack, defense, probes, configs[-1].interceptions))
                with stages.bars.task(f"what {name} relies on"):
                    found["attacks"][name] = _of_attack(attack, batches, defense, attacks, seconds)
        for _, representations, states in attacks.interceptions(defense, probes, 1):
            counts += members(_groups(defense, representations, states), COUNT).cpu()
        sent = counts.tolist()
    elif not people:
        raise UsageError(
            f"{defense.name} sends no frequencies, so there is nothing to explain of it; --expression N looks at "
            "expressions instead"
        )
    if people:
        found["expression"] = told_apart(attacks, defense, people)
    explanation = Explanation(run_id=run.manifest.run_id, faces=len(probes), sent=sent, **found)
    path = directory / EXPLANATION
    write_text(path, explanation.model_dump_json(indent=2) + "\n")
    return explanation, path


# -- frequencies -----------------------------------------------------------------------------------


def sends_frequencies(defense: Defense) -> bool:
    """Whether it is known of what a defence sends which frequency it is."""
    state = defense.draw(1, torch.Generator().manual_seed(0))
    return frequencies_of(defense.linear_operator(None if state is None else state[0])) is not None


def _groups(defense: Defense, representations: Tensor, states: Tensor | None) -> Tensor:
    """The frequency of each channel of (N, k, C, h, w), int64 (N, k, C); -1 of one that is none."""
    count, turns, channels = representations.shape[:3]
    groups = torch.full((count, turns, channels), -1, dtype=torch.int64)
    linear = defense.linear_channels
    places = torch.arange(channels) if linear is None else linear.cpu()
    known: dict[tuple[int, ...], Tensor] = {}
    for face in range(count):
        for turn in range(turns):
            state = None if states is None else states[face, turn].cpu()
            key = () if state is None else tuple(state.tolist())
            if key not in known:
                frequencies = frequencies_of(defense.linear_operator(state))
                assert frequencies is not None
                known[key] = frequencies.cpu()
            groups[face, turn, places] = known[key]
    return groups.to(representations.device)


def _of_recogniser(embed: Function, attacks: AttackStages, defense: Defense, probes: Tensor) -> Reliance:
    parts = list(attacks.interceptions(defense, probes, 1))
    z = torch.cat([representations for _, representations, _ in parts])
    groups = torch.cat([_groups(defense, representations, states) for _, representations, states in parts])

    def moved(before: Tensor, after: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(before, after)

    inputs, theirs = z[:, 0], groups[:, 0]
    batches = [(embed, *part) for part in zip(inputs.split(_BATCH), theirs.split(_BATCH), strict=True)]
    drawn = attacks.streams.generator("explain")
    return Reliance(
        occlusion=_listed(occlusion(embed, inputs, theirs, COUNT, distance=moved)),
        gradient=_listed(gradient_energy(batches, COUNT, directions=_DIRECTIONS, generator=drawn)),
    )


def _of_attack(
    attack: RecoveryAttack, batches: list[Interception], defense: Defense, attacks: AttackStages, seconds: float
) -> Reliance:
    """Of an attack that gets a picture out of representations alone."""
    reasons: dict[str, str] = {}
    if any(batch.observation.templates is not None or batch.observation.score is not None for batch in batches):
        told = "it also looks at templates or asks the service, which go by what was sent"
        return Reliance(occlusion=None, gradient=None, reasons=dict.fromkeys(("occlusion", "gradient"), told))
    observation = _joined([batch.observation for batch in batches])
    states = [batch.states for batch in batches if batch.states is not None]
    z = observation.representations
    groups = _groups(defense, z, torch.cat(states) if states else None)

    def moved(before: Tensor, after: Tensor) -> Tensor:
        return (before - after).square().flatten(1).mean(dim=1)

    started, asked, frequencies = time.monotonic(), 0, len(groups[groups >= 0].unique())

    def within() -> bool:
        nonlocal asked
        asked += 1  # whole faces came first
        return (time.monotonic() - started) / asked * (frequencies + 1) <= seconds

    def recover(representations: Tensor) -> Tensor:
        return attack.recover(replace(observation, representations=representations))

    occluded = occlusion(recover, z, groups, COUNT, distance=moved, within=within)
    if occluded is None:
        reasons["occlusion"] = f"asking it once for each frequency takes more than {seconds:.0f} s"
    gradient, drawn = None, attacks.streams.generator("explain")
    try:
        gradient = gradient_energy(_parts(attack, observation, groups), COUNT, directions=_DIRECTIONS, generator=drawn)
    except RuntimeError as error:  # autograd's word for what has no gradient
        reasons["gradient"] = f"it has no gradient in what was sent: {error}".splitlines()[0]
    return Reliance(occlusion=_listed(occluded), gradient=_listed(gradient), reasons=reasons)


def _joined(observations: list[Observation]) -> Observation:
    """Batches as one."""
    parts: dict[str, Any] = {
        name: [getattr(part, name) for part in observations] for name in ("representations", "states", "keys")
    }
    whole: dict[str, Any] = {name: torch.cat(part) for name, part in parts.items() if part[0] is not None}
    return Observation(**whole)


def _parts(
    attack: RecoveryAttack, observation: Observation, groups: Tensor
) -> Iterator[tuple[Function, Tensor, Tensor]]:
    """The attack on a few faces after another, as a function of what was sent of them."""
    for start in range(0, len(observation), _BATCH):
        rows = slice(start, start + _BATCH)
        states, keys = (None if part is None else part[rows] for part in (observation.states, observation.keys))

        def run(representations: Tensor, states: Tensor | None = states, keys: Tensor | None = keys) -> Tensor:
            # An attack may work in place.
            return attack.run(Observation(representations.clone(), states=states, keys=keys))

        yield run, observation.representations[rows], groups[rows]


def _listed(values: Tensor | None) -> list[float | None] | None:
    return None if values is None else [value if math.isfinite(value) else None for value in values.tolist()]


# -- expressions -----------------------------------------------------------------------------------

#: Expression -> ranges of what a face does (:mod:`bench.data.synthetic.parameters`). Who somebody is decides nothing.
EXPRESSIONS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "neutral": {"smile": (-0.1, 0.1), "mouth_open": (0.0, 0.0), "brow_raise": (-0.01, 0.01), "eye_open": (0.9, 1.0)},
    "happy": {"smile": (1.0, 1.4), "mouth_open": (0.0, 0.3), "brow_raise": (-0.01, 0.02), "eye_open": (0.8, 0.95)},
    "surprised": {"smile": (-0.1, 0.1), "mouth_open": (0.6, 0.9), "brow_raise": (0.05, 0.08), "eye_open": (1.1, 1.3)},
    "angry": {"smile": (-1.4, -1.0), "mouth_open": (0.0, 0.0), "brow_raise": (-0.09, -0.05), "eye_open": (0.65, 0.8)},
}

#: Pictures of each person with each expression.
_EACH = 2
#: Share of the people that a classifier learns from.
_LEARNT = 0.6
#: A softmax over cosines: the expressions are few and all there are, a margin is for those that are not.
_CLASSIFIER = TrainingOptions(
    epochs=20,
    batch_size=32,
    views=1,
    learning_rate=0.05,
    head="cosface",
    scale=16.0,
    margin=0.0,
    embedding_size=64,
    precision="32-true",
)


def expressive_faces(people: int, size: int, seed: int) -> tuple[FaceSet, Tensor]:
    """Rendered faces with known expressions: labels are those of :data:`EXPRESSIONS`; and whose they are, int64 (N,).

    Every person shows every expression, in pictures that differ in pose, light and camera.
    """
    streams = Streams(seed)
    identities = draw_identities(people, streams.generator("expression/identities"))
    pictures = people * len(EXPRESSIONS) * _EACH
    conditions = draw_conditions(pictures, streams.generator("expression/conditions"))
    whose = torch.arange(people).repeat_interleave(len(EXPRESSIONS) * _EACH)
    labels = torch.arange(len(EXPRESSIONS)).repeat_interleave(_EACH).repeat(people)
    values, drawn = conditions.values.clone(), streams.generator("expression/faces")
    for label, does in enumerate(EXPRESSIONS.values()):
        rows = (labels == label).nonzero().flatten()
        for name, (low, high) in does.items():
            values[rows, conditions.columns[name]] = low + (high - low) * torch.rand(len(rows), generator=drawn)
    shown = render(Identities.rows(identities, whose), Conditions(values, conditions.columns), size)
    images = (shown * 255).round_().to(torch.uint8)
    return FaceSet(images, labels, tuple(EXPRESSIONS)), whose


def told_apart(attacks: AttackStages, defense: Defense, people: int) -> Expression:
    """How often a classifier trained behind the defence tells the expression of people whom it has not seen.

    Expression is a utility beside recognition (Xu et al., Facial Expression Recognition with Controlled Privacy
    Preservation and Feature Compensation, 2024). The classifier is a small network, trained as a recogniser is, with
    expressions in place of identities; nothing is chosen on the people that it is tried on.

    Raises:
        UsageError: a template defence, which keeps what tells people apart; or too few people.
    """
    if defense.level == "template":
        raise UsageError(f"{defense.name} sends templates of people: expressions are told from pictures and features")
    learnt = round(_LEARNT * people)
    if learnt < 2 or people - learnt < 2:
        raise UsageError(f"--expression {people}: at least 5 people are needed to learn from some and try others")
    stages, seed = attacks.stages, attacks.streams.seed_for("expression")
    faces, whose = expressive_faces(people, stages.config.image_size, seed)
    known, others = faces.subset(whose < learnt), faces.subset(whose >= learnt)
    plain = stages.defense("none", {})

    def accuracy(behind: Defense, what: str) -> Measure:
        network = build_recogniser(
            "ir-tiny", behind.representation_shape, _CLASSIFIER.embedding_size, image_size=faces.size, seed=seed
        )
        head = build_head(_CLASSIFIER, len(EXPRESSIONS), seed=seed, processes=Processes())
        assert isinstance(head, MarginHead)
        with stages.bars.task(f"tell expressions apart {what}") as report:
            train(
                network, known, behind, _CLASSIFIER, fabric=stages.machine.fabric, seed=seed, head=head, report=report
            )
        drawn = attacks.streams.numbered("expression/others")
        embedded = embed_faces(network, behind, others, generators=drawn, fabric=stages.machine.fabric)
        with torch.no_grad():
            right = head.cpu().cosines(embedded).argmax(dim=1) == others.labels
        estimate = mean_estimate(right, whose[whose >= learnt], attacks.streams.generator("expression/bootstrap"))
        return Measure.of(estimate, "utility")

    protected, unprotected = accuracy(defense, "behind the defence"), accuracy(plain, "on plain faces")
    chance = 1 / len(EXPRESSIONS)
    if (unprotected.ci95 or (unprotected.value or 0.0,))[0] <= chance:
        reason = "the classifier tells no expressions of plain faces: show it more people"
        protected = Measure(value=None, direction="utility", reason=reason)
    return Expression(
        protected=protected,
        unprotected=unprotected,
        chance=chance,
        classes=list(EXPRESSIONS),
        trained_on=len(known),
    )
