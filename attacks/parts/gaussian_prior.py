"""A Gaussian prior of faces: what an attacker knows of faces before intercepting any, as a mean and a covariance.

The three colours are turned into planes that are uncorrelated on average, both in the prior and in what a defence
observes of them. In these planes x = mean + U a + e: principal components shared by the planes (Turk and Pentland,
*Eigenfaces*, 1991), and a residual e which they do not explain. The residual is not white: neighbouring pixels agree.
It is modelled as an autoregression of each pixel on the pixels just above and to the left of it, with
coefficients of its own in each place, whose precision matrix is sparse (Vecchia's approximation, JRSS B 50(2), 1988).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.parts.exposure import split_identities
from bench.images import to_float
from bench.randomness import derived, seeded


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
        """The product with x (n, k), n <= m B, below which x is zero: its first n rows."""
        parts = _in_blocks(x, self.diagonal)
        out = self.diagonal @ parts
        out[1:] += self.lower @ parts[:-1]
        out[:-1] += self.lower.mT @ parts[1:]
        return out.flatten(0, 1)[: len(x)]

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
        return self.factors.nbytes + self.couplings.nbytes

    def solve(self, right: Tensor) -> Tensor:
        """The solution of L L^T x = right, float64 (n, k), n <= m B, below which right is zero: its first n rows."""
        x = _in_blocks(right, self.factors).clone()
        for index, factor in enumerate(self.factors):
            if index:
                x[index] -= self.couplings[index - 1] @ x[index - 1]
            x[index] = torch.linalg.solve_triangular(factor, x[index], upper=False)
        return self.draw(x.flatten(0, 1))[: len(right)]

    def draw(self, white: Tensor) -> Tensor:
        """L^-T w of w (n, k), as in :meth:`solve`: where w is white noise, a sample whose precision is the matrix."""
        x = _in_blocks(white, self.factors).clone()
        for index in reversed(range(len(x))):
            if index + 1 < len(x):
                x[index] -= self.couplings[index].mT @ x[index + 1]
            x[index] = torch.linalg.solve_triangular(self.factors[index].mT, x[index], upper=True)
        return x.flatten(0, 1)[: len(white)]


def _in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x (n, k), n <= m B, and zeros below it as (m, B, k) for ``blocks`` (m, B, B)."""
    count, size, _ = blocks.shape
    extra = count * size - len(x)
    return (torch.cat((x, x.new_zeros(extra, x.shape[1]))) if extra else x).reshape(count, size, -1)


#: Rows above a pixel, and columns to its sides, that the residual's autoregression looks at.
REACH = 2
#: Pixels before a pixel in raster order within that reach, as (rows up, columns left).
NEIGHBOURS = tuple(
    (up, left) for up in range(REACH + 1) for left in range(-REACH, REACH + 1) if up > 0 or (up == 0 and left > 0)
)
#: Weight of the average over all places in the regression of one place: a place alone has few faces to learn from.
_POOLING = 0.2
_VARIANCE_POOLING = 0.1
#: Relative to the mean variance of a plane, so that constant pixels leave nothing singular.
_JITTER = 1e-6
_CHUNK = 256


class GaussianPrior(nn.Module):
    """Mean and covariance of public faces.

    Attributes:
        planes: float64 (3, 3), colours in [0, 1] to planes of unit average variance.
        strengths: float64 (3,), how strongly the defence shows each plane: with M the colour matrix of its map, the
            columns of M planes^-1 are orthogonal and these are their squared lengths.
        mean: float64 (3, H, W), in planes.
        components: float32 (3, HW, r), orthonormal over all planes together.
        variances: float64 (r,), of the coefficients, measured on faces that the components were not fitted to.
        weights: float64 (3, 12, H, W), the residual's autoregression, in the order of :data:`NEIGHBOURS`.
        innovations: float64 (3, H, W), its variances.
    """

    planes: Tensor
    strengths: Tensor
    mean: Tensor
    components: Tensor
    variances: Tensor
    weights: Tensor
    innovations: Tensor

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.size, double = size, torch.float64
        self.register_buffer("planes", torch.eye(3, dtype=double))
        self.register_buffer("strengths", torch.ones(3, dtype=double))
        self.register_buffer("mean", torch.zeros(3, size, size, dtype=double))
        self.register_buffer("components", torch.zeros(3, size * size, rank))
        self.register_buffer("variances", torch.ones(rank, dtype=double))
        self.register_buffer("weights", torch.zeros(3, len(NEIGHBOURS), size, size, dtype=double))
        self.register_buffer("innovations", torch.ones(3, size, size, dtype=double))

    @property
    def rank(self) -> int:
        """r."""
        return len(self.variances)

    @torch.no_grad()
    def fit(
        self, faces: Tensor, identities: Tensor, colour: Tensor, seed: int, *, held_out: float, most: int
    ) -> dict[str, float]:
        """Estimate everything from public faces, uint8 (M, 3, H, W), and their mirror images.

        ``colour``, float64 (P, 3), is the colour matrix M of the defence's map. The faces of a share ``held_out`` of
        the identities measure the coefficients' variances and the residual, which would look too small on the faces,
        ``most`` of them, that the components are fitted to.

        Returns:
            ``explained``: the share of the held-out faces' variance in the components; ``faces`` fitted to.

        Raises:
            ValueError: fewer than two identities, or fewer faces than components.
        """
        training, validation = split_identities(identities, held_out, derived(seed, "prior"))
        training = training[torch.randperm(len(training), generator=derived(seed, "prior faces"))[:most]]
        validation = validation[torch.randperm(len(validation), generator=derived(seed, "residual"))[:most]]
        if 2 * len(training) <= self.rank:
            raise ValueError(f"{len(training)} public faces are too few for {self.rank} components; set rank")
        self._fit_planes(faces[training], colour)
        centred = self._in_planes(faces[training])
        self.mean.copy_(centred.mean(dim=0).view_as(self.mean))
        centred -= self.mean.to(centred).flatten(1)
        # The randomised range finder draws from the global generator.
        with seeded(seed, "components"):
            basis = torch.svd_lowrank(centred.flatten(1), q=self.rank + min(50, self.rank), niter=1)[2]
        basis = basis[:, : self.rank]
        self.components.copy_(basis.view(3, -1, self.rank))
        del centred
        residual = self._in_planes(faces[validation]) - self.mean.float().flatten(1)
        coefficients = residual.flatten(1) @ basis
        self.variances.copy_(coefficients.double().square().mean(dim=0))
        total = float(residual.double().square().sum())
        residual -= (coefficients @ basis.T).view_as(residual)
        left = float(residual.double().square().sum())
        for plane in range(3):
            self._fit_residual(plane, residual[:, plane].view(-1, self.size, self.size))
        return {"explained": 1 - left / total, "faces": float(len(training))}

    def _fit_planes(self, faces: Tensor, colour: Tensor) -> None:
        """Diagonalise the average colour covariance and the observation's colour Gram matrix at once."""
        sample = to_float(faces[:: max(1, len(faces) // 1024)]).double()
        centred = sample - sample.mean(dim=0)
        covariance = torch.einsum("nihw,njhw->ij", centred, centred) / centred[:, 0].numel()
        covariance += (_JITTER * covariance.trace() + 1e-12) * torch.eye(3, dtype=torch.float64, device=sample.device)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.sqrt()  # covariance = root root^T
        colour = colour.to(root)
        strengths, rotation = torch.linalg.eigh(root.T @ colour.T @ colour @ root)
        self.planes.copy_(torch.linalg.inv(root @ rotation))
        # A plane that the defence does not show has a strength of zero up to rounding.
        strengths = torch.where(strengths > 1e-12 * strengths.max(), strengths, torch.zeros_like(strengths))
        self.strengths.copy_(strengths)

    def _in_planes(self, faces: Tensor) -> Tensor:
        """Faces and their mirror images: float32 (2 M, 3, H W)."""
        planes = self.planes.float()
        parts = (to_float(part.to(planes.device)) for part in faces.split(_CHUNK))
        images = torch.cat([torch.einsum("pc,nchw->nphw", planes, part) for part in parts])
        return torch.cat((images, images.flip(-1))).flatten(2)

    def _fit_residual(self, plane: int, residual: Tensor) -> None:
        """Regress each pixel of float32 (N, H, W) on its predecessors."""
        count = len(NEIGHBOURS)
        gram = torch.zeros(self.size, self.size, count, count, dtype=torch.float64, device=residual.device)
        cross = torch.zeros(self.size, self.size, count, dtype=torch.float64, device=residual.device)
        square = torch.zeros(self.size, self.size, dtype=torch.float64, device=residual.device)
        for part in residual.split(_CHUNK):
            values = part.double()
            before = torch.stack([_shifted(values, offset) for offset in NEIGHBOURS], dim=-1)
            gram += torch.einsum("nhwa,nhwb->hwab", before, before)
            cross += torch.einsum("nhwa,nhw->hwa", before, values)
            square += values.square().sum(dim=0)
        pooled_gram, pooled_cross = gram.mean(dim=(0, 1)), cross.mean(dim=(0, 1))
        ridge = (_JITTER * pooled_gram.diagonal().mean() + 1e-30) * torch.eye(count, dtype=torch.float64).to(gram)
        system = gram + _POOLING * pooled_gram + ridge
        weights = torch.linalg.solve(system, (cross + _POOLING * pooled_cross)[..., None])[..., 0]
        inside = torch.ones(self.size, self.size, dtype=torch.float64, device=residual.device)
        weights = weights * torch.stack([_shifted(inside[None], offset)[0] for offset in NEIGHBOURS], dim=-1)
        explained = 2 * (weights * cross).sum(-1) - torch.einsum("hwa,hwab,hwb->hw", weights, gram, weights)
        innovations = (square - explained).clamp(min=0) / len(residual)
        mean = innovations.mean()
        innovations = (1 - _VARIANCE_POOLING) * innovations + _VARIANCE_POOLING * mean + _JITTER**2
        self.weights[plane].copy_(weights.permute(2, 0, 1))
        self.innovations[plane].copy_(innovations)

    def precision(self, plane: int, rows: int) -> BlockTridiagonal:
        """The residual's inverse covariance as blocks of ``rows`` >= :data:`REACH` image rows.

        Faces are padded below to whole blocks with pixels of unit variance that nothing else depends on.
        """
        if rows < REACH:
            raise ValueError(f"a block needs at least {REACH} rows, got {rows}")
        blocks, size = -(-self.size // rows), rows * self.size
        within, above = self._whitening(plane, rows)
        variance = torch.ones(blocks * rows, self.size, dtype=torch.float64, device=within.device)
        variance[: self.size] = self.innovations[plane]
        scale = variance.view(blocks, size, 1).rsqrt()
        within, above = within * scale, above * scale[1:]
        diagonal = within.mT @ within
        diagonal[:-1] += above.mT @ above
        return BlockTridiagonal(diagonal, within[1:].mT @ above)

    def _whitening(self, plane: int, rows: int) -> tuple[Tensor, Tensor]:
        """I - W as blocks: the diagonal ones and those to the left of all but the first."""
        width = self.size
        blocks, size = -(-self.size // rows), rows * width
        within = torch.eye(size, dtype=torch.float64, device=self.weights.device).repeat(blocks, 1, 1)
        above = torch.zeros(blocks - 1, size, size, dtype=torch.float64, device=within.device)
        y, x = torch.meshgrid(torch.arange(self.size), torch.arange(width), indexing="ij")
        for weights, (up, left) in zip(self.weights[plane], NEIGHBOURS, strict=True):
            valid = (y >= up) & (x >= left) & (x - left < width)
            row, column, value = y[valid], x[valid], weights[valid.to(weights.device)]
            block, into = row // rows, (row % rows) * width + column
            source = row - up
            here = source // rows == block
            at = (source % rows) * width + column - left
            within[block[here], into[here], at[here]] = -value[here.to(value.device)]
            away = ~here
            above[block[away] - 1, into[away], at[away]] = -value[away.to(value.device)]
        return within, above

    def to_faces(self, planes: Tensor) -> Tensor:
        """Planes (N, 3, H, W) to RGB."""
        return torch.einsum("cp,nphw->nchw", torch.linalg.inv(self.planes).to(planes), planes)


def _shifted(images: Tensor, offset: tuple[int, int]) -> Tensor:
    """Each pixel's predecessor at ``offset`` = (rows up, columns left) in (N, H, W); zero outside."""
    up, left = offset
    return functional.pad(images, (left, -left, up, -up))
