"""Cholesky factorisation of symmetric block-tridiagonal matrices, and solutions with many right-hand sides.

Golub and Van Loan, *Matrix Computations*, section 4.5.1. A matrix of n = m B rows takes O(m B^3) operations once and
O(m B^2) for each right-hand side, all of them in matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockTridiagonal:
    """A symmetric matrix of m x m blocks of which only the diagonal and its neighbours are not zero.

    Attributes:
        diagonal: float64 (m, B, B), symmetric blocks.
        lower: float64 (m - 1, B, B), the block below each diagonal block but the last.
    """

    diagonal: Tensor
    lower: Tensor

    def __post_init__(self) -> None:
        blocks, size, width = self.diagonal.shape
        if size != width or tuple(self.lower.shape) != (blocks - 1, size, size):
            raise ValueError(
                f"expected blocks (m, B, B) and (m - 1, B, B), got {tuple(self.diagonal.shape)} and "
                f"{tuple(self.lower.shape)}"
            )

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with x (m B, k)."""
        blocks, size, _ = self.diagonal.shape
        parts = x.view(blocks, size, -1)
        out = self.diagonal @ parts
        out[1:] += self.lower @ parts[:-1]
        out[:-1] += self.lower.mT @ parts[1:]
        return out.view(blocks * size, -1)

    def plus(self, other: BlockTridiagonal, weight: float) -> BlockTridiagonal:
        """``self + weight other``."""
        return BlockTridiagonal(self.diagonal + weight * other.diagonal, self.lower + weight * other.lower)

    def cholesky(self) -> BlockCholesky:
        """The factorisation.

        Raises:
            ArithmeticError: the matrix is not positive definite.
        """
        blocks = len(self.diagonal)
        factors, couplings = torch.empty_like(self.diagonal), torch.empty_like(self.lower)
        for index in range(blocks):
            block = self.diagonal[index]
            if index:
                block = block - couplings[index - 1] @ couplings[index - 1].mT
            factor, failed = torch.linalg.cholesky_ex(block)
            if int(failed):
                raise ArithmeticError("a prior or an observation model is not positive definite in double precision")
            factors[index] = factor
            if index + 1 < blocks:
                # E = lower F^-T
                couplings[index] = torch.linalg.solve_triangular(factor, self.lower[index].mT, upper=False).mT
        return BlockCholesky(factors, couplings)


@dataclass(frozen=True, eq=False)
class BlockCholesky:
    """L with L L^T the matrix: lower triangular diagonal blocks and the blocks below them."""

    factors: Tensor
    couplings: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.numel() * part.element_size() for part in (self.factors, self.couplings))

    def solve(self, right: Tensor) -> Tensor:
        """The solution of L L^T x = right, float64 (m B, k)."""
        blocks, size, _ = self.factors.shape
        x = right.reshape(blocks, size, -1).clone()
        for index in range(blocks):
            if index:
                x[index] -= self.couplings[index - 1] @ x[index - 1]
            x[index] = torch.linalg.solve_triangular(self.factors[index], x[index], upper=False)
        return self.draw(x)

    def draw(self, white: Tensor) -> Tensor:
        """L^-T w of w (m B, k): where w is white noise, a sample whose precision is the matrix."""
        blocks, size, _ = self.factors.shape
        x = white.reshape(blocks, size, -1).clone()
        for index in reversed(range(blocks)):
            if index + 1 < blocks:
                x[index] -= self.couplings[index].mT @ x[index + 1]
            x[index] = torch.linalg.solve_triangular(self.factors[index].mT, x[index], upper=True)
        return x.view(blocks * size, -1)
