"""Cloak: the law of its noise, where it puts it, and a fit that goes on after it was killed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from pictures import generator
from pydantic import ValidationError

from defenses.cloak import Cloak, CloakOptions

SIZE = 16


def told_by_the_left_half(training):
    """The training's faces with noise in their right half, which then tells nothing of who it is."""

    def batches(batch_size, generator):
        for faces, labels in training.batches(batch_size, generator):
            drawn = torch.rand(faces.shape, generator=generator)
            yield torch.where(torch.arange(SIZE) < SIZE // 2, faces, drawn), labels

    return replace(training, batches=batches)


def fitted(training, **options):
    torch.manual_seed(0)
    defense = Cloak(CloakOptions(batch_size=32, **options), image_size=SIZE)
    defense.fit(training)
    return defense.requires_grad_(False).eval()


def test_the_scale_is_that_of_the_paper_and_the_noise_is_normal():
    defense = Cloak(CloakOptions(least=0.1, most=1.1), image_size=SIZE).requires_grad_(False)
    defense.rho.copy_(torch.linspace(-3, 3, defense.rho.numel()).view_as(defense.rho))
    defense.loc.fill_(0.25)
    faces = torch.rand(1, 3, SIZE, SIZE, generator=generator(1), dtype=torch.float64).expand(500, -1, -1, -1)
    sent = defense.protect(faces, generator()).representation
    # (1 + tanh r) / 2 is the logistic function of 2 r.
    scale = 0.1 + 1.0 / (1 + torch.exp(-2 * defense.rho.double()))
    drawn = (sent - (2 * faces - 1) - 0.25) / scale
    assert scipy.stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert float((drawn.std(dim=0) - 1).abs().max()) < 5 / math.sqrt(2 * 500)  # of every element


def test_noise_goes_where_nothing_is_told_and_there_constants_are_sent(make_training):
    defense = fitted(
        told_by_the_left_half(make_training(size=SIZE)),
        recogniser_epochs=30, noise_epochs=20, noise_rate=0.25, size_weight=0.03, later_epochs=2, suppressed=0.25,
    )  # fmt: skip
    left, right = defense.scale[..., : SIZE // 2], defense.scale[..., SIZE // 2 :]
    assert float(right.median()) > 1.2 * float(left.median())
    assert int((~defense.kept).sum()) == 3 * SIZE**2 // 4
    assert float((~defense.kept)[..., SIZE // 2 :].float().mean()) > 0.27  # by chance .25
    faces = torch.rand(2, 3, SIZE, SIZE, generator=generator(2))
    first, second = defense.protect(faces, generator(3)).representation
    assert torch.equal(first[~defense.kept], defense.constant[~defense.kept])
    assert torch.equal(first[~defense.kept], second[~defense.kept])
    assert float(defense.constant[~defense.kept].abs().max()) > 0  # learnt
    assert not (first == second)[defense.kept].any()


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_where_it_was(make_training, tmp_path):
    options = {"recogniser_epochs": 2, "noise_epochs": 1, "later_epochs": 1}
    whole = fitted(make_training(size=SIZE), **options).state_dict()

    def until(done, total, **fields):
        if done > total * 0.7:  # past three of five passes
            raise Killed

    with pytest.raises(Killed):
        fitted(replace(make_training(size=SIZE, folder=tmp_path), report=until), **options)
    resumed = fitted(make_training(size=SIZE, folder=tmp_path), **options).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppressed": 1}, "less than 1"),
        ({"suppressed": "nan"}, "finite|less"),
        ({"least": 2}, "exceeds most"),
        ({"size_weight": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        CloakOptions(**options)
