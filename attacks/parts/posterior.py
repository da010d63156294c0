"""The posterior mean of a face under a Gaussian prior, given what a linear defence sent of it.

With x = mean + U a + e, a ~ N(0, D), e ~ N(0, Q^-1) and z = A x + noise of variance s^2, let gain(r) be the posterior
mean of e for the residual r = z - A mean if a were zero. Then (Woodbury; Rasmussen and Williams 2006, appendix A.3)

    h = U^T Q gain(r),  H = U^T Q gain(A U),  a = (D^-1 + H)^-1 h,  x = mean + gain(r) + (U - gain(A U)) a.

gain works on the three planes of the :class:`GaussianPrior` one by one. Where each value that is
sent looks at few rows of the face, gain(r) = (Q + A^T A / s^2)^-1 A^T r / s^2 by a block-tridiagonal factorisation;
where a single map of rows and columns mixes far rows, in the space of the singular vectors that stand out of the noise.
Any other linear map is inverted with conjugate gradients in the space of what is sent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attacks.parts.gaussian_prior import REACH, BlockCholesky, BlockTridiagonal, GaussianPrior
from defenses.base import LinearOperator, SeparableSum

#: Pixels in a block up to which a factorisation is cheaper than working with singular vectors; and values in one of all
#: colours together up to which it is cheaper than conjugate gradients.
_LARGEST_BLOCK = 1024
_LARGEST_JOINT = 1536
#: Entries of a Gram matrix below this share of the largest are rounding.
_NEGLIGIBLE = 1e-14
#: Pixels whose responses tell how far an operator reaches, and the share of the largest that counts as a response.
_PROBES = 16
_LOCAL = 1e-9
#: A singular vector whose share of the prior lies this far below the noise says nothing.
_BELOW_NOISE = 1e-3
#: Of conjugate gradients: steps that show whether preconditioning helps; what their last half has to gain to count, and
#: the error, relative to the mean face's, below which nothing is left to gain.
_TRIAL_ITERATIONS = 20
_GAIN = 0.03
_EXACT = 1e-3
_CG_TOLERANCE = 1e-9
#: The largest ratio of what an observation says to what the prior says that double precision still resolves. Beyond it
#: (less noise than rounding leaves over) the noise is taken to be larger than it is.
_DYNAMIC_RANGE = 1e11


# A gain gives gain(r) of one plane, or of all of them together, for one set of operators: ``from_maps`` from A^T r
# (n, N), and from r itself (N, h, w) where it asks for that; ``from_faces`` of r = A f for planes f (n, k). All are
# float64.


class _BandedGain:
    """(Q + G / s^2)^-1 by block-tridiagonal Cholesky, with G = A^T A."""

    def __init__(self, precision: BlockTridiagonal, gram: BlockTridiagonal, information: float) -> None:
        self._gram, self._information = gram, information
        self._factor = precision.plus(gram, information).cholesky()
        self.nbytes = self._factor.nbytes

    def from_maps(self, adjoint: Tensor, maps: Tensor | None) -> Tensor:
        return self._factor.solve(adjoint * self._information)

    def from_faces(self, faces: Tensor) -> Tensor:
        return self._factor.solve((self._gram @ faces) * self._information)


class _JointGain:
    """The same for three planes at once, (3, n, k), where the observation mixes them in each place otherwise.

    A block holds the rows of the first plane, then those of the second and the third.
    """

    def __init__(self, precisions: Sequence[BlockTridiagonal], gram: BlockTridiagonal, information: float) -> None:
        diagonal, lower = torch.zeros_like(gram.diagonal), torch.zeros_like(gram.lower)
        side = diagonal.shape[1] // 3
        for plane, precision in enumerate(precisions):
            own = slice(plane * side, (plane + 1) * side)
            diagonal[:, own, own], lower[:, own, own] = precision.diagonal, precision.lower
        self._gain, self._side = _BandedGain(BlockTridiagonal(diagonal, lower), gram, information), side
        self.nbytes = self._gain.nbytes

    def from_maps(self, adjoint: Tensor, maps: Tensor | None) -> Tensor:
        return self._apart(self._gain.from_maps(self._together(adjoint), maps), adjoint.shape[1])

    def from_faces(self, faces: Tensor) -> Tensor:
        return self._apart(self._gain.from_faces(self._together(faces)), faces.shape[1])

    def _together(self, planes: Tensor) -> Tensor:
        padded = functional.pad(planes, (0, 0, 0, -planes.shape[1] % self._side))
        blocks: Tensor = padded.unflatten(1, (-1, self._side)).transpose(0, 1).flatten(0, 2)
        return blocks

    def _apart(self, blocks: Tensor, pixels: int) -> Tensor:
        planes = blocks.view(-1, 3, self._side, blocks.shape[1]).transpose(0, 1)
        return planes.flatten(1, 2)[:, :pixels]


class _SingularGain:
    """Q^-1 B^T (B Q^-1 B^T + s^2)^-1 with B the rows of A, in its singular vectors, that stand out of the noise."""

    def __init__(
        self, prior: GaussianPrior, plane: int, precision: BlockTridiagonal, operator: SeparableSum, information: float
    ) -> None:
        row, column = (f[0].to(prior.mean) for f in (operator.row_factors, operator.column_factors))
        left_row, values_row, right_row = torch.linalg.svd(row, full_matrices=False)
        left_column, values_column, right_column = torch.linalg.svd(column, full_matrices=False)
        values = values_row[:, None] * values_column
        components = prior.components[plane].double().view(prior.size, prior.size, -1)
        turned = torch.einsum("ih,hwr,jw->ijr", right_row, components, right_column)
        # What the components leave is smooth: in the fine patterns that decide, it varies no more than its innovations.
        variance = turned.square() @ prior.variances + prior.innovations[plane].mean()
        self._keep = (values.square() * variance * information > _BELOW_NOISE).nonzero()
        i, j = self._keep.unbind(1)
        self._left = left_row, left_column
        self._values = values[i, j]
        directions = torch.einsum("mh,mw->hwm", right_row[i], right_column[j]).flatten(0, 1)
        self._rows = directions * self._values  # B^T, (n, m)
        self._spread = precision.cholesky().solve(self._rows)  # Q^-1 B^T
        system = self._rows.T @ self._spread
        system.diagonal().add_(1 / information)
        self._system = torch.linalg.cholesky(system)
        self.nbytes = self._rows.nbytes + self._spread.nbytes + self._system.nbytes

    def _from_coefficients(self, coefficients: Tensor) -> Tensor:
        out: Tensor = self._spread @ torch.cholesky_solve(coefficients, self._system)
        return out

    def from_maps(self, adjoint: Tensor, maps: Tensor | None) -> Tensor:
        assert maps is not None
        left_row, left_column = self._left
        turned = left_row.T @ maps @ left_column
        i, j = self._keep.unbind(1)
        return self._from_coefficients(turned[:, i, j].T)

    def from_faces(self, faces: Tensor) -> Tensor:
        return self._from_coefficients(self._rows.T @ faces)


@dataclass(frozen=True, eq=False)
class LocalGram:
    """A^T A of an operator whose sent values look at few pixels, the same for all colours up to their mixture.

    Attributes:
        colour: float64 (3, 3), of trace 3: the Gram matrix of the colours.
        stencil: float64 (2 r + 1, 2 r + 1, H, W): entry (i, j) of a pixel is that of the pixel and the one i - r rows
            below and j - r columns to the right of it; zero where there is none.
    """

    colour: Tensor
    stencil: Tensor

    @property
    def reach(self) -> int:
        """r."""
        return len(self.stencil) // 2

    def __matmul__(self, faces: Tensor) -> Tensor:
        """The product with faces (N, 3, H, W)."""
        reach, (height, width) = self.reach, faces.shape[-2:]
        mixed = functional.pad(torch.einsum("cd,ndhw->nchw", self.colour, faces), (reach,) * 4)
        out = torch.zeros_like(faces)
        for i, row in enumerate(self.stencil):
            for j, weight in enumerate(row):
                out += weight * mixed[..., i : i + height, j : j + width]
        return out

    def blocks(self, rows: int) -> BlockTridiagonal:
        """The stencil's matrix as blocks of ``rows`` image rows."""
        return _stencil_blocks(self.stencil, rows)


@dataclass(frozen=True, eq=False)
class JointGram:
    """A^T A of an operator whose sent values look at few pixels, and that mixes colours in each place as it likes.

    Attributes:
        stencil: float64 (2 r + 1, 2 r + 1, 3, 3, H, W), as that of a :class:`LocalGram` for a colour of the pixel and
            one of the other.
    """

    stencil: Tensor

    @property
    def reach(self) -> int:
        """r."""
        return len(self.stencil) // 2

    def __matmul__(self, faces: Tensor) -> Tensor:
        """The product with faces (N, 3, H, W)."""
        reach, (height, width) = self.reach, faces.shape[-2:]
        padded = functional.pad(faces, (reach,) * 4)
        out = torch.zeros_like(faces)
        for i, row in enumerate(self.stencil):
            for j, weights in enumerate(row):
                shifted = padded[..., i : i + height, j : j + width]
                out += torch.einsum("cdhw,ndhw->nchw", weights, shifted)
        return out

    def blocks(self, rows: int, planes: Tensor) -> BlockTridiagonal:
        """The matrix for the three planes of a prior, as blocks of ``rows`` image rows of each plane."""
        turn = torch.linalg.inv(planes)
        stencil = torch.einsum("cp,ijcdhw,dq->ijpqhw", turn, self.stencil, turn)
        pairs = [[_stencil_blocks(stencil[:, :, p, q], rows) for q in range(3)] for p in range(3)]

        def joined(parts: list[list[Tensor]]) -> Tensor:
            return torch.cat([torch.cat(row, dim=2) for row in parts], dim=1)

        return BlockTridiagonal(
            joined([[pair.diagonal for pair in row] for row in pairs]),
            joined([[pair.lower for pair in row] for row in pairs]),
        )


def _stencil_blocks(stencil: Tensor, rows: int) -> BlockTridiagonal:
    """The matrix of a stencil (2 r + 1, 2 r + 1, H, W) as blocks of ``rows`` image rows."""
    reach, (height, width) = len(stencil) // 2, stencil.shape[-2:]
    count, side = -(-height // rows), rows * width
    diagonal = torch.zeros(count, side, side, dtype=torch.float64, device=stencil.device)
    lower = torch.zeros(max(0, count - 1), side, side, dtype=torch.float64, device=stencil.device)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for i, j in itertools.product(range(len(stencil)), repeat=2):
        other, column = y + i - reach, x + j - reach
        inside = (other >= 0) & (other < height) & (column >= 0) & (column < width)
        values = stencil[i, j][inside.to(stencil.device)]
        block, beside = (y // rows)[inside], (other // rows)[inside]
        at, to = ((y % rows) * width + x)[inside], ((other % rows) * width + column)[inside]
        here, below = block == beside, block == beside + 1
        diagonal[block[here], at[here], to[here]] = values[here.to(values.device)]
        lower[beside[below], at[below], to[below]] = values[below.to(values.device)]
    return BlockTridiagonal(diagonal, lower)


@torch.no_grad()
def local_gram(operator: LinearOperator, size: int, device: torch.device) -> LocalGram | JointGram | None:
    """A^T A by its responses to isolated pixels; None where pixels far apart mix.

    Many pixels are answered for at once, as far apart as a few of them tell that they have to be.
    """

    def gram(faces: Tensor) -> Tensor:
        return torch.cat([operator.adjoint(operator(part)) for part in faces.split(_PROBES)])

    draws = torch.Generator().manual_seed(0)
    places = torch.randint(size, (_PROBES, 2), generator=draws)
    single = torch.zeros(_PROBES, 3, size, size, dtype=torch.float64, device=device)
    single[torch.arange(_PROBES), torch.arange(_PROBES) % 3, places[:, 0], places[:, 1]] = 1
    answered = gram(single).abs().amax(dim=1)
    far, y, x = (answered > _LOCAL * answered.max()).nonzero().cpu().unbind(1)
    reach = max(int((y - places[far, 0]).abs().max()), int((x - places[far, 1]).abs().max())) if len(far) else 0
    period = 2 * reach + 1
    if max(REACH, reach) * size > _LARGEST_BLOCK or period > size:
        return None
    combs = torch.zeros(period, period, 3, 3, size, size, dtype=torch.float64, device=device)
    for i, j, colour in itertools.product(range(period), range(period), range(3)):
        combs[i, j, colour, colour, i::period, j::period] = 1
    answers = gram(combs.view(-1, 3, size, size)).view(period, period, 3, 3, size, size)
    # Pixel (y, x) and the one (dy, dx) from it: the answer at the pixel to the comb that the other stands in.
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    stencil = torch.zeros(period, period, 3, 3, size, size, dtype=torch.float64, device=device)
    for i, j in itertools.product(range(period), repeat=2):
        other, column = y + i - reach, x + j - reach
        inside = ((other >= 0) & (other < size) & (column >= 0) & (column < size)).to(device)
        taken = answers[other % period, column % period, :, :, y, x]  # (H, W, 3, 3), colour of the comb first
        stencil[i, j] = torch.where(inside[..., None, None], taken, taken.new_zeros(())).permute(3, 2, 0, 1)
    mixture = stencil[reach, reach].sum(dim=(2, 3))
    mixture = 3 * mixture / mixture.trace().clamp(min=1e-300)
    found = LocalGram(mixture, torch.einsum("cd,ijcdhw->ijhw", mixture, stencil) / mixture.square().sum())
    trial = torch.randn(1, 3, size, size, generator=draws, dtype=torch.float64).to(device)
    if is_gram(found, operator, trial):
        return found
    whole = JointGram(stencil)
    small = 3 * max(REACH, reach) * size <= _LARGEST_JOINT
    return whole if small and is_gram(whole, operator, trial) else None


@torch.no_grad()
def is_gram(gram: LocalGram | JointGram, operator: LinearOperator, trial: Tensor) -> bool:
    """Whether ``gram`` is A^T A of the operator, as far as a random face ``trial`` (1, 3, H, W) tells."""
    expected = operator.adjoint(operator(trial))
    return bool((gram @ trial - expected).norm() <= 1e-6 * expected.norm())


def row_reach(operators: Sequence[SeparableSum | LocalGram | JointGram]) -> int:
    """How many rows apart two pixels may be that the same sent value depends on."""
    reach = 0
    for operator in operators:
        if isinstance(operator, (LocalGram, JointGram)):
            reach = max(reach, operator.reach)
            continue
        gram = (operator.row_factors.mT @ operator.row_factors).abs().amax(dim=0)
        at = (gram > _NEGLIGIBLE * gram.max()).nonzero()
        reach = max(reach, int((at[:, 0] - at[:, 1]).abs().max()))
    return reach


def factors_apart(operators: Sequence[SeparableSum], size: int) -> bool:
    """Whether the planes of any one of the operators, for faces of ``size`` pixels a side, can be factored."""
    one_map = all(len(operator.row_factors) == 1 for operator in operators)
    return one_map or max(REACH, row_reach(operators)) * size <= _LARGEST_BLOCK


def gram_blocks(operator: SeparableSum | LocalGram, size: int, rows: int, device: torch.device) -> BlockTridiagonal:
    """A^T A of one plane, sum over the operator's maps of (R^T R) x (C^T C), as blocks of ``rows`` image rows."""
    if isinstance(operator, LocalGram):
        return operator.blocks(rows)
    blocks = -(-size // rows)
    row_factors, column_factors = operator.row_factors.to(device), operator.column_factors.to(device)
    vertical = row_factors.mT @ row_factors  # (K, H, H)
    horizontal = column_factors.mT @ column_factors
    padded = torch.zeros(len(vertical), blocks * rows, blocks * rows, dtype=torch.float64, device=device)
    padded[:, :size, :size] = vertical
    tiles = padded.view(len(vertical), blocks, rows, blocks, rows)
    index = torch.arange(blocks, device=device)

    def blow_up(part: Tensor) -> Tensor:  # (K, m, rows, rows) to (m, rows W, rows W)
        side = rows * size
        return torch.einsum("kmij,kab->miajb", part, horizontal).reshape(-1, side, side)

    diagonal = blow_up(tiles[:, index, :, index].movedim(0, 1))
    lower = blow_up(tiles[:, index[1:], :, index[:-1]].movedim(0, 1))
    return BlockTridiagonal(diagonal, lower)


class PriorCovariance:
    """The fitted prior's covariance S = U D U^T + Q^-1 as an operator; what depends on the prior alone, made once."""

    def __init__(self, prior: GaussianPrior) -> None:
        self.prior = prior

    @functools.cached_property
    def weighted(self) -> Tensor:
        """Q U, float64 (3, HW, r)."""
        components = self.prior.components.double()
        return torch.stack([precision @ part for precision, part in zip(self._precisions, components, strict=True)])

    @functools.cached_property
    def _precisions(self) -> list[BlockTridiagonal]:
        return [self.prior.precision(plane, REACH) for plane in range(3)]

    @functools.cached_property
    def _factors(self) -> list[BlockCholesky]:
        return [precision.cholesky() for precision in self._precisions]

    @functools.cached_property
    def _inner(self) -> Tensor:
        """Cholesky factor of U^T Q U + D^-1."""
        prior = self.prior
        inner = torch.einsum("pir,pis->rs", prior.components.double(), self.weighted)
        variances = prior.variances.clamp(min=1e-12 * float(prior.variances.max()))
        factor: Tensor = torch.linalg.cholesky((inner + inner.T) / 2 + torch.diag(1 / variances))
        return factor

    def times(self, gradient: Tensor) -> Tensor:
        """S g for faces g (N, 3, H, W), in RGB."""
        prior = self.prior
        planes = torch.einsum("cp,nchw->pnhw", torch.linalg.inv(prior.planes), gradient).flatten(2)
        components = prior.components.double()
        coefficients = torch.einsum("pir,pni->nr", components, planes) * prior.variances
        out = torch.einsum("pir,nr->pni", components, coefficients)
        out += _by_plane([factor.solve for factor in self._factors], planes)
        return prior.to_faces(out.transpose(0, 1).reshape(gradient.shape))

    def inverse_times(self, faces: Tensor) -> Tensor:
        """S^-1 f for faces f (N, 3, H, W), in RGB, by the identity of Woodbury."""
        planes = torch.einsum("pc,nchw->pnhw", self.prior.planes, faces).flatten(2)
        right = torch.einsum("pir,pni->rn", self.weighted, planes)
        explained = torch.einsum("pir,rn->pni", self.weighted, torch.cholesky_solve(right, self._inner))
        out = _by_plane([precision.__matmul__ for precision in self._precisions], planes) - explained
        return torch.einsum("pc,pnhw->nchw", self.prior.planes, out.view(3, *faces[:, 0].shape))

    def draw(self, generator: torch.Generator) -> Tensor:
        """A face less the mean, float64 (1, 3, H, W), in RGB."""
        prior = self.prior
        planes = torch.zeros(3, 1, prior.size**2, dtype=torch.float64, device=prior.mean.device)
        code = torch.randn(prior.rank, generator=generator, dtype=torch.float64).to(planes) * prior.variances.sqrt()
        planes[:, 0] = torch.einsum("pir,r->pi", prior.components.double(), code)
        white = torch.randn(planes.shape, generator=generator, dtype=torch.float64).to(planes)
        planes += _by_plane([factor.draw for factor in self._factors], white)
        return prior.to_faces(planes.transpose(0, 1).reshape(1, 3, prior.size, prior.size))


def _by_plane(apply: Sequence[Callable[[Tensor], Tensor]], planes: Tensor) -> Tensor:
    """Each plane of (3, N, HW) through its function of (HW, N)."""
    turned = planes.mT.clone(memory_format=torch.contiguous_format)
    return torch.stack([function(plane).T for function, plane in zip(apply, turned, strict=True)])


class Posterior:
    """The posterior for one set of states, factored once and then applied to any number of faces.

    The operators, or A^T A of them for the prior's colours, are the maps of the interceptions that are combined (fewer
    where states repeat), ``noise`` the standard deviation of what is sent around A x + offset. An operator with a
    weight counts as if its noise had been divided by the weight's square root.

    Attributes:
        joint: whether the planes are solved for together, as the operators mix them in each place otherwise
            (:class:`JointGram`; all operators are then in this form).
        needs_maps: whether :meth:`__call__` needs the residual maps and not only A^T of them.
        plane_noise: standard deviation of the noise of each plane's maps that is reckoned with: at least what can be
            resolved.
    """

    def __init__(
        self,
        covariance: PriorCovariance,
        operators: Sequence[SeparableSum | LocalGram] | Sequence[JointGram],
        noise: float,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._prior = prior = covariance.prior
        self._weighted = covariance.weighted
        self._directions = prior.components.double()
        self._response = torch.diag(1 / prior.variances.clamp(min=1e-12 * float(prior.variances.max())))
        self._gains: list[_BandedGain | _SingularGain | None] = []
        self._joint_gain: _JointGain | None = None
        self.plane_noise: list[float] = []
        self.joint, self.needs_maps = isinstance(operators[0], JointGram), False
        weights = [1.0] * len(operators) if weights is None else weights
        if self.joint:
            self._factor_jointly([part for part in operators if isinstance(part, JointGram)], noise, weights)
        else:
            apart = [part for part in operators if not isinstance(part, JointGram)]
            self._factor_planes(apart, noise, weights)
        self._system = torch.linalg.cholesky((self._response + self._response.T) / 2)
        del self._response

    def _factor_jointly(self, operators: Sequence[JointGram], noise: float, weights: Sequence[float]) -> None:
        prior, rows = self._prior, max(REACH, row_reach(operators))
        gram = _total([operator.blocks(rows, prior.planes) for operator in operators], weights)
        largest = float(gram.diagonal.abs().sum(dim=-1).max())
        information = min(noise**-2, _DYNAMIC_RANGE / (largest * float(prior.innovations.mean())))
        gain = _JointGain([prior.precision(plane, rows) for plane in range(3)], gram, information)
        seen = gain.from_faces(self._directions)
        self._directions -= seen
        self._response += torch.einsum("pir,pis->rs", self._weighted, seen)
        self._joint_gain, self.plane_noise = gain, [information**-0.5] * 3

    def _factor_planes(
        self, operators: Sequence[SeparableSum | LocalGram], noise: float, weights: Sequence[float]
    ) -> None:
        prior, size, device = self._prior, self._prior.size, self._prior.mean.device
        reach = row_reach(operators)
        rows = max(REACH, reach)
        self.needs_maps = rows * size > _LARGEST_BLOCK
        wide = operators[0]
        if self.needs_maps and (len(operators) > 1 or isinstance(wide, LocalGram) or len(wide.row_factors) > 1):
            raise ValueError(
                f"the sent maps mix pixels {reach} rows apart: more than one such map cannot be factored; use solver=cg"
            )
        gram = None
        if not self.needs_maps:
            gram = _total([gram_blocks(operator, size, rows, device) for operator in operators], weights)
            largest = float(gram.diagonal.abs().sum(dim=-1).max())
        for plane, strength in enumerate(prior.strengths.tolist()):
            information = strength / noise**2
            if gram is not None:
                # The most that double precision still adds to what the prior says.
                resolved = _DYNAMIC_RANGE / (largest * float(prior.innovations[plane].mean()))
                information = min(information, resolved)
            gain: _BandedGain | _SingularGain | None = None
            if information > 0:
                precision = prior.precision(plane, REACH if gram is None else rows)
                if gram is None:
                    assert not isinstance(wide, LocalGram)
                    gain = _SingularGain(prior, plane, precision, wide, information * weights[0])
                else:
                    gain = _BandedGain(precision, gram, information)
                seen = gain.from_faces(prior.components[plane].double())
                self._directions[plane] -= seen
                self._response += self._weighted[plane].T @ seen
            self._gains.append(gain)
            self.plane_noise.append(information**-0.5 if information > 0 else math.inf)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        gains = sum(gain.nbytes for gain in (*self._gains, self._joint_gain) if gain is not None)
        return int(gains + self._directions.nbytes + self._system.nbytes)

    def __call__(self, adjoint: Tensor, maps: Tensor | None = None) -> Tensor:
        """x - mean in planes, float64 (N, 3, H, W).

        From A^T r, float64 (N, 3, H, W), for r = (z - offset) - A mean, each plane's r scaled to x -> R x C^T (that is,
        divided by its strength, unless they are solved for together), and r itself, float64 (N, 3, h, w), where
        :attr:`needs_maps`.
        """
        count = len(adjoint)
        update = torch.zeros(3, self._prior.size**2, count, dtype=torch.float64, device=adjoint.device)
        if self._joint_gain is not None:
            update += self._joint_gain.from_maps(adjoint.flatten(2).permute(1, 2, 0), None)
        for plane, gain in enumerate(self._gains):
            if gain is not None:
                right = adjoint[:, plane].flatten(1).T
                update[plane] = gain.from_maps(right, None if maps is None else maps[:, plane])
        response = torch.zeros(self._prior.rank, count, dtype=torch.float64, device=adjoint.device)
        for weighted, part in zip(self._weighted, update, strict=True):
            response += weighted.T @ part
        coefficients = torch.cholesky_solve(response, self._system)
        update += self._directions @ coefficients
        return update.permute(2, 0, 1).reshape(count, 3, self._prior.size, self._prior.size)


def _total(grams: Sequence[BlockTridiagonal], weights: Sequence[float]) -> BlockTridiagonal:
    """The sum of the grams, each times its weight."""
    first, weight = grams[0], weights[0]
    start = first if weight == 1 else BlockTridiagonal(weight * first.diagonal, weight * first.lower)
    return functools.reduce(lambda total, part: total.plus(*part), zip(grams[1:], weights[1:], strict=True), start)


class IterativePosterior:
    """The same posterior mean for any linear operator, by conjugate gradients on (A S A^T + s^2) y = r.

    S is the prior's covariance; x = mean + S A^T y. Stopped after ``iterations`` steps: early stopping shrinks towards
    the mean, so that an unconverged answer is a cautious one (Hanke, *Conjugate Gradient Type Methods for Ill-Posed
    Problems*, 1995).

    Where little noise is added, the system is as badly conditioned as S is. A K^-1 S^-1 K^-1 A^T then serves as a
    preconditioner, with K the Gram matrix of the colours in A: it is the inverse where A mixes colours and moves pixels
    about, and near it where A drops some. Where noise prevails it would do harm. Which of both gets further is tried on
    a face drawn from the prior.

    Where channels are left out of what is sent, others for every face, A is the operator's rows for those that are
    there; ``seen``, float64 (C,), is 1 for these in a face that both ways are tried on, and 0 for the others.
    """

    def __init__(
        self,
        covariance: PriorCovariance,
        operator: LinearOperator,
        noise: float,
        iterations: int,
        seen: Tensor | None = None,
    ) -> None:
        self._covariance, self._operator, self._noise, self._iterations = covariance, operator, noise, iterations
        self._usually_seen = 1.0 if seen is None else seen[:, None, None]
        self._uncoloured = self._inverse_of_colours()
        tried = {way: self._error_on_a_draw(_TRIAL_ITERATIONS, way) for way in (False, True)}
        self._preconditioned = tried[True] < tried[False]

    def _inverse_of_colours(self) -> Tensor:
        """K^-1, float64 (3, 3), as far as the colours are seen."""
        size, device = self._covariance.prior.size, self._covariance.prior.mean.device
        noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        sent = self._operator(torch.eye(3, dtype=torch.float64, device=device)[:, :, None, None] * noise).flatten(1)
        inverse: Tensor = torch.linalg.pinv(sent @ sent.T / noise.square().sum(), rtol=1e-6, hermitian=True)
        return inverse

    def converges(self) -> bool:
        """Whether the last half of the iterations gains next to nothing, on a face drawn from the prior."""
        half, whole = (
            self._error_on_a_draw(count, self._preconditioned) for count in (self._iterations // 2, self._iterations)
        )
        return whole >= (1 - _GAIN) * half or whole <= _EXACT

    def _error_on_a_draw(self, iterations: int, preconditioned: bool) -> float:
        """Root mean square error of the estimate of a face drawn from the prior, over that of the mean face."""
        draws = torch.Generator().manual_seed(0)
        face = self._covariance.draw(draws)
        sent = self._operator(face)
        noise = torch.randn(sent.shape, generator=draws, dtype=torch.float64).to(sent)
        estimate = self._solve(sent + self._noise * noise, iterations, preconditioned, self._usually_seen)
        return float(((estimate - face).square().mean() / face.square().mean()).sqrt())

    def __call__(self, residual: Tensor, seen: Tensor | None = None) -> Tensor:
        """x - mean in RGB, float64 (N, 3, H, W), from r = z - offset - A mean, float64 (N, C, h, w).

        ``seen``, float64 (N, C, 1, 1), is 1 for the channels of each face that are there, and 0 for the others.
        """
        return self._solve(residual, self._iterations, self._preconditioned, 1.0 if seen is None else seen)

    def _solve(self, residual: Tensor, iterations: int, preconditioned: bool, seen: Tensor | float) -> Tensor:
        def operator(faces: Tensor) -> Tensor:
            return self._operator(faces) * seen

        def adjoint(representation: Tensor) -> Tensor:
            return self._operator.adjoint(representation * seen)

        def near_inverse(r: Tensor) -> Tensor:
            if not preconditioned:
                return r
            faces = torch.einsum("cd,ndhw->nchw", self._uncoloured, adjoint(r))
            return operator(torch.einsum("cd,ndhw->nchw", self._uncoloured, self._covariance.inverse_times(faces)))

        y, r = torch.zeros_like(residual), residual * seen
        z = near_inverse(r)
        p = z.clone()
        power = (r * z).sum(dim=(1, 2, 3), keepdim=True)
        first = power.clone()
        for _ in range(iterations):
            q = operator(self._covariance.times(adjoint(p))) + self._noise**2 * p
            step = power / (p * q).sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-300)
            y += step * p
            r -= step * q
            z = near_inverse(r)
            new = (r * z).sum(dim=(1, 2, 3), keepdim=True)
            if bool((new <= _CG_TOLERANCE**2 * first).all()):
                break
            p = z + new / power.clamp(min=1e-300) * p
            power = new
        return self._covariance.times(adjoint(y))
