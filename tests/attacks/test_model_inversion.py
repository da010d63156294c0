from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interception import observe
from linear_recogniser import EMBEDDING, Recogniser
from pictures import blends
from torch import nn
from torch.nn import functional

from attacks.base import GRANTS, Knowledge
from attacks.model_inversion import CodeEstimate, ModelInversion, ModelInversionOptions, _Codes, _Goal
from attacks.parts.exposure import split_identities
from attacks.parts.generator import build_generator
from bench.randomness import base_seed, derived

SIZE = 16
TINY = {
    **{"latent_size": 12, "generator_width": 4, "generator_batch_size": 10, "generator_images": 100},
    **{"steps": 3, "starts": 2, "states": 1, "selection_views": 2, "tuning_faces": 2},
}


@pytest.fixture
def scene(make_adversary):
    """Builds a white-box adversary (or one of another rung) of ``defense``, with the provider's recogniser."""

    def make(defense, knowledge="whitebox", **more):
        adversary = make_adversary(defense, knowledge, **{"faces": blends(60), **more})
        return replace(adversary, recogniser=Recogniser(defense.representation_shape))

    return make


def stolen(adversary, faces, k=1, *, states=False, seed=9):
    """What is stolen of ``faces`` (uint8), and their states if asked; the class centre is a clean template."""
    observation = observe(adversary.mechanism(torch.Generator()), faces, k, states=states, seed=seed)
    with torch.no_grad():
        templates = [
            functional.normalize(adversary.recogniser(z), dim=1) for z in observation.representations.unbind(1)
        ]
    enrolled = functional.normalize(torch.stack(templates).mean(dim=0), dim=1)
    return replace(observation, templates=torch.stack(templates, dim=1), enrolled=enrolled)


def fitted(adversary, **options):
    attack = ModelInversion(ModelInversionOptions(**TINY | options))
    return attack, attack.learn(adversary)


def similarity(adversary, faces, observation):
    """Mean cosine of the recovered faces' embeddings to the first templates."""
    defense = adversary.mechanism(torch.Generator())
    with torch.no_grad():
        again = adversary.recogniser(defense.protect(faces, torch.Generator().manual_seed(1)).representation)
    return float(functional.cosine_similarity(again, observation.templates[:, 0]).mean())


def test_it_needs_the_weights_and_so_a_white_box():
    enough = [rung for rung, grants in GRANTS.items() if ModelInversion.needs <= grants]
    assert enough == [Knowledge.WHITEBOX, Knowledge.ORACLE]


def pairs(noise, count=4000):
    """Codes that depend on embeddings linearly but for ``noise``."""
    generator = torch.Generator().manual_seed(0)
    embeddings = functional.normalize(torch.randn(count, 8, generator=generator) + 0.5, dim=1)
    codes = 3 + embeddings @ torch.randn(8, 4, generator=generator)
    codes = codes + noise * torch.randn(count, 4, generator=generator)
    return codes, embeddings, torch.arange(count) % 4 == 0


def test_a_linear_relation_is_found():
    codes, embeddings, held_out = pairs(noise=0.0)
    estimate = CodeEstimate(8, 4)
    estimate.fit(codes, embeddings, held_out)
    expected = estimate.code(embeddings, torch.zeros(4000, 4))
    torch.testing.assert_close(expected[held_out], codes[held_out], rtol=0, atol=0.02)
    assert (estimate.error == 0.05).all()  # what is kept for a gradient to find


def test_the_error_is_measured_where_nothing_was_fitted():
    codes, embeddings, held_out = pairs(noise=0.5)
    estimate = CodeEstimate(8, 4)
    estimate.fit(codes, embeddings, held_out)
    residual = codes - estimate.code(embeddings, torch.zeros(4000, 4))
    in_codes = estimate.error * estimate.code_std
    torch.testing.assert_close(in_codes, residual[held_out].square().mean(dim=0).sqrt())
    torch.testing.assert_close(in_codes, torch.full((4,), 0.5), rtol=0.1, atol=0)


def test_embeddings_that_say_nothing_leave_the_mean_code():
    codes, embeddings, held_out = pairs(noise=0.5)
    estimate = CodeEstimate(8, 4)
    shuffled = codes[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]
    estimate.fit(shuffled, embeddings, held_out)
    expected = estimate.code(embeddings, torch.zeros(4000, 4))
    assert float((expected - estimate.code_mean).abs().max()) < 0.2 * float(estimate.code_std.mean())
    torch.testing.assert_close(estimate.error, torch.ones(4), rtol=0.1, atol=0)


def test_a_surprise_is_in_errors_of_the_estimate():
    codes, embeddings, held_out = pairs(noise=0.5)
    estimate = CodeEstimate(8, 4)
    estimate.fit(codes, embeddings, held_out)
    apart = estimate.code(embeddings[:1], torch.full((1, 4), 2.0)) - estimate.code(embeddings[:1], torch.zeros(1, 4))
    torch.testing.assert_close(apart[0], 2 * estimate.error * estimate.code_std)


def test_codes_start_where_the_target_is_expected():
    codes, embeddings, held_out = pairs(noise=0.5)
    estimate = CodeEstimate(8, 12)
    estimate.fit(codes.repeat(1, 3), embeddings, held_out)
    network = build_generator(ModelInversionOptions(**TINY), SIZE, 0).eval()
    space = _Codes(network, estimate, embeddings[:2], 3, torch.Generator().manual_seed(0))
    faces = space.faces()
    torch.testing.assert_close(faces[::3], network(estimate.code(embeddings[:2], torch.zeros(2, 12))))
    penalty = space.penalty(faces)
    assert penalty[::3].tolist() == [0, 0]
    assert (penalty[[1, 2, 4, 5]] > 0.2).all()


def test_it_recovers_faces_it_never_saw(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    attack, report = fitted(
        adversary, steps=40, generator_width=8, generator_images=2500, generator_learning_rate=5e-3, tuning_faces=6
    )
    unseen = blends(20, seed=7)
    observation = stolen(adversary, unseen)
    recovered = attack.recover(observation)
    error = (recovered - unseen / 255).abs().mean()
    assert error < 0.6 * report.details["floor_loss"]
    assert similarity(adversary, recovered, observation) > 0.95
    assert report.curve[-1][0] == 2500


def test_without_a_generator_the_embedding_is_met_all_the_same(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    attack, report = fitted(adversary, prior="none", steps=80, prior_weight=0.001)
    observation = stolen(adversary, blends(8, seed=7))
    recovered = attack.recover(observation)
    mean = attack.mean_face.expand(8, -1, -1, -1)
    assert similarity(adversary, recovered, observation) > 0.97 > similarity(adversary, mean, observation)
    assert report.saturated is None
    assert report.curve == ()


def test_more_steps_come_nearer(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    observation = stolen(adversary, blends(8, seed=7))
    cosines = [
        similarity(adversary, fitted(adversary, steps=steps, prior_weight=0.0)[0].recover(observation), observation)
        for steps in (1, 10, 40)
    ]
    assert cosines[0] < cosines[1] < cosines[2]


def test_a_defence_that_sends_nothing_leaves_the_mean_face(scene, plain):
    class Nothing(plain):
        def transform(self, faces, state, generator):
            return torch.randn(faces.shape, generator=generator) + 0 * faces

    adversary = scene(Nothing(image_size=SIZE))
    attack, report = fitted(adversary, steps=20, generator_images=1000)
    unseen = blends(40, seed=7)
    error = (attack.recover(stolen(adversary, unseen)) - unseen / 255).abs().mean()
    floor = (attack.mean_face - unseen / 255).abs().mean()
    assert 0.95 * floor < error < 1.25 * floor
    assert report.details["code_error"] > 0.8


@pytest.mark.parametrize("loss", ["cosine", "poincare", "max-margin", "logit"])
def test_every_loss_comes_nearer_than_the_start(scene, plain, loss):
    adversary = scene(plain(image_size=SIZE))
    observation = stolen(adversary, blends(12, seed=7))
    start = fitted(adversary, steps=1, starts=1, step_size=1e-6, prior_weight=0.0)[0].recover(observation)
    attack, _ = fitted(adversary, steps=30, starts=1, loss=loss, prior_weight=0.0)
    cosines = similarity(adversary, attack.recover(observation), observation)
    assert cosines > similarity(adversary, start, observation)


def test_known_states_are_used(scene, pick):
    """A template of a known state is matched under that state; under another one it would not fit."""
    adversary = scene(pick(), "oracle")
    attack, _ = fitted(adversary, prior="none", steps=60, prior_weight=0.001)
    told = stolen(adversary, blends(8, seed=7), states=True)

    def error(observation):
        defense = adversary.mechanism(torch.Generator())
        faces = attack.recover(observation)
        sent = defense.protect(faces, torch.Generator(), state=told.states[:, 0]).representation
        again = adversary.recogniser(sent).detach()
        return 1 - float(functional.cosine_similarity(again, told.templates[:, 0]).mean())

    known, wrong, unknown = (
        error(replace(told, states=states)) for states in (told.states, (told.states + 1) % 3, None)
    )
    assert known < 0.02
    assert wrong > 3 * known
    assert unknown > 3 * known


def test_the_class_centre_is_the_target_where_it_is_asked_for(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    attack, _ = fitted(adversary, target="class", prior="none", steps=60, prior_weight=0.001)
    observation = stolen(adversary, blends(6, seed=7))
    other = observation.enrolled.flip(0)
    recovered = attack.recover(replace(observation, enrolled=other))
    assert similarity(adversary, recovered, replace(observation, templates=other[:, None])) > 0.95


def test_a_prior_for_class_centres_is_tuned_on_class_centres(scene, plain, monkeypatch):
    """Each of a public face's identity without that face itself; three faces an identity."""
    adversary = scene(plain(image_size=SIZE))
    goals = []
    whole = ModelInversion._recover
    monkeypatch.setattr(
        ModelInversion, "_recover", lambda self, goal, name: goals.append(goal) or whole(self, goal, name)
    )
    attack, _ = fitted(adversary, target="class", tuning_faces=100)
    share, draws = attack.options.generator_validation, derived(base_seed(adversary.generator), "identities")
    _, held_out = split_identities(adversary.identities, share, draws)
    embeddings = functional.normalize(adversary.recogniser(adversary.faces / 255), dim=1).detach()
    expected = []
    for face in held_out.tolist():
        person = [other for other in range(face // 3 * 3, face // 3 * 3 + 3) if other != face]
        expected.append(functional.normalize(embeddings[person].mean(dim=0), dim=0))
    cosines = goals[0].targets @ torch.stack(expected).T
    assert len(cosines) == len(held_out)
    torch.testing.assert_close(cosines.amax(dim=1), torch.ones(len(held_out)))


def test_several_templates_are_averaged_with_one_voice_each(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    attack, _ = fitted(adversary)
    observation = stolen(adversary, blends(4, seed=7), k=2)
    louder = replace(observation, templates=observation.templates * torch.tensor([1.0, 9.0]).view(1, 2, 1))
    torch.testing.assert_close(attack.recover(louder), attack.recover(observation))


def test_the_best_start_is_kept(scene, plain):
    adversary = scene(plain(image_size=SIZE))
    attack, _ = fitted(adversary, starts=3, prior_weight=0.0)
    faces = blends(6, seed=7) / 255
    wanted = torch.tensor([2, 4])  # of victims 0 and 1, the third and the second start

    class Space:
        def faces(self):
            return faces

        def penalty(self, shown):
            return torch.zeros(len(shown))

    targets = functional.normalize(adversary.recogniser(faces[wanted]), dim=1).detach().repeat_interleave(3, dim=0)
    best = attack._best(Space(), _Goal(targets), torch.Generator().manual_seed(0))
    assert torch.equal(best, faces[wanted])


def test_the_lightest_prior_that_recovers_about_as_well_is_chosen(scene, plain, monkeypatch):
    # By weight 0.001, 0.01, ..., the error that the attack on public faces is made to have.
    errors = {0.001: 0.2, 0.01: 0.1015, 0.1: 0.1, 1.0: 0.15, 10.0: 0.3}
    grey = torch.full((60, 3, SIZE, SIZE), 102, dtype=torch.uint8)
    adversary = scene(plain(image_size=SIZE), faces=grey)

    def recover(self, goal, name):
        assert name == "tuning"
        error = next(error for weight, error in errors.items() if weight == pytest.approx(float(self.prior_weight)))
        return torch.full((len(goal.targets), 3, SIZE, SIZE), 0.4 + error)

    monkeypatch.setattr(ModelInversion, "_recover", recover)
    attack, report = fitted(adversary, generator_ssim=0.0)
    assert float(attack.prior_weight) == pytest.approx(0.01)
    assert list(report.details["prior_weights"].values()) == pytest.approx(list(errors.values()), rel=1e-4)


@pytest.mark.parametrize("target", ["template", "class"])
def test_unusable_input_is_refused(scene, plain, target):
    adversary = scene(plain(image_size=SIZE))
    attack, _ = fitted(adversary, target=target, prior_weight=0.1)
    observation = stolen(adversary, blends(3))
    name = {"template": "templates", "class": "enrolled"}[target]
    known = getattr(observation, name)
    for wrong, message in (
        (None, f"no {target}|needs stolen templates"),
        (known[..., :-1], f"{target} of 19 values.*20"),
        (known * float("nan"), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.recover(replace(observation, **{name: wrong}))


def test_steps_that_end_in_no_number_say_so(scene, plain):
    class Broken(nn.Module):
        def forward(self, representation):
            return representation.flatten(1)[:, :EMBEDDING] * (float("nan") if torch.is_grad_enabled() else 1.0)

    adversary = replace(scene(plain(image_size=SIZE)), recogniser=Broken())
    attack, _ = fitted(adversary, prior_weight=0.1)
    with pytest.raises(FloatingPointError, match="step_size"):
        attack.recover(stolen(adversary, blends(2)))
