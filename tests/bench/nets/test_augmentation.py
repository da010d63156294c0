from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.nets.augmentation import augment
from bench.nets.options import AugmentationOptions

OFF = {"flip": 0.0}


def run(faces: Tensor, seed: int = 0, **options: float) -> Tensor:
    return augment(faces, AugmentationOptions(**{**OFF, **options}), torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(3))


EVERYTHING = {
    "flip": 0.5,
    "shift": 0.1,
    "zoom": 0.2,
    "rotation": 15.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.5,
    "grey": 0.2,
    "erase": 0.5,
}


def test_nothing_switched_on_changes_nothing(images: Tensor) -> None:
    assert torch.equal(run(images), images)


def test_everything_switched_on_stays_in_range_and_leaves_the_input_alone(images: Tensor) -> None:
    before = images.clone()
    varied = run(images, **EVERYTHING)
    assert varied.shape == images.shape
    assert 0 <= float(varied.min()) <= float(varied.max()) <= 1
    assert torch.equal(images, before)
    assert torch.equal(run(images, **EVERYTHING), varied)
    assert not torch.equal(run(images, 1, **EVERYTHING), varied)


def test_images_are_varied_independently(images: Tensor) -> None:
    same = images[:1].expand(64, -1, -1, -1)
    varied = run(same, **EVERYTHING)
    assert len(torch.unique(varied.flatten(1), dim=0)) == 64


def test_options_do_not_shift_the_draws_that_follow(images: Tensor) -> None:
    ends = []
    for options in (OFF, EVERYTHING):
        generator = torch.Generator().manual_seed(0)
        augment(images, AugmentationOptions(**options), generator)
        ends.append(torch.rand(1, generator=generator))
    assert torch.equal(*ends)


def test_flip_mirrors_the_share_asked_for(images: Tensor) -> None:
    assert torch.equal(run(images, flip=1.0), images.flip(-1))
    half = run(images, flip=0.5)
    mirrored = (half == images.flip(-1)).flatten(1).all(1)
    kept = (half == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 20 <= int(mirrored.sum()) <= 44


def test_flip_and_geometry_share_their_draws(images: Tensor) -> None:
    # The same flips, whether done by indexing or by resampling; a zoom this small moves nothing visibly.
    by_index, by_grid = run(images, flip=0.5), run(images, flip=0.5, zoom=1e-7)
    torch.testing.assert_close(by_index, by_grid, rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", [2, 3])
def test_shift_moves_by_up_to_the_share_asked_for(axis: int) -> None:
    ramp = torch.linspace(0, 1, 33).view(*([1] * axis), 33, *([1] * (3 - axis))).expand(400, 3, 33, 33)
    middle = run(ramp, shift=0.25)[:, 0, 16, 16]
    moved = (middle - 0.5) * 32 / 33  # in image sides
    assert float(moved.abs().max()) <= 0.25 + 1e-5
    assert float(moved.max()) > 0.22
    assert float(moved.min()) < -0.22


def test_zoom_changes_size_by_up_to_the_factor_asked_for() -> None:
    disc = torch.zeros(400, 3, 65, 65)
    disc[:, :, 22:43, 22:43] = 1  # a square of 21 pixels
    side = run(disc, zoom=0.5)[:, 0].sum((1, 2)).sqrt() / 21
    assert float(side.max()) == pytest.approx(1.5, abs=0.03)
    assert float(side.min()) == pytest.approx(1 / 1.5, abs=0.03)
    assert float(side.log().mean()) == pytest.approx(0, abs=0.05)


def test_rotation_turns_a_bar_without_changing_its_length() -> None:
    bar = torch.zeros(300, 3, 65, 65)
    bar[:, :, 30:35, 10:55] = 1
    turned = run(bar, rotation=30.0)[:, 0]
    assert float((turned.sum((1, 2)) / bar[0, 0].sum() - 1).abs().max()) < 0.05
    grid = torch.arange(65.0) - 32
    mass = turned.sum((1, 2))
    xx, yy, xy = (
        (turned * weight).sum((1, 2)) / mass for weight in (grid**2, (grid**2).unsqueeze(1), grid.unsqueeze(1) * grid)
    )
    angle = torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))
    assert float(angle.abs().max()) == pytest.approx(30, abs=1)
    assert float(angle.min()) < -27


def test_brightness_adds_up_to_what_was_asked_for() -> None:
    moved = run(torch.full((400, 3, 4, 4), 0.5), brightness=0.3) - 0.5
    assert float(moved.flatten(1).std(1).max()) < 1e-6
    assert float(moved.max()) == pytest.approx(0.3, abs=0.01)
    assert float(moved.min()) == pytest.approx(-0.3, abs=0.01)


def test_contrast_scales_around_the_mean() -> None:
    faces = torch.tensor([0.4, 0.6]).repeat(8).expand(400, 3, 4, 16).clone()
    varied = run(faces, contrast=0.5)
    torch.testing.assert_close(varied.mean((1, 2, 3)), torch.full((400,), 0.5))
    factor = (varied[..., 1] - varied[..., 0])[:, 0, 0] / 0.2
    assert float(factor.max()) == pytest.approx(1.5, abs=0.02)
    assert float(factor.min()) == pytest.approx(0.5, abs=0.02)


def test_saturation_and_grey_keep_luma(images: Tensor) -> None:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    muted = 0.4 + 0.2 * images  # far from clipping
    for options in ({"saturation": 0.5}, {"grey": 1.0}):
        varied = run(muted, **options)
        torch.testing.assert_close((varied * weights).sum(1), (muted * weights).sum(1), rtol=0, atol=1e-5)
        assert not torch.allclose(varied, muted)
    grey = run(muted, grey=1.0)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], rtol=0, atol=1e-6)


def test_erase_covers_one_rectangle_of_at_most_the_area() -> None:
    varied = run(torch.ones(300, 3, 40, 40), erase=0.7, erase_area=0.2)
    covered = varied[:, 0] == 0.5
    assert torch.equal(covered.unsqueeze(1).expand_as(varied), varied == 0.5)
    share = covered.float().mean((1, 2))
    assert 0.18 < float(share.max()) < 0.23
    assert 0.6 < float(covered.flatten(1).any(1).float().mean()) < 0.8
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(rows * columns, covered.sum((1, 2)))
