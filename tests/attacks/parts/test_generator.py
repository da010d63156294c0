from __future__ import annotations

import pytest
import torch
from pictures import blends
from torch import nn

from attacks.parts.generator import (
    Critic,
    FaceDecoder,
    FaceGenerator,
    GeneratorLosses,
    GeneratorOptions,
    build_generator,
    change_view,
    draw_views,
    fit_generator,
)

SIZE = 16
TINY = {"latent_size": 8, "generator_width": 4, "generator_batch_size": 10, "generator_images": 200}


@pytest.fixture
def fit(make_adversary, plain):
    """Trains a small generator; returns it and the report."""

    def run(*, seed=0, faces=None, **options):
        chosen = GeneratorOptions(**TINY | options)
        generator = build_generator(chosen, SIZE, seed)
        trainer = chosen.trainer(make_adversary(plain(image_size=SIZE), faces=faces), seed)
        return generator, fit_generator(generator, trainer, chosen)

    return run


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


def test_the_critic_plays_a_part_and_leaves_the_generator_trainable(fit):
    plain, _ = fit(generator_images=100)
    opposed, _ = fit(generator_images=100, adversarial=1.0)
    assert not torch.equal(plain.decoder.head.weight, opposed.decoder.head.weight)
    assert all(weight.requires_grad for weight in opposed.parameters())


def test_a_trained_critic_tells_real_from_made_faces(make_adversary, plain):
    """The critic's own loss falls below zero: its estimate of the distance becomes positive."""
    options = GeneratorOptions(**TINY | {"adversarial": 0.01})
    trainer = options.trainer(make_adversary(plain(image_size=SIZE)), 0)
    losses = GeneratorLosses(options, trainer, build_generator(options, SIZE, 0), Critic(SIZE, 8))
    losses.network.train()
    optimizer = torch.optim.Adam(losses.critic.parameters(), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss = losses.rival(step)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < -0.05
    assert all(weight.grad is None for weight in losses.network.parameters())
