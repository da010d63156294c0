import pytest
import torch
from pictures import smooth

from attacks.parts.gaussian_prior import NEIGHBOURS, BlockTridiagonal, GaussianPrior


@pytest.fixture
def matrix():
    """A positive definite block-tridiagonal matrix of 4 blocks of 3 rows, and the same one dense."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    roots = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    diagonal = roots @ roots.mT + 8 * torch.eye(3, dtype=torch.float64)
    dense = torch.block_diag(*diagonal)
    for index in range(3):
        below, here = slice(3 * index + 3, 3 * index + 6), slice(3 * index, 3 * index + 3)
        dense[below, here], dense[here, below] = lower[index], lower[index].T
    return BlockTridiagonal(diagonal, lower), dense


def test_product_is_that_of_the_dense_matrix(matrix):
    blocks, dense = matrix
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(blocks @ x, dense @ x)


def test_solution_is_that_of_the_dense_matrix(matrix):
    blocks, dense = matrix
    right = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = right.clone()
    torch.testing.assert_close(blocks.cholesky().solve(right), torch.linalg.solve(dense, right))
    assert torch.equal(right, kept)


def test_draws_have_the_inverse_as_their_covariance(matrix):
    blocks, dense = matrix
    drawn = blocks.cholesky().draw(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(drawn @ drawn.T, torch.linalg.inv(dense))


def test_one_block_is_a_dense_matrix():
    block = BlockTridiagonal(4 * torch.eye(2, dtype=torch.float64)[None], torch.zeros(0, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(
        block.cholesky().solve(torch.ones(2, 1, dtype=torch.float64)).flatten(), torch.full((2,), 0.25).double()
    )


def test_a_matrix_that_is_not_positive_definite_is_refused(matrix):
    blocks, _ = matrix
    with pytest.raises(ArithmeticError, match="positive definite"):
        blocks.plus(blocks, -2.0).cholesky()


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"m - 1, B, B"):
        BlockTridiagonal(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3))


SIZE = 10


def fitted(colour=None, rank=6, count=400, **options):
    prior = GaussianPrior(SIZE, rank)
    colour = torch.eye(3, dtype=torch.float64) if colour is None else colour
    details = prior.fit(
        smooth(count, SIZE), torch.arange(count) // 4, colour, 0, **{"held_out": 0.25, "most": 400, **options}
    )
    return prior, details


@pytest.fixture(scope="module")
def prior():
    return fitted()[0]


def test_planes_whiten_colours_and_separate_what_the_defence_shows():
    colour = torch.tensor([[0.3, 0.6, 0.1], [-0.2, -0.3, 0.5], [0.5, -0.4, -0.1]], dtype=torch.float64)
    prior, _ = fitted(colour)
    turned = colour @ torch.linalg.inv(prior.planes)
    torch.testing.assert_close(turned.T @ turned, torch.diag(prior.strengths), rtol=1e-6, atol=1e-9)
    faces = torch.einsum("pc,nchw->nphw", prior.planes, smooth(400, SIZE).double() / 255)
    centred = (faces - faces.mean(0)).transpose(0, 1).flatten(1)
    covariance = centred @ centred.T / centred.shape[1]
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.1)


def test_a_colour_that_is_not_sent_has_no_strength():
    prior, _ = fitted(torch.tensor([[0.3, 0.6, 0.1]], dtype=torch.float64))
    assert sorted((prior.strengths > 0).tolist()) == [False, False, True]


def test_to_faces_undoes_the_planes(prior):
    faces = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    planes = torch.einsum("pc,nchw->nphw", prior.planes, faces)
    torch.testing.assert_close(prior.to_faces(planes), faces)


def test_components_are_orthonormal_and_explain_what_a_small_grid_can(prior):
    basis = prior.components.transpose(0, 1).flatten(0, 1).double()  # over all planes together
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    _, few = fitted(rank=3)
    _, many = fitted(rank=48)
    assert few["explained"] < many["explained"]
    assert many["explained"] > 0.9  # 48 numbers made these images, but for a little noise


def test_precision_is_the_inverse_covariance_of_the_autoregression(prior):
    """The textbook form: (I - W)^T S^-1 (I - W), element by element."""
    pixels = SIZE * SIZE
    for plane in range(3):
        matrix = torch.eye(pixels, dtype=torch.float64)
        for weights, (up, left) in zip(prior.weights[plane], NEIGHBOURS, strict=True):
            for y in range(SIZE):
                for x in range(SIZE):
                    if y >= up and 0 <= x - left < SIZE:
                        matrix[y * SIZE + x, (y - up) * SIZE + x - left] -= weights[y, x]
        expected = matrix.T @ torch.diag(1 / prior.innovations[plane].flatten()) @ matrix
        for rows in (2, 3, 4):
            blocks = prior.precision(plane, rows)
            padded = blocks.diagonal.shape[0] * blocks.diagonal.shape[1]
            dense = blocks @ torch.eye(padded, dtype=torch.float64)
            torch.testing.assert_close(dense[:pixels, :pixels], expected)
            torch.testing.assert_close(dense[pixels:, pixels:], torch.eye(padded - pixels, dtype=torch.float64))


def test_the_residual_model_predicts_better_than_white_noise(prior):
    """The likelihood of held-out residuals under the autoregression beats that under independent pixels."""
    faces = torch.einsum("pc,nchw->nphw", prior.planes, smooth(200, SIZE, seed=9).double() / 255) - prior.mean
    basis = prior.components.double()
    coefficients = torch.einsum("pir,npi->nr", basis, faces.flatten(2))
    residual = faces.flatten(2) - torch.einsum("pir,nr->npi", basis, coefficients)
    for plane in range(3):
        precision = prior.precision(plane, 2)
        values = residual[:, plane].T
        factor = precision.cholesky()
        log_determinant = 2 * factor.factors.diagonal(dim1=1, dim2=2).log().sum()
        energy = (values * (precision @ values)).sum(0).mean()
        white = values.shape[0] * (values.square().mean().log() + 1)
        assert float(energy - log_determinant) < float(white)


def test_weights_outside_the_face_are_zero(prior):
    for index, (up, left) in enumerate(NEIGHBOURS):
        weights = prior.weights[:, index]
        assert (weights[:, :up] == 0).all()
        assert (weights[..., :left] == 0).all() if left > 0 else True
        assert (weights[..., SIZE + left :] == 0).all() if left < 0 else True


def test_too_few_faces_are_refused():
    with pytest.raises(ValueError, match="too few for 48 components"):
        fitted(rank=48, count=24)


def test_blocks_lower_than_the_reach_are_refused(prior):
    with pytest.raises(ValueError, match="at least 2 rows"):
        prior.precision(0, 1)
