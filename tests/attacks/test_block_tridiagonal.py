import pytest
import torch

from attacks.block_tridiagonal import BlockTridiagonal


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


def test_weighted_sum(matrix):
    blocks, dense = matrix
    torch.testing.assert_close(blocks.plus(blocks, -0.25) @ torch.eye(12, dtype=torch.float64), 0.75 * dense)


def test_one_block_is_a_dense_matrix():
    one = BlockTridiagonal(4 * torch.eye(2, dtype=torch.float64)[None], torch.zeros(0, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(
        one.cholesky().solve(torch.ones(2, 1, dtype=torch.float64)).flatten(), torch.full((2,), 0.25).double()
    )


def test_a_matrix_that_is_not_positive_definite_is_refused(matrix):
    blocks, _ = matrix
    with pytest.raises(ArithmeticError, match="positive definite"):
        blocks.plus(blocks, -2.0).cholesky()


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"m - 1, B, B"):
        BlockTridiagonal(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3))
