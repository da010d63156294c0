"""The synthetic dataset: determinism, ranges, independence of the batch, difficulty, identity signal."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from bench.data.synthetic import (
    Identities,
    SyntheticOptions,
    draw_conditions,
    draw_identities,
    load_synthetic,
    render,
    renderer,
)
from bench.data.synthetic.geometry import Camera, intersect, relief, spot
from bench.data.synthetic.parameters import bell, draw, uniform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(n):
    """People, and the circumstances of a picture of each."""
    return draw_identities(n, generator(1)), draw_conditions(n, generator(2))


def faces_of(identities=2, each=2, size=32, **options):
    """The faces of a small dataset, uint8 (N, 3, size, size)."""
    options = SyntheticOptions(identities=identities, images_per_identity=each, image_size=size, **options)
    return load_synthetic(options).faces.images


def neutral(table):
    """Conditions of a frontal, expressionless picture in even light."""
    values = table.values.clone()
    rest = dict.fromkeys(("scale", "eye_open", "glasses_on", "saturation", "contrast"), 1.0) | {
        "key": 0.6,
        "ambient": 0.5,
    }
    for name, column in table.columns.items():
        if not name.startswith("back"):
            values[:, column] = rest.get(name, 0.0)
    return type(table)(values, table.columns)


@pytest.fixture(scope="module")
def dataset():
    """60 people in 6 pictures of 48 pixels."""
    return load_synthetic(SyntheticOptions(identities=60, images_per_identity=6, image_size=48, seed=3)).faces


def verification_accuracy(features, labels, pairs=3000):
    """Best-threshold accuracy of cosine similarity over balanced genuine and impostor pairs."""
    rng = np.random.default_rng(0)
    labels = labels.numpy()
    first, second = rng.integers(0, len(labels), (2, 60 * pairs))
    distinct = first != second
    first, second = first[distinct], second[distinct]
    same = labels[first] == labels[second]
    chosen = np.concatenate([np.flatnonzero(same)[:pairs], np.flatnonzero(~same)[:pairs]])
    count = min(int(same[chosen].sum()), pairs)
    unit = F.normalize(features.flatten(1).double(), dim=1)
    score = (unit[first[chosen]] * unit[second[chosen]]).sum(1).numpy()
    genuine, impostor = score[same[chosen]][:count], score[~same[chosen]][:count]
    assert count > 1000
    thresholds = np.sort(np.concatenate([genuine, impostor]))
    accepted = 1 - np.searchsorted(np.sort(genuine), thresholds) / count
    rejected = np.searchsorted(np.sort(impostor), thresholds) / count
    return float(((accepted + rejected) / 2).max())


def test_source_is_labelled_synthetic_and_grouped_by_identity():
    source = load_synthetic(SyntheticOptions(identities=3, images_per_identity=2, image_size=32))
    assert source.name == "synthetic"
    assert source.synthetic
    assert source.victims is None
    assert source.faces.names == ("synthetic-000000", "synthetic-000001", "synthetic-000002")
    assert source.faces.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.faces.images.shape == (6, 3, 32, 32)
    assert source.faces.images.dtype == torch.uint8
    assert source.details == {"identities": 3, "images_per_identity": 2, "image_size": 32, "seed": 0}


def test_same_seed_same_faces_other_seed_other_faces():
    once, again, other = (faces_of(seed=seed) for seed in (5, 5, 6))
    assert torch.equal(once, again)
    assert (once.float() - other.float()).abs().mean() > 10


def test_more_identities_or_pictures_leave_the_first_as_they_were():
    few, more = faces_of(2, 2), faces_of(5, 3)
    kept = more.view(5, 3, 3, 32, 32)[:2, :2].flatten(0, 1)
    assert (few.int() - kept.int()).abs().max() <= 1


@pytest.mark.parametrize("draw_rows", [draw_identities, draw_conditions])
def test_draws_are_prefix_stable(draw_rows):
    few, many = draw_rows(3, generator(9)), draw_rows(200, generator(9))
    assert torch.equal(few.values, many.values[:3])
    assert few.columns == many.columns
    assert many.values.isfinite().all()
    assert not torch.equal(many.values[0], many.values[1])


def test_render_gives_floats_in_range_that_are_neither_flat_nor_clipped():
    faces = render(*drawn(24), 64)
    assert faces.dtype == torch.float32
    assert faces.shape == (24, 3, 64, 64)
    assert faces.isfinite().all()
    assert faces.min() >= 0
    assert faces.max() <= 1
    assert faces.flatten(1).std(dim=1).min() > 0.04
    assert ((faces == 0) | (faces == 1)).float().mean() < 0.03


def test_a_face_does_not_depend_on_its_batch():
    identities, conditions = drawn(12)
    together = render(identities, conditions, 48)
    for i in (0, 5, 11):
        alone = render(identities.rows(slice(i, i + 1)), conditions.rows(slice(i, i + 1)), 48)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-4)


def test_chunks_report_progress_and_change_nothing(monkeypatch):
    identities, conditions = drawn(5)
    whole = render(identities, conditions, 32)
    monkeypatch.setattr(renderer, "_PIXELS_AT_ONCE", 2 * 48 * 48)
    seen = []
    pieces = render(identities, conditions, 32, report=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-4)


def test_pixels_do_not_verify_faces(dataset):
    pixels = dataset.images.float() / 255
    for features in (pixels, pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)):
        assert verification_accuracy(features, dataset.labels) < 0.75


def test_identity_shows_in_frontal_even_light():
    # The same people that pixels do not tell apart in the dataset: the rest is nuisance.
    identities = draw_identities(40, generator(1))
    people = identities.rows(torch.arange(40).repeat_interleave(6))
    conditions = neutral(draw_conditions(240, generator(2)))  # backgrounds still differ
    faces = render(people, conditions, 48)[:, :, 8:44, 8:40]
    assert verification_accuracy(faces - faces.mean(dim=0), torch.arange(40).repeat_interleave(6)) > 0.92


def test_eyes_of_a_neutral_face_sit_on_the_arcface_template():
    identities = draw_identities(64, generator(4))
    frontal = neutral(draw_conditions(64, generator(2)))
    assert identities["eye_x"].mean() == pytest.approx((73.53 - 38.29) / 2 / 56, abs=0.01)
    assert identities["eye_y"].mean() == pytest.approx(51.6 / 56 - 1, abs=0.01)
    assert identities["mouth_y"].mean() == pytest.approx(92.3 / 56 - 1, abs=0.03)
    values = identities.values.clone()
    values[:, identities.columns["glasses"]] = 0
    faces = render(Identities(values, identities.columns), frontal, 112)
    darkness = 1 - faces.mean(dim=(0, 1))
    left_eye, cheek = darkness[49:55, 35:41].mean(), darkness[60:66, 35:41].mean()
    assert left_eye > cheek + 0.05
    mirrored = darkness[49:55, 71:77].mean()
    assert mirrored == pytest.approx(float(left_eye), abs=0.03)


def test_pose_is_a_rotation_about_the_pivot():
    conditions = draw_conditions(16, generator(3))
    camera = Camera.of(conditions)
    rotation = torch.stack([torch.cat(row, dim=2) for row in camera.rotation], dim=2)[:, 0]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(16, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(16), atol=1e-5, rtol=0)


def test_rays_meet_the_implicit_surface():
    identities, conditions = drawn(6)
    conditions = neutral(conditions)
    conditions.values[:, conditions.columns["yaw"]] = torch.linspace(-0.4, 0.4, 6)
    camera = Camera.of(conditions)
    axis = torch.linspace(-0.25, 0.25, 24)
    px, py = axis.expand(6, 24, 24), (axis[:, None] * 1.5).expand(6, 24, 24)
    surface = intersect(identities, conditions, camera, px, py, steps=30)
    # The point projects back onto its pixel ...
    u, v = camera.project(surface.x, surface.y, surface.z)
    torch.testing.assert_close(u, px, atol=1e-4, rtol=0)
    torch.testing.assert_close(v, py, atol=1e-4, rtol=0)
    # ... and few steps already come close to the converged solution.
    quick = intersect(identities, conditions, camera, px, py)
    assert (quick.z - surface.z).abs().median() < 5e-3
    assert surface.inside.min() > 0


def test_rays_miss_below_the_chin_and_beside_the_head():
    identities, conditions = drawn(8)
    conditions = neutral(conditions)
    px = torch.tensor([0.0, 0.0, 1.1]).expand(8, 1, 3)
    py = torch.tensor([0.2, 1.3, 0.0]).expand(8, 1, 3) - 0.2
    inside = intersect(identities, conditions, Camera.of(conditions), px, py).inside[:, 0]
    assert (inside[:, 0] > 0.5).all()
    assert (inside[:, 1:] < 0).all()


def test_relief_has_a_nose_that_stands_out_and_eyes_that_lie_deep():
    identities, conditions = drawn(50)
    conditions = neutral(conditions)

    def height(x, y):
        return relief(identities, conditions, x, y)[:, 0, 0]

    tip = height(identities["nose_skew"], identities["nose_tip_y"])
    eye = height(identities["eye_x"] * 0.9, identities["eye_y"] + 0.05)
    assert (tip > 0.12).all()
    assert (eye < tip - 0.12).all()


def test_laws_have_the_stated_range_and_moments():
    values = draw({"u": uniform(2, 5), "b": bell(1.0, 0.5)}, 20000, generator())
    assert values["u"].min() >= 2
    assert values["u"].max() < 5
    assert values["u"].mean() == pytest.approx(3.5, abs=0.05)
    assert values["b"].mean() == pytest.approx(1.0, abs=0.02)
    assert (values["b"] - 1).abs().max() <= 1.0 + 1e-3
    assert values["b"].std() == pytest.approx(0.44, abs=0.02)  # a normal cut at two deviations has .88 of its own


def test_spot_follows_the_gaussian_and_ends():
    x = torch.linspace(0, 4, 101)
    value = spot(x, torch.zeros_like(x))
    assert (value - torch.exp(-x.square())).abs().max() < 0.05
    assert (value[x.square() > 8] == 0).all()


@pytest.mark.parametrize(
    "change", [{"identities": 0}, {"images_per_identity": 0}, {"image_size": 8}, {"seed": -1}], ids=str
)
def test_options_out_of_range_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        SyntheticOptions(**{"identities": 2, "images_per_identity": 2, **change})


def test_rows_must_pair_up_and_sizes_make_sense():
    identities, conditions = draw_identities(2, generator()), draw_conditions(3, generator())
    with pytest.raises(ValueError, match="2 and 3 rows"):
        render(identities, conditions, 32)
    with pytest.raises(ValueError, match="at least 16"):
        render(identities, conditions.rows(slice(0, 2)), 8)
    for draw_rows in (draw_identities, draw_conditions):
        with pytest.raises(ValueError, match="at least 1"):
            draw_rows(0, generator())
