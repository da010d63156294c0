"""PEEP: eigenfaces against numpy, the law and the scale of the noise, and what the budgets mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from pictures import generator, smooth
from pydantic import ValidationError

from defenses.peep import Peep, PeepOptions

SIZE, COUNT = 16, 200


@pytest.fixture(scope="module")
def faces():
    return smooth(COUNT, SIZE).float() / 255


@pytest.fixture(scope="module")
def fitted(faces, make_training):
    def fit(**options):
        torch.manual_seed(0)
        defense = Peep(PeepOptions(components=12, **options), image_size=SIZE)

        def batches(size, generator):
            return ((part, torch.zeros(len(part), dtype=torch.int64)) for part in faces.split(size))

        defense.fit(replace(make_training(size=SIZE), batches=batches, images=COUNT))
        return defense

    return fit


def test_eigenfaces_are_those_of_a_singular_value_decomposition(fitted, faces):
    defense = fitted()
    flat = faces.flatten(1).double().numpy()
    centred = flat - flat.mean(axis=0)
    basis = defense.basis.flatten(1).double().numpy()
    # Of 12 directions they hold the most there is.
    most = np.linalg.svd(centred, compute_uv=False)[:12]
    np.testing.assert_allclose(np.square(centred @ basis.T).sum(), np.square(most).sum(), rtol=1e-3)
    np.testing.assert_allclose(basis @ basis.T, np.eye(12), atol=1e-5)
    coefficients = centred @ basis.T
    np.testing.assert_allclose(defense.reach, np.ptp(coefficients, axis=0), rtol=1e-4)
    np.testing.assert_allclose(defense.deviation, coefficients.std(axis=0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("sensitivity", ["range", "bound", "l1", "std"])
def test_noise_is_laplace_of_sensitivity_over_epsilon_on_the_coefficients(fitted, faces, sensitivity):
    defense = fitted(sensitivity=sensitivity, epsilon=2.5)
    basis = defense.basis.flatten(1).double()
    expected = {
        "range": defense.reach,
        "bound": basis.abs().sum(dim=1),
        "l1": torch.full((12,), float(defense.reach.sum())),
        "std": defense.deviation,
    }[sensitivity].double() / 2.5
    shown = faces[:1].double().expand(1500, -1, -1, -1)
    sent = defense.protect(shown, generator(3)).representation
    around = sent - (defense.linear_operator(None)(shown[:1]) + defense.linear_operator(None).offset)
    noise = around.flatten(1) @ basis.T
    for column, scale in zip(noise.T, expected, strict=True):
        assert scipy.stats.kstest(column.numpy(), scipy.stats.laplace(scale=float(scale)).cdf).pvalue > 1e-3
    assert float(np.abs(np.corrcoef(noise.T.numpy()) - np.eye(12)).max()) < 0.15  # one draw for each coefficient
    # Nothing is sent beside the coefficients.
    torch.testing.assert_close(noise @ basis, around.flatten(1), rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("sensitivity", ["range", "bound", "l1"])
def test_two_faces_are_told_apart_by_no_more_than_the_budget(fitted, faces, sensitivity):
    """The log-likelihood ratio of two faces of the provider: at most |c - c'| / b for a coefficient, summed for all."""
    defense = fitted(sensitivity=sensitivity, epsilon=1.5)
    coefficients = (faces - defense.mean).flatten(1) @ defense.basis.flatten(1).T
    ratio = (coefficients[:, None] - coefficients[None]).abs() / defense.scale
    budget = defense.epsilon
    assert float(ratio.max()) <= budget["element"] + 1e-4
    assert float(ratio.sum(dim=2).max()) <= budget["image"] + 1e-4
    if sensitivity == "range":  # and it is used up
        assert float(ratio.max()) == pytest.approx(1.5, rel=1e-4)
        assert budget["image"] == 12 * 1.5


def test_one_standard_deviation_claims_nothing(fitted):
    assert fitted(sensitivity="std").epsilon == {}


def test_fewer_faces_than_components(faces, make_training):
    torch.manual_seed(0)
    defense = Peep(PeepOptions(components=64), image_size=24)
    defense.fit(make_training(size=24))  # of 32 faces
    assert int((defense.basis.flatten(1).norm(dim=1) > 0).sum()) == 31
    assert float(defense.scale[31:].abs().max()) == 0


@pytest.mark.parametrize(
    "options", [{"epsilon": 0}, {"epsilon": -1}, {"epsilon": "inf"}, {"components": 0}, {"faces": 1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=r"greater than|finite|less than"):
        PeepOptions(**options)
