"""What every attack has to keep, whatever it does: one small fit of each."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from linear_recogniser import Recogniser
from pydantic import ValidationError
from score_service import Service
from torch.nn import functional

import attacks.parts.training
from attacks.base import GRANTS, Adversary, Knowledge, LinkageAttack, Observation
from bench import plugins

SIZE = 16
NETWORK = {"widths": "4,8", "stem_stride": 2, "batch_size": 10, "learning_rate": 3e-3}
ESTIMATE = {"rank": 12, "state_faces": 60, "traffic": 60}
GENERATOR = {"latent_size": 8, "generator_width": 4, "generator_batch_size": 10, "generator_images": 100}


@dataclass(frozen=True)
class Case:
    """An attack's options for a fit of a second.

    Attributes:
        steps: of its training, 10 images each; 0 where nothing is trained.
        wrong: options that it refuses, beside unknown ones.
        linear: whether it needs a linear defence.
    """

    options: dict[str, Any]
    steps: int = 0
    wrong: tuple[dict[str, Any], ...] = field(default=())
    linear: bool = False


CASES = {
    "unet": Case(
        {**NETWORK, "images": 100, "passes": 0, "state_faces": 60, "traffic": 60},
        10,
        ({"widths": "16,x"}, {"widths": ""}, {"widths": (0, 8)}, {"stem_stride": 3}, {"bypass": 2}, {"guesses": -1}),
    ),
    "unet-ensemble": Case({**NETWORK, "images": 60}, 6, ({"most": 0}, {"loss": "l2"}, {"warmup": 0.5, "decay": 0.9})),
    "unrolled": Case({**NETWORK, **ESTIMATE, "images": 60}, 6, ({"rank": 0}, {"validation": 1.0}), linear=True),
    "linear": Case(ESTIMATE, 0, ({"solver": "lu"}, {"held_out": 1}), linear=True),
    "unmix": Case(ESTIMATE, 0, ({"placed": 0}, {"components": 0}, {"map_faces": 2}), linear=True),
    "linkage": Case(
        {
            **{"widths": "8,16", "blocks": 1, "embedding_size": 8, "batch_size": 10, "teacher_steps": 4, "steps": 6},
            **{"state_faces": 60, "traffic": 60, "validation": 0.2, "method": "fused"},
            "recovery_options": {**NETWORK, "images": 60, "state_faces": 60, "traffic": 60},
        },
        10,
        (
            {"method": "guess"},
            {"recovery": "linkage"},
            {"recovery_options": {"no_such": 3}},
            {"margin": 1.0},
            {"hints": -1},
            {"embedding_size": 1},
            {"batch_size": 1},
            {"augmentation": 3},
        ),
    ),
    "template": Case(
        {"width": 4, "batch_size": 10, "images": 80, "views": 2},
        8,
        ({"views": 0}, {"shift": 0.5}, {"learning_rate": float("nan")}, {"images": 0}),
    ),
    "model-inversion": Case(
        {**GENERATOR, "steps": 2, "starts": 2, "states": 1, "selection_views": 2, "tuning_faces": 2},
        10,
        ({"prior": "gan"}, {"loss": "l1"}, {"step_size": 0}, {"latent_size": 1}, {"generator_validation": 1.0}),
    ),
    "hill-climb": Case({"components": 20, "queries": 60}, 0, ({"batch": 7}, {"pilot": 1.0}, {"step_size": 2})),
    "zeroth-order": Case({"components": 20, "queries": 60}, 0, ({"estimator": "exact"}, {"radius": 2}, {"step": 0})),
}
TRAINED = [name for name, case in CASES.items() if case.steps]
#: Ways of training that a checkpoint has to hold more for.
WAYS = [
    *((name, {}) for name in TRAINED),
    ("model-inversion", {"adversarial": 0.01}),
    ("unet", {"early_stop": True}),
    ("unet", {"optimiser": "muon"}),
]
IMAGES = 10


def subsets():
    """A linear defence of six states: two permutations of each of three subsets."""
    options = {"subset_size": 18, "tables": "random", "n_permutations": 2}
    return plugins.make_defense("partialface", options, "cpu", SIZE)


@pytest.fixture
def world(make_adversary, make_faces, pick):
    """``world(name, **adversary)``: an adversary with all that the attack could ask for, and what it observes."""

    def make(name, *, count=5, **more) -> tuple[Adversary, Observation]:
        defense = subsets() if CASES[name].linear else pick()
        size, shape = defense.image_size, defense.representation_shape
        recogniser = Recogniser(shape, common=1.0)
        adversary = make_adversary(defense, **{"faces": make_faces(90, size), **more})

        @torch.no_grad()
        def embed(faces):
            sent = defense.protect(faces, torch.Generator().manual_seed(8))
            return functional.normalize(recogniser(sent.representation), dim=1)

        def traffic(count):
            yield defense.protect(make_faces(count, size, 3) / 255, torch.Generator().manual_seed(4)).representation

        hidden = make_faces(5, size, 7)[:count] / 255
        sent = [defense.protect(hidden, torch.Generator().manual_seed(i)) for i in (1, 2)]
        templates = torch.stack([functional.normalize(recogniser(s.representation.detach())) for s in sent], 1).detach()
        observation = Observation(
            torch.stack([s.representation for s in sent], 1),
            states=torch.stack([s.state for s in sent], 1) if adversary.knowledge is Knowledge.ORACLE else None,
            templates=templates,
            enrolled=functional.normalize(templates.mean(dim=1), dim=1),
            score=Service(hidden).score,
        )
        granted = None if adversary.knowledge is Knowledge.BLACKBOX else recogniser
        return replace(adversary, recogniser=granted, embed=embed, traffic=traffic), observation

    return make


def make(name, **options):
    return plugins.make_attack(name, {**CASES[name].options, **options}, "cpu")


def outcome(attack, observation):
    """What the attack makes of what it observes."""
    if isinstance(attack, LinkageAttack):
        return attack.embed_representations(observation.representations.flatten(0, 1))
    return attack.recover(observation)


def weights(attack):
    return {name: value.clone() for name, value in attack.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_attack_is_here():
    assert set(CASES) == set(plugins.attacks())


@pytest.mark.parametrize("name", CASES)
def test_presets_are_valid_and_wrong_options_refused(name):
    kind = plugins.attacks().get(name)
    for preset in ("quick", "cpu", "gpu", "paper"):
        kind.Options.model_validate(kind.presets.get(preset, {}))
    for wrong in (*CASES[name].wrong, {"no_such_option": 1}):
        with pytest.raises(ValidationError):
            kind.Options.model_validate(wrong)
    assert set(kind.budgets.values()) <= set(kind.Options.model_fields)


@pytest.mark.parametrize("name", CASES)
def test_every_option_says_what_it_means_and_numbers_have_a_range(name):
    for option, info in plugins.attacks().get(name).Options.model_fields.items():
        assert info.description, option
        if info.annotation in (int, float):
            assert any(hasattr(bound, "ge") or hasattr(bound, "gt") for bound in info.metadata), option


@pytest.mark.parametrize(
    ("name", "knowledge"),
    [(name, str(rung)) for name in CASES for rung in Knowledge if plugins.attacks().get(name).needs <= GRANTS[rung]],
)
def test_a_fit_depends_on_the_seed_alone_and_a_stored_one_does_the_same(world, name, knowledge):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    adversary, observation = world(name, knowledge=knowledge)
    attack, again, fresh, other = (make(name) for _ in range(4))
    report = attack.learn(adversary)
    assert torch.equal(torch.rand(2), expected)  # the global generator plays no part, and is left alone
    same = again.learn(world(name, knowledge=knowledge)[0])
    assert report.curve == same.curve
    assert equal(weights(attack), weights(again))
    result = outcome(attack, observation)
    assert torch.equal(outcome(attack, observation), result)

    fresh.prepare(adversary)
    fresh.load_state_dict(weights(attack))
    assert torch.equal(outcome(fresh, observation), result)
    other.learn(world(name, knowledge=knowledge, seed=1)[0])
    assert not torch.equal(outcome(other, observation), result)


@pytest.mark.parametrize("name", CASES)
def test_a_victim_is_treated_alike_alone_and_among_others(world, name):
    adversary, observation = world(name)
    attack = make(name, **({"starts": 1} if name == "model-inversion" else {}))
    attack.learn(adversary)
    few = replace(observation.rows(slice(2)), score=observation.score)
    together = outcome(attack, observation)
    alone = outcome(attack, few)
    torch.testing.assert_close(alone, together[: len(alone)], rtol=0, atol=2e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_a_fit_that_was_killed_three_times_equals_an_unbroken_one(world, name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks.parts.training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    whole, last = make(name, **options), CASES[name].steps
    expected = whole.learn(world(name)[0])
    steps = []

    def report(done, total, **fields):
        assert fields.keys() == {"loss", "images_per_second"}
        assert (done % IMAGES, total) == (0, last * IMAGES)
        steps.append(done // IMAGES)
        if steps.count(steps[-1]) == 1 and steps[-1] in (1, 3, 6):
            raise Killed

    for stop in (1, 3, 6, None):
        resumed = make(name, **options)
        adversary, _ = world(name, checkpoint=tmp_path, report=report)
        with nullcontext() if stop is None else pytest.raises(Killed):
            actual = resumed.learn(adversary)
    # Each time the step that was killed, and none before it.
    assert steps == [1, *range(1, 4), *range(3, 7), *range(6, last + 1)]
    assert (actual.curve, actual.saturated) == (expected.curve, expected.saturated)
    assert (actual.states_seen is None) == (expected.states_seen is None)
    assert actual.states_seen is None or torch.equal(actual.states_seen, expected.states_seen)
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("name", TRAINED)
def test_a_finished_fit_is_not_repeated_and_that_of_another_fit_refused(world, name, tmp_path):
    first = make(name).learn(world(name, checkpoint=tmp_path)[0])
    done = []
    adversary, _ = world(name, checkpoint=tmp_path, report=lambda n, total, **fields: done.append(n))
    assert make(name).learn(adversary).curve == first.curve
    assert not done
    images = sorted(count for count, _ in first.curve)
    assert images == [count for count, _ in first.curve]
    assert first.saturated is False
    rate = "generator_learning_rate" if name == "model-inversion" else "learning_rate"
    with pytest.raises(ValueError, match="another fit"):
        make(name, **{rate: 0.01}).learn(adversary)
    with pytest.raises(ValueError, match="another fit"):
        make(name).learn(world(name, checkpoint=tmp_path, seed=1)[0])


@pytest.mark.parametrize("name", TRAINED)
def test_one_identity_is_too_few(world, name):
    adversary, _ = world(name)
    with pytest.raises(ValueError, match="identities"):
        make(name).learn(replace(adversary, identities=torch.zeros_like(adversary.identities)))


@pytest.mark.parametrize("name", CASES)
def test_it_says_before_any_compute_what_it_cannot_work_on(name, plain):
    class Squares(plain):
        def transform(self, faces, state, generator):
            return faces**2

    class Template(plain):
        differentiable = False

        @property
        def representation_shape(self):
            return (40, 1, 1)

        def transform(self, faces, state, generator):
            return faces.flatten(1)[:, :40, None, None]

    options = {"method": "auto"} if name == "linkage" else {}
    reasons = {kind: make(name, **options).inapplicable(kind(image_size=SIZE)) for kind in (Squares, Template)}
    assert (reasons[Squares] is not None) == CASES[name].linear
    # Which values a template keeps of a face is a linear map, declared or not.
    at_a_loss = name in ("unet", "unet-ensemble", "model-inversion")
    assert (reasons[Template] is not None) == at_a_loss
    assert make(name).inapplicable(subsets()) is None


@pytest.mark.parametrize("name", ["template", "model-inversion"])
def test_the_providers_recogniser_is_left_as_it_was_and_without_it_the_attack_is_refused(world, name):
    adversary, observation = world(name)
    network = adversary.recogniser.train()
    before = network.weight.detach().clone()
    attack = make(name)
    attack.learn(adversary)
    attack.recover(observation)
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None
    assert network.weight.requires_grad
    assert network.training
    with pytest.raises(ValueError, match="recogniser's weights"):
        make(name).prepare(replace(adversary, recogniser=None, embed=None))
