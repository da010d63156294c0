from __future__ import annotations

import math

import pytest
import torch

from attacks.parts.eigenfaces import Eigenfaces, LatentScores, directions

SIZE = 16


def fitted(faces, components, seed=0):
    prior = Eigenfaces(components, faces.shape[-1])
    prior.fit(faces, torch.Generator().manual_seed(seed))
    return prior


def with_mirrors(faces):
    """float64 (2 M, 3 H W) in [0, 1]."""
    return torch.cat((faces, faces.flip(-1))).double().flatten(1) / 255


def test_components_are_the_principal_axes_of_the_faces_and_their_mirror_images(make_faces):
    faces = make_faces(50)
    prior = fitted(faces, 20)
    exact = with_mirrors(faces)
    exact = exact - exact.mean(dim=0)
    _, singular, axes = torch.linalg.svd(exact, full_matrices=False)
    components = prior.components.flatten(1).double()
    torch.testing.assert_close(components.norm(dim=1), singular[:20] / math.sqrt(len(exact)), rtol=5e-3, atol=0)
    torch.testing.assert_close(components @ components.T, torch.diag(components.square().sum(1)), rtol=0, atol=1e-4)
    # Each axis lies in the space of the exact ones (of equal variance they may be turned, hence a few more).
    unit = components / components.norm(dim=1, keepdim=True)
    assert (unit @ axes[:24].T).norm(dim=1).min() > 0.99
    share = singular[:20].square().sum() / singular.square().sum()
    assert float(prior.explained) == pytest.approx(float(share), rel=1e-3)


def test_latents_of_the_faces_have_mean_zero_and_variance_one(make_faces):
    faces = make_faces(80)
    latents = fitted(faces, 12).project(with_mirrors(faces).float().view(-1, 3, SIZE, SIZE))
    torch.testing.assert_close(latents.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.var(dim=0, correction=0), torch.ones(12), rtol=0, atol=1e-3)


def test_the_prior_is_symmetric(make_faces):
    faces = make_faces(30)
    faces[..., :4] = 0  # as if everybody were lit from the right
    prior = fitted(faces, 59)
    assert torch.equal(prior.mean, prior.mean.flip(-1))
    mirrored = prior(prior.project(faces.flip(-1) / 255))
    torch.testing.assert_close(mirrored, faces.flip(-1) / 255, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.2])
def test_small_latents_are_found_again_in_their_face(make_faces, scale):
    prior = fitted(make_faces(60), 24)
    latents = scale * torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    faces = prior(latents)
    assert faces.min() > 0  # else clipping, which no projection undoes
    assert faces.max() < 1
    torch.testing.assert_close(prior.project(faces), latents, rtol=0, atol=1e-3)


def test_projecting_is_least_squares(make_faces):
    prior = fitted(make_faces(60), 10)
    face = make_faces(1, seed=5) / 255
    best = prior.project(face)
    expected = torch.linalg.lstsq(prior.components.flatten(1).T, (face - prior.mean).flatten(1).T).solution.T
    torch.testing.assert_close(best, expected, rtol=1e-3, atol=1e-3)


def test_faces_are_clipped_and_keep_leading_dimensions(make_faces):
    prior = fitted(make_faces(20), 8)
    faces = prior(50 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert faces.shape == (2, 5, 3, SIZE, SIZE)
    assert (faces.min(), faces.max()) == (0, 1)


def test_no_more_components_than_the_faces_span(make_faces):
    faces = make_faces(5)
    assert Eigenfaces.rank(faces, 128) == 9
    assert Eigenfaces.rank(faces, 4) == 4
    assert Eigenfaces.rank(faces[:, :, :1, :1], 128) == 3
    prior = fitted(faces, 12)
    assert (prior.components.flatten(1).norm(dim=1) > 0).sum() <= 9
    assert float(prior.explained) == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(prior.project(faces / 255)).all()


def test_faces_that_are_all_the_same_have_no_components():
    prior = fitted(torch.full((4, 3, SIZE, SIZE), 51, dtype=torch.uint8), 5)
    assert not prior.components.any()
    torch.testing.assert_close(prior(torch.ones(1, 5)), torch.full((1, 3, SIZE, SIZE), 0.2))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4, 3, 16, 16), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 16, 16).byte()]
)
def test_unusable_faces_are_refused(wrong):
    with pytest.raises(ValueError, match="uint8"):
        Eigenfaces(4, SIZE).fit(wrong, torch.Generator())


@pytest.mark.parametrize(("components", "size"), [(0, 16), (4, 0), (13, 2)])
def test_impossible_sizes_are_refused(components, size):
    with pytest.raises(ValueError, match="components"):
        Eigenfaces(components, size)


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    drawn = directions(50, 20, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 20)
    for block in drawn.split(20):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-4)
    many = directions(4000, 20, torch.Generator().manual_seed(1))
    assert float(many.square().sum(dim=1).mean()) == pytest.approx(20, rel=0.02)
    assert float(many.square().sum(dim=1).var()) == pytest.approx(40, rel=0.1)  # chi-squared with 20 degrees
    torch.testing.assert_close(many.T @ many / 4000, torch.eye(20), rtol=0, atol=0.1)


class Recorder:
    """Answers with the mean brightness of a face plus a hundred times the person's number."""

    def __init__(self):
        self.calls = []

    def __call__(self, faces, persons):
        self.calls.append(len(faces))
        return faces.mean(dim=(1, 2, 3)) + 100 * persons


def test_scores_come_back_to_the_victim_and_candidate_they_belong_to(make_faces):
    prior, service = fitted(make_faces(20), 4), Recorder()
    scores = LatentScores(prior, service, 3, queries=10, chunk=4)
    latents = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = prior(latents).mean(dim=(2, 3, 4)) + 100 * torch.arange(3)[:, None]
    torch.testing.assert_close(scores(latents), expected)
    assert service.calls == [4, 4, 4, 3]
    assert scores.left == 5


def test_the_budget_is_a_wall(make_faces):
    service = Recorder()
    scores = LatentScores(fitted(make_faces(20), 4), service, 2, queries=3, chunk=64)
    scores(torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="within the 1"):
        scores(torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="of 1 victims"):
        scores(torch.zeros(1, 1, 4))
    assert sum(service.calls) == 4


def test_scores_that_are_not_finite_are_refused(make_faces):
    scores = LatentScores(
        fitted(make_faces(20), 4), lambda faces, persons: torch.full((len(faces),), torch.nan), 1, queries=3, chunk=64
    )
    with pytest.raises(ValueError, match="not finite"):
        scores(torch.zeros(1, 1, 4))


def test_repeating_a_query_measures_its_noise(make_faces):
    draws = torch.Generator().manual_seed(0)

    def service(faces, persons):
        return 0.25 + persons * 0.1 * torch.randn(len(faces), generator=draws)

    prior = fitted(make_faces(20), 4)
    scores = LatentScores(prior, service, 500, queries=1000, chunk=4096)
    level, variance = scores.at(torch.zeros(500, 4))
    assert level.shape == variance.shape == (500, 1)
    assert scores.left == 992
    assert float(variance[0]) == 0
    assert float((variance[1:, 0] / (0.1 * torch.arange(1, 500)).square()).mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("queries", "spent"), [(1, 1), (31, 1), (32, 2), (64, 4), (10_000, 8)])
def test_noise_is_measured_with_a_small_share_of_the_budget(make_faces, queries, spent):
    scores = LatentScores(fitted(make_faces(20), 4), Recorder(), 2, queries=queries, chunk=64)
    _, variance = scores.at(torch.zeros(2, 4))
    assert queries - scores.left == spent
    assert not variance.any()
