"""Against the textbook: the conditional mean of a joint Gaussian, with every matrix written out."""

import pytest
import torch
from pictures import smooth

from attacks.parts.gaussian_prior import GaussianPrior
from attacks.parts.posterior import IterativePosterior, Posterior, PriorCovariance, row_reach
from defenses.frequency import FrequencyOperator
from defenses.linear import IdentityOperator, SeparableOperator

SIZE, RANK, NOISE = 8, 4, 0.03


class Sum:
    """Several maps with factors given, of colours mixed by a matrix."""

    def __init__(self, row_factors, column_factors, colour):
        self.row_factors, self.column_factors, self.colour = row_factors, column_factors, colour
        self.offset = torch.zeros(1, 1, 1, dtype=torch.float64)

    def __call__(self, faces):
        planes = torch.einsum("pc,nchw->nphw", self.colour, faces)
        return torch.einsum("kih,nphw,kjw->npkij", self.row_factors, planes, self.column_factors).flatten(1, 2)

    def adjoint(self, representation):
        maps = representation.unflatten(1, (len(self.colour), -1))
        planes = torch.einsum("kih,npkij,kjw->nphw", self.row_factors, maps, self.column_factors)
        return torch.einsum("pc,nphw->nchw", self.colour, planes)


def banded(seed):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(4, SIZE, SIZE, generator=generator, dtype=torch.float64)
    near = (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs() <= 1
    factors = factors * near
    colour = torch.tensor([[0.3, 0.6, 0.1], [-0.2, -0.3, 0.5], [0.5, -0.4, -0.1]], dtype=torch.float64)
    return Sum(factors[:2], factors[2:], colour)


def wide():
    x = torch.arange(SIZE, dtype=torch.float64)
    return SeparableOperator(torch.softmax(-0.1 * (x[:, None] - x).square(), dim=1))


def coarse():
    return SeparableOperator(torch.eye(4, dtype=torch.float64).repeat_interleave(2, dim=1) / 2)


def frequencies(factor):
    """Three channels of an up-sampled face, fewer numbers than pixels at factors below 8: factors are rectangular."""
    return FrequencyOperator(SIZE, torch.tensor([11, 18, 4]), upsampling=factor)


OPERATORS = {"banded": banded(0), "coarse": coarse(), "wide": wide(), "identity": IdentityOperator(SIZE)} | {
    f"upsampling {factor}": frequencies(factor) for factor in (8, 4, 3, 2, 1)
}


def prior_for(operator):
    prior = GaussianPrior(SIZE, RANK)
    prior.fit(smooth(200, SIZE), torch.arange(200) // 4, operator.colour, 0, held_out=0.25, most=400)
    return prior


def dense_covariance(prior):
    """Of faces in RGB, (3 H W)^2."""
    basis = prior.components.double()
    covariance = torch.einsum("pir,r,qjr->piqj", basis, prior.variances, basis)
    for plane in range(3):
        blocks = prior.precision(plane, 2)
        precision = blocks @ torch.eye(SIZE * SIZE, dtype=torch.float64)
        covariance[plane, :, plane] += torch.linalg.inv(precision)
    turn = torch.linalg.inv(prior.planes)
    return torch.einsum("cp,piqj,dq->cidj", turn, covariance, turn).reshape(3 * SIZE**2, -1)


def dense(operator):
    unit = torch.eye(3 * SIZE**2, dtype=torch.float64).view(-1, 3, SIZE, SIZE)
    return operator(unit).flatten(1).T


def textbook(prior, operators, noise, representations):
    """mean + S A^T (A S A^T + s^2)^-1 (z - A mean)."""
    matrix = torch.cat([dense(operator) for operator in operators])
    covariance = dense_covariance(prior)
    mean = prior.to_faces(prior.mean[None]).flatten()
    system = matrix @ covariance @ matrix.T + noise**2 * torch.eye(len(matrix), dtype=torch.float64)
    residual = torch.cat([z.flatten(1) for z in representations], dim=1).T - (matrix @ mean)[:, None]
    return (mean[:, None] + covariance @ matrix.T @ torch.linalg.solve(system, residual)).T.view(-1, 3, SIZE, SIZE)


def applied(prior, operators, noise, representations):
    posterior = Posterior(PriorCovariance(prior), operators, noise)
    mean = prior.to_faces(prior.mean[None])
    turn = torch.linalg.inv(prior.planes)
    scale = prior.strengths.clamp(min=1e-300)[:, None, None]
    residuals = [z - operator(mean) for z, operator in zip(representations, operators, strict=True)]
    adjoint = sum(operator.adjoint(r) for r, operator in zip(residuals, operators, strict=True))
    planes = torch.einsum("cp,nchw->nphw", turn, adjoint) / scale
    maps = None
    if posterior.needs_maps:
        maps = torch.einsum("cp,nchw->nphw", operators[0].colour @ turn, residuals[0]) / scale
    return mean + prior.to_faces(posterior(planes, maps))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("block", [2, 1024], ids=["singular", "banded"])
def test_posterior_mean_is_the_textbooks(name, block, monkeypatch):
    operator = OPERATORS[name]
    if block == 2 and len(operator.row_factors) > 1:
        pytest.skip("several maps are never taken to singular vectors")
    monkeypatch.setattr("attacks.parts.posterior._LARGEST_BLOCK", block)
    monkeypatch.setattr("attacks.parts.posterior._BELOW_NOISE", 0.0)  # nothing left out
    prior = prior_for(operator)
    sent = operator(smooth(5, SIZE, seed=3).double() / 255)
    estimate = applied(prior, [operator], NOISE, [sent])
    torch.testing.assert_close(estimate, textbook(prior, [operator], NOISE, [sent]), rtol=0, atol=1e-7)


def test_several_interceptions_are_one_posterior():
    operators = [banded(0), banded(1)]
    prior = prior_for(operators[0])
    faces = smooth(3, SIZE, seed=3).double() / 255
    sent = [operator(faces) for operator in operators]
    estimate = applied(prior, operators, NOISE, sent)
    torch.testing.assert_close(estimate, textbook(prior, operators, NOISE, sent), rtol=0, atol=1e-7)
    alone = applied(prior, operators[:1], NOISE, sent[:1])
    assert float((estimate - faces).square().mean()) < float((alone - faces).square().mean())


def test_leaving_out_what_drowns_in_noise_changes_nothing(monkeypatch):
    operator = wide()
    monkeypatch.setattr("attacks.parts.posterior._LARGEST_BLOCK", 2)
    prior = prior_for(operator)
    sent = [operator(smooth(5, SIZE, seed=3).double() / 255)]
    some = applied(prior, [operator], NOISE, sent)
    torch.testing.assert_close(some, textbook(prior, [operator], NOISE, sent), rtol=0, atol=5e-3)


def test_conjugate_gradients_converge_to_the_same():
    operator = banded(0)
    prior = prior_for(operator)
    sent = operator(smooth(4, SIZE, seed=3).double() / 255)
    posterior = IterativePosterior(PriorCovariance(prior), operator, NOISE, 400)
    mean = prior.to_faces(prior.mean[None])
    estimate = mean + posterior(sent - operator(mean))
    torch.testing.assert_close(estimate, textbook(prior, [operator], NOISE, [sent]), rtol=0, atol=1e-6)


def test_a_few_conjugate_gradient_steps_stay_near_the_mean():
    operator = banded(0)
    prior = prior_for(operator)
    mean = prior.to_faces(prior.mean[None])
    residual = operator(smooth(4, SIZE, seed=3).double() / 255) - operator(mean)
    few = IterativePosterior(PriorCovariance(prior), operator, NOISE, 1)(residual).norm()
    many = IterativePosterior(PriorCovariance(prior), operator, NOISE, 400)(residual).norm()
    assert 0 < float(few) < float(many)


class Moved:
    """Pixels in another order, some of them lost."""

    offset = torch.zeros((), dtype=torch.float64)

    def __init__(self, share):
        draws = torch.Generator().manual_seed(1)
        self._order = torch.randperm(3 * SIZE**2, generator=draws)
        self._kept = (torch.rand(3 * SIZE**2, generator=draws) < share).double()

    def __call__(self, faces):
        return (faces.flatten(1)[:, self._order] * self._kept).view_as(faces)

    def adjoint(self, representation):
        return (representation.flatten(1) * self._kept)[:, self._order.argsort()].view_as(representation)


def test_pixels_that_were_only_moved_are_put_back_within_a_few_steps():
    operator, prior = Moved(1.0), prior_for(banded(0))
    faces = smooth(4, SIZE, seed=3).double() / 255
    mean = prior.to_faces(prior.mean[None])
    posterior = IterativePosterior(PriorCovariance(prior), operator, 1e-6, 10)
    torch.testing.assert_close(mean + posterior(operator(faces - mean)), faces, rtol=0, atol=1e-5)
    assert posterior.converges()


def test_too_few_steps_are_told():
    operator, prior = Moved(0.3), prior_for(banded(0))
    assert not IterativePosterior(PriorCovariance(prior), operator, 1e-6, 4).converges()
    assert IterativePosterior(PriorCovariance(prior), operator, 1e-6, 300).converges()


def test_huge_noise_leaves_the_mean():
    operator = banded(0)
    prior = prior_for(operator)
    estimate = applied(prior, [operator], 1e6, [operator(smooth(2, SIZE, seed=3).double() / 255)])
    torch.testing.assert_close(estimate, prior.to_faces(prior.mean[None]).expand_as(estimate), rtol=0, atol=1e-6)


def test_reach_of_maps():
    assert row_reach([IdentityOperator(SIZE)]) == 0
    assert row_reach([banded(0)]) == 2
    assert row_reach([coarse()]) == 1


def test_two_maps_that_mix_far_rows_are_refused(monkeypatch):
    monkeypatch.setattr("attacks.parts.posterior._LARGEST_BLOCK", 2)
    prior = prior_for(wide())
    with pytest.raises(ValueError, match="solver=cg"):
        Posterior(PriorCovariance(prior), [wide(), wide()], NOISE)
