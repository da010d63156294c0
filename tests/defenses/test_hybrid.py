"""Hybrid: details and colours against plain means, and noise of the law and scale that its epsilon asks for."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from pictures import generator, noise
from pydantic import ValidationError
from torch.nn import functional

from defenses.hybrid import Hybrid, HybridOptions


def parts(size, count=2, **options):
    defense, faces = Hybrid(HybridOptions(**options), image_size=size), noise(count, size)
    return defense, faces, defense.unpack(defense.protect(faces, generator()).representation)


@pytest.mark.parametrize("size", [28, 56])
def test_parts_are_luma_without_local_means_and_mean_colours(size):
    defense, faces, sent = parts(size, epsilon=1e9)
    luma = (faces * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    cell = 8 * size // 112
    means = functional.avg_pool2d(luma, cell).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    torch.testing.assert_close(sent["detail"], luma - means, rtol=0, atol=1e-6)
    torch.testing.assert_close(sent["colour"], functional.avg_pool2d(faces, size // 7), rtol=0, atol=1e-6)
    assert defense.bytes_per_face() == 4 * (size**2 + 3 * 49)


def test_noise_is_laplace_of_the_scale_that_epsilon_asks_for():
    defense, faces, sent = parts(32, count=64, epsilon=5)
    exact = defense.unpack(defense.linear_operator(None)(faces))
    for name, sensitivity in {"detail": 2, "colour": 1}.items():
        off = (sent[name] - exact[name]).flatten()
        assert scipy.stats.kstest(off, "laplace", (0, sensitivity / 5)).pvalue > 1e-3
        assert abs(float((off[1:] * off[:-1]).mean() / off.var())) < 5 / math.sqrt(len(off))


def test_the_budget_of_a_face_is_that_of_its_numbers_together():
    defense = Hybrid(HybridOptions(epsilon=2), image_size=32)
    assert defense.epsilon == {"element": 2, "image": 2 * (32 * 32 + 3 * 7 * 7)}
    faces = torch.stack((torch.zeros(3, 32, 32), torch.ones(3, 32, 32)))
    faces[1, :, 5, 5] = 0  # details and colours stay within the widths that the noise is made for
    sent = defense.unpack(defense.linear_operator(None)(faces))
    assert float(sent["detail"].abs().max()) <= 1
    assert float(sent["colour"].max()) <= 1


@pytest.mark.parametrize("option", [{"epsilon": 0}, {"epsilon": -1}, {"cell": 0}, {"sparsity": 113}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValidationError, match=next(iter(option))):
        HybridOptions(**option)
