from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interception import observe
from linear_recogniser import Recogniser
from pictures import blends
from torch.nn import functional

from attacks.base import GRANTS, Capability, Knowledge
from attacks.template import Template, TemplateDecoder, TemplateOptions

SIZE = 16
TINY = {"width": 4, "batch_size": 10, "images": 200, "views": 3, "learning_rate": 5e-3}


class Service:
    """Embeds as the provider does, and counts."""

    def __init__(self, defense, recogniser):
        self.defense, self.recogniser, self.queries = defense, recogniser, 0
        self.generator = torch.Generator().manual_seed(8)

    @torch.no_grad()
    def embed(self, faces):
        self.queries += len(faces)
        sent = self.defense.protect(faces, self.generator)
        return functional.normalize(self.recogniser(sent.representation), dim=1)


@pytest.fixture
def scene(make_adversary):
    """Builds an adversary of ``defense`` with what the rung grants, the provider's service, and what is stolen."""

    def make(defense, knowledge="whitebox", **more):
        recogniser = Recogniser(defense.representation_shape, common=1.0)
        service = Service(defense, recogniser)
        adversary = make_adversary(defense, knowledge, **{"faces": blends(60), **more})
        weights = recogniser if Capability.RECOGNISER in GRANTS[Knowledge(knowledge)] else None
        return replace(adversary, embed=service.embed, recogniser=weights), service

    return make


def stolen(service, faces, k=1):
    templates = torch.stack([service.embed(faces / 255) for _ in range(k)], dim=1)
    return observe(service.defense, faces, k, templates=templates)


def fitted(scene, defense, knowledge="whitebox", *, adversary=None, **options):
    given, service = scene(defense, knowledge)
    attack = Template(TemplateOptions(**TINY | options))
    return attack, attack.learn(adversary or given), service


@pytest.mark.parametrize(
    ("rung", "used"),
    [
        (Knowledge.BLACKBOX, set()),
        (Knowledge.WHITEBOX, {Capability.RECOGNISER}),
        (Knowledge.ORACLE, {Capability.RECOGNISER, Capability.KEY}),
    ],
)
def test_every_rung_grants_what_it_needs_and_each_more_of_what_it_uses(rung, used):
    assert Template.needs <= GRANTS[rung]
    assert Template.uses & GRANTS[rung] == used


def test_whitening_gives_unit_variance_to_all_but_the_faintest_directions():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 0.3, 0.1, 1e-9])
    embeddings = torch.randn(4000, 4, generator=generator) * scales + torch.tensor([3.0, 0.0, 1.0, 2.0])
    decoder = TemplateDecoder(4, SIZE, 2)
    decoder.measure(embeddings)
    white = (embeddings - decoder.mean) @ decoder.whitening
    torch.testing.assert_close(white.var(dim=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("knowledge", ["blackbox", "whitebox"])
def test_it_recovers_faces_it_never_saw(scene, plain, knowledge):
    attack, report, service = fitted(scene, plain(image_size=SIZE), knowledge, images=2500, width=8)
    unseen = blends(20, seed=7)
    error = (attack.recover(stolen(service, unseen)) - unseen / 255).abs().mean()
    assert error < 0.6 * report.details["floor_loss"]
    assert report.curve[-1] == (2500, report.details["validation_loss"])


def test_templates_that_say_nothing_end_at_the_mean_face(scene, plain):
    class Nothing(plain):
        def transform(self, faces, state, generator):
            return torch.rand(faces.shape, generator=generator)

    attack, _, service = fitted(scene, Nothing(image_size=SIZE), images=1500)
    unseen = blends(40, seed=7)
    error = (attack.recover(stolen(service, unseen)) - unseen / 255).abs().mean()
    floor = (blends(60).float().mean(dim=0) / 255 - unseen / 255).abs().mean()
    assert 0.97 * floor < error < 1.25 * floor


def test_with_the_weights_it_asks_nothing_and_without_them_once_a_view(scene, plain):
    _, known, service = fitted(scene, plain(image_size=SIZE))
    assert (known.details["gradients"], known.details["queries"], service.queries) == (True, 0, 0)
    _, queried, service = fitted(scene, plain(image_size=SIZE), "blackbox")
    assert (queried.details["gradients"], queried.details["queries"]) == (False, 3 * 60)
    assert service.queries == 3 * 60 + 1  # one more for the size of an embedding


def test_the_identity_loss_brings_the_recovered_faces_nearer_to_the_template(scene, plain):
    unseen, cosines = blends(40, seed=7), []
    for weight in (0.0, 1.0):
        attack, _, service = fitted(scene, plain(image_size=SIZE), images=1000, identity_weight=weight)
        observation = stolen(service, unseen)
        again = service.embed(attack.recover(observation))
        # About the common direction, which all embeddings share.
        centre = observation.templates[:, 0].mean(dim=0)
        cosines.append(functional.cosine_similarity(again - centre, observation.templates[:, 0] - centre).mean())
    assert cosines[1] > cosines[0] + 0.02


def test_the_states_trained_on_are_reported_where_they_are_drawn_by_the_attack(scene, pick):
    defense = pick()
    assert torch.equal(fitted(scene, defense)[1].states_seen, defense.states())
    assert fitted(scene, defense, "blackbox")[1].states_seen is None


def test_several_templates_are_averaged_and_their_norm_says_nothing(scene, pick):
    attack, _, service = fitted(scene, pick())
    observation = stolen(service, blends(5, seed=7), k=3)
    mean = functional.normalize(observation.templates.mean(dim=1), dim=1)
    expected = attack.recover(
        replace(observation, representations=observation.representations[:, :1], templates=mean[:, None])
    )
    torch.testing.assert_close(attack.recover(observation), expected)
    louder = replace(observation, templates=observation.templates * torch.tensor([2.0, 5.0, 0.1]).view(1, 3, 1))
    torch.testing.assert_close(attack.recover(louder), expected)
    assert not torch.allclose(observation.templates[:, 0], observation.templates[:, 1])


def test_unusable_input_is_refused(scene, plain):
    attack, _, service = fitted(scene, plain(image_size=SIZE))
    observation = stolen(service, blends(3))
    for templates, message in (
        (None, "needs stolen templates"),
        (observation.templates[..., :-1], "of 20 values, got 19"),
        (observation.templates * float("nan"), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.recover(replace(observation, templates=templates))
