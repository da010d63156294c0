from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

import attacks.parts.generator
import attacks.parts.training
from attacks.parts.generator import (
    Critic,
    DecoderTraining,
    FaceDecoder,
    FaceGenerator,
    GeneratorOptions,
    TrainingPlan,
    build_generator,
    change_view,
    draw_views,
    fit_generator,
    hold_out,
)

SIZE = 16
TINY = {"latent_size": 8, "generator_width": 4, "generator_batch_size": 10, "generator_images": 200}


def blends(count, size=SIZE, seed=0):
    """uint8 (count, 3, size, size): blends of four random colours, which a small network can learn."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(corners, (size, size), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


@pytest.fixture
def fit(make_faces, fabric):
    """Trains a small generator; returns it and the report."""

    def run(*, seed=0, faces=None, size=SIZE, **options):
        chosen = GeneratorOptions(**{name: value for name, value in {**TINY, **options}.items() if name in FIELDS})
        others = {name: value for name, value in options.items() if name not in FIELDS}
        faces = make_faces(60, size) if faces is None else faces
        generator = build_generator(chosen, faces.shape[-1], seed)
        report = fit_generator(
            generator, faces, torch.arange(len(faces)) // 3, chosen, seed=seed, fabric=fabric, **others
        )
        return generator, report

    return run


@pytest.fixture
def simple(make_faces, fabric):
    """A training of a constant decoder, six steps long, whose loss a test multiplies."""

    class Simple(DecoderTraining):
        def loss(self, index, step):
            return (self.network(torch.zeros(len(index), 4)) - 0.5).square().mean() * self.factor(step)

        def recover(self, network, index):
            return network(torch.zeros(len(index), 4)), self.faces[index] / 255

    def make(factor):
        plan = TrainingPlan(images=60, batch_size=10, learning_rate=1e-3)
        network = FaceDecoder(4, SIZE, 2)
        training = Simple(network, make_faces(60), torch.arange(60) // 3, plan, seed=0, fabric=fabric)
        training.factor = factor
        return training

    return make


FIELDS = set(GeneratorOptions.model_fields)


# -- networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 9, 16, 20, 23, 32, 64, 112])
def test_any_size_is_decoded_and_encoded(size):
    generator = FaceGenerator(6, size, 2).eval()
    faces = generator(torch.randn(3, 6))
    assert faces.shape == (3, 3, size, size)
    assert faces.dtype == torch.float32
    assert generator.encode(faces).shape == (3, 6)
    assert Critic(size, 2)(faces).shape == (3,)


def test_an_untrained_decoder_returns_the_mean_face():
    decoder = FaceDecoder(5, SIZE, 4)
    mean = torch.rand(3, SIZE, SIZE) * 0.9 + 0.05
    decoder.set_mean(mean)
    torch.testing.assert_close(decoder(torch.randn(2, 5)), mean.expand(2, -1, -1, -1))


def test_faces_stay_in_range_and_are_differentiable_in_the_code():
    torch.manual_seed(0)
    generator = FaceGenerator(6, SIZE, 4).eval()
    nn.init.normal_(generator.decoder.head.weight, std=5.0)
    latent = (10 * torch.randn(4, 6)).requires_grad_()
    faces = generator(latent)
    low, high = faces.detach().aminmax()
    assert 0 <= float(low) < 0.05
    assert 0.95 < float(high) <= 1
    faces.sum().backward()
    assert (latent.grad.abs().sum(dim=1) > 0).all()


def test_weights_depend_on_the_seed_alone():
    options = GeneratorOptions(**TINY)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first, again, other = (build_generator(options, SIZE, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.posterior.weight, again.posterior.weight)
    assert not torch.equal(first.posterior.weight, other.posterior.weight)


# -- views --------------------------------------------------------------------------------------------


def test_a_view_that_changes_nothing(make_faces):
    faces = make_faces(4) / 255
    torch.testing.assert_close(change_view(faces, torch.tensor([[1.0, 1, 0, 0]]).expand(4, 4)), faces)


def test_mirror_and_shift_by_whole_pixels(make_faces):
    faces = make_faces(1) / 255
    mirrored = change_view(faces, torch.tensor([[-1.0, 1, 0, 0]]))
    torch.testing.assert_close(mirrored, faces.flip(-1))
    shifted = change_view(faces, torch.tensor([[1.0, 1, 2 * 3 / SIZE, -2 * 2 / SIZE]]))  # 3 right, 2 up
    torch.testing.assert_close(shifted[..., :-2, 3:], faces[..., 2:, :-3])
    torch.testing.assert_close(shifted[..., :-2, 0], faces[..., 2:, 0])  # the border is repeated
    both = change_view(faces, torch.tensor([[-1.0, 1, 2 * 3 / SIZE, 0]]))  # mirrored, then 3 right
    torch.testing.assert_close(both[..., 3:], faces.flip(-1)[..., :-3])


def test_zoom_enlarges_the_middle():
    square = torch.zeros(1, 3, SIZE, SIZE)
    square[..., 6:10, 6:10] = 1
    larger = change_view(square, torch.tensor([[1.0, 1.5, 0, 0]]))
    assert float(larger.sum()) == pytest.approx(1.5**2 * float(square.sum()), rel=0.1)


def test_drawn_views_keep_to_their_bounds_and_are_differentiable(make_faces):
    views = draw_views(400, torch.Generator().manual_seed(0), shift=0.1, size=SIZE)
    assert 0.4 < float((views[:, 0] < 0).float().mean()) < 0.6
    assert (views[:, 1] == 1).all()
    pixels = views[:, 2:] * SIZE / 2
    torch.testing.assert_close(pixels, pixels.round())
    assert float(pixels.abs().max()) == 2  # 1.6 pixels, rounded
    zoomed = draw_views(400, torch.Generator().manual_seed(0), shift=0.1, zoom=0.2, size=SIZE)
    assert 0.8 <= float(zoomed[:, 1].min()) < 0.85
    assert 1.15 < float(zoomed[:, 1].max()) <= 1.2
    faces = (make_faces(400) / 255).requires_grad_()
    changed = change_view(faces, zoomed)
    assert 0 <= float(changed.detach().min()) <= float(changed.detach().max()) <= 1 + 1e-6
    changed.sum().backward()
    assert (faces.grad.sum(dim=(1, 2, 3)) > 0).all()


# -- training -----------------------------------------------------------------------------------------


def test_it_reconstructs_faces_it_never_saw(fit):
    options = {"latent_size": 16, "generator_width": 8, "generator_images": 2500, "generator_learning_rate": 5e-3}
    generator, report = fit(faces=blends(150), **options, generator_kl=3e-4)
    unseen = blends(20, seed=7) / 255
    with torch.no_grad():
        error = (generator(generator.encode(unseen)) - unseen).abs().mean()
    assert error < 0.6 * report.details["floor_loss"]
    assert report.details["validation_loss"] == report.curve[-1][1] < 0.6 * report.details["floor_loss"]
    assert [images for images, _ in report.curve] == sorted(images for images, _ in report.curve)
    assert report.curve[-1][0] == 2500


def test_a_heavy_divergence_keeps_the_codes_at_the_prior(fit, make_faces):
    unseen = make_faces(20, seed=7) / 255
    generators = [fit(generator_kl=weight, generator_images=1000)[0] for weight in (10.0, 0.0)]
    with torch.no_grad():
        heavy, light = (generator.distribution(unseen) for generator in generators)
    assert float(heavy[0].abs().mean()) < 0.2 < float(light[0].abs().mean())
    assert float(heavy[1].abs().mean()) < 0.2  # unit variance


@pytest.mark.parametrize("adversarial", [0.0, 0.01])
def test_same_seed_same_weights_and_another_seed_others(fit, adversarial):
    torch.manual_seed(0)
    first, report = fit(generator_images=100, adversarial=adversarial)
    torch.manual_seed(1)  # the global generator plays no part
    expected = torch.rand(2)
    torch.manual_seed(1)
    again, same = fit(generator_images=100, adversarial=adversarial)
    assert torch.equal(torch.rand(2), expected)
    other, _ = fit(generator_images=100, adversarial=adversarial, seed=1)
    assert report.curve == same.curve
    weights = first.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    assert not torch.equal(first.decoder.head.weight, other.decoder.head.weight)


def test_the_critic_plays_a_part_and_leaves_the_generator_trainable(fit):
    plain, _ = fit(generator_images=100)
    opposed, _ = fit(generator_images=100, adversarial=1.0)
    assert not torch.equal(plain.decoder.head.weight, opposed.decoder.head.weight)
    assert all(weight.requires_grad for weight in opposed.parameters())


def test_a_trained_critic_tells_real_from_made_faces(make_faces, fabric):
    """The critic's own loss falls below zero: its estimate of the distance becomes positive."""
    options = GeneratorOptions(**TINY | {"adversarial": 0.01})
    faces, identities = make_faces(60), torch.arange(60) // 3
    critic = Critic(SIZE, 8)
    training = attacks.parts.generator._GeneratorTraining(
        options,
        build_generator(options, SIZE, 0),
        faces,
        identities,
        TrainingPlan(images=1, batch_size=20, learning_rate=1e-3),
        seed=0,
        fabric=fabric,
        critic=critic,
    )
    training.network.train()
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss = training.critic_loss(training.training[:20], step)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < -0.05
    assert all(weight.grad is None for weight in training.network.parameters())


def test_held_out_identities_are_those_of_the_training(make_faces, fabric):
    identities = torch.arange(60) // 3
    plan = TrainingPlan(images=1000, batch_size=10, learning_rate=1e-3, validation=0.25)
    training = attacks.parts.generator._GeneratorTraining(
        GeneratorOptions(**TINY),
        build_generator(GeneratorOptions(**TINY), SIZE, 0),
        make_faces(60),
        identities,
        plan,
        seed=3,
        fabric=fabric,
    )
    known, held_out = hold_out(identities, 0.25, 3)
    assert torch.equal(training.training, known)
    assert sorted(training.held_out.tolist()) == held_out.tolist()
    assert not set(identities[known].tolist()) & set(identities[held_out].tolist())


def test_a_few_steps_are_flagged_unsaturated(fit):
    _, report = fit(generator_images=60, generator_learning_rate=1e-9)
    assert report.saturated is False
    assert report.details["steps"] == 6


def test_progress_is_reported(fit):
    seen = []
    fit(report=lambda done, total, **fields: seen.append((done, total, fields)))
    assert seen[-1][:2] == (200, 200)
    assert seen[-1][2].keys() == {"loss", "images_per_second"}


def test_a_loss_that_is_not_finite_names_the_step(simple):
    with pytest.raises(FloatingPointError, match=r"step 4.*learning rate"):
        simple(lambda step: torch.tensor(float("nan") if step == 3 else 1.0)).run("trial", fit={})


def test_one_identity_is_too_few(make_faces, fabric):
    options = GeneratorOptions(**TINY)
    generator = build_generator(options, SIZE, 0)
    with pytest.raises(ValueError, match="at least 2"):
        fit_generator(generator, make_faces(5), torch.zeros(5, dtype=torch.int64), options, seed=0, fabric=fabric)


class Killed(Exception):
    pass


@pytest.mark.parametrize("adversarial", [0.0, 0.01])
@pytest.mark.parametrize("stop", [3, 20])
def test_a_resumed_training_equals_an_unbroken_one(fit, tmp_path, monkeypatch, stop, adversarial):
    monkeypatch.setattr(attacks.parts.training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    unbroken, expected = fit(adversarial=adversarial)
    calls = itertools.count(1)

    def report(done, total, **fields):
        if next(calls) == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(adversarial=adversarial, folder=tmp_path, report=report)
    done = []
    resumed, actual = fit(adversarial=adversarial, folder=tmp_path, report=lambda n, total, **f: done.append(n))
    assert done[0] == stop * 10  # the step that was killed, and none before it
    assert actual.curve == expected.curve
    assert actual.saturated == expected.saturated
    weights = resumed.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in unbroken.state_dict().items())


def test_the_checkpoint_of_another_training_is_refused(fit, tmp_path):
    fit(folder=tmp_path)
    for change in ({"generator_kl": 0.5}, {"seed": 1}, {"generator_images": 210}):
        with pytest.raises(ValueError, match="another fit"):
            fit(folder=tmp_path, **change)


def test_states_are_noted_once_each(simple):
    training = simple(lambda step: training.seen.add(torch.tensor([[step % 3, 0], [1, 1]])) or torch.ones(()))
    report = training.run("trial", fit={})
    assert report.states_seen.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0]]


# -- input checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"latent_size": 1},
        {"generator_width": 0},
        {"generator_images": 0},
        {"generator_learning_rate": float("inf")},
        {"adversarial": -1},
        {"generator_validation": 1.0},
        {"width": 8},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        GeneratorOptions.model_validate(wrong)
