"""LDP-Slicing: the details that it keeps, the chance of each bit, its price in epsilon, and what averaging gives."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from pictures import generator, noise
from pydantic import ValidationError

from defenses.ldp_slicing import LDPSlicing, LDPSlicingOptions

EXACT = 1e5  # a budget that keeps every bit


def made(size=16, **options):
    return LDPSlicing(LDPSlicingOptions(**options), image_size=size)


def sent(defense, faces, seed=0):
    return defense.protect(faces, generator(seed)).representation


def haar_without_ll(plane, levels):
    """One plane (H, W) whose coarsest low-low band is zeroed, by the transform's own sums and differences."""
    if levels == 0:
        return torch.zeros_like(plane)
    a, b, c, d = plane[::2, ::2], plane[::2, 1::2], plane[1::2, ::2], plane[1::2, 1::2]
    low, across, down, both = (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2
    low = haar_without_ll(low, levels - 1)
    back = torch.empty_like(plane)
    back[::2, ::2], back[::2, 1::2] = (low + across + down + both) / 2, (low - across + down - both) / 2
    back[1::2, ::2], back[1::2, 1::2] = (low + across - down - both) / 2, (low - across - down + both) / 2
    return back


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_what_is_sliced_is_the_haar_transform_without_its_low_low_band(levels):
    faces = 0.3 + 0.4 * noise(2, 16)  # no detail leaves the eight bits
    red, green, blue = (255 * faces).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = luma, 0.564 * (blue - luma), 0.713 * (red - luma)
    picture = 255 * sent(made(levels=levels, epsilon=EXACT, reading="picture"), faces)
    for colour, plane in enumerate(planes):
        expected = torch.stack([haar_without_ll(face, levels) for face in plane]) + 128
        assert float((picture[:, colour] - expected).abs().max()) < 0.55  # rounding, and constants of three digits


def test_planes_spell_the_picture():
    faces = noise(2, 16)
    planes, picture = (sent(made(reading=reading), faces) for reading in ("planes", "picture"))
    assert set(planes.unique().tolist()) == {0.0, 1.0}
    values = (planes.view(2, 3, 8, 16, 16) * 2.0 ** torch.arange(8)[:, None, None]).sum(dim=2)
    torch.testing.assert_close(picture, values / 255)


def test_every_plane_flips_as_often_as_its_share_of_the_budget_says():
    """The chances are those of the definition, worked out here; what is flipped is binomial in every plane."""
    shares = [math.sqrt(weight * 2 ** (bit - 1)) for weight in (4, 1, 1) for bit in range(1, 9)]
    keep = [1 / (1 + math.exp(-20 * share / sum(shares))) for share in shares]
    faces = noise(16, 64)
    truth, lies = sent(made(64, epsilon=EXACT), faces), sent(made(64), faces)
    trials = truth[:, 0].numel()
    flipped = (truth != lies).transpose(0, 1).flatten(1)
    for chance, plane in zip(keep, flipped, strict=True):
        assert scipy.stats.binomtest(int(plane.sum()), trials, 1 - chance).pvalue > 1e-4
    # Independent: of neighbouring bits, pixels and faces.
    wild = flipped.double() - flipped.double().mean(dim=1, keepdim=True)
    wild = wild / wild.norm(dim=1, keepdim=True)
    assert float((wild @ wild.T - torch.eye(24)).abs().max()) < 5 / math.sqrt(trials)
    for shift in (1, 64, 64 * 64):
        assert float((wild[:, shift:] * wild[:, :-shift]).sum(dim=1).abs().max()) < 5 / math.sqrt(trials)


def test_the_budget_is_what_the_bits_cost_together():
    defense = made(24, epsilon=3)
    keep = defense.keep
    spent = (keep / (1 - keep)).log()  # of one bit under randomised response
    assert float(spent.sum()) == pytest.approx(3)
    assert defense.epsilon == {"element": 3, "image": pytest.approx(3 * 24 * 24)}
    assert float(spent[0, 7] / spent[0, 0]) == pytest.approx(math.sqrt(128))
    assert float(spent[0, 3] / spent[1, 3]) == pytest.approx(2)


def test_debiased_readings_are_the_linear_map_under_noise_that_averages_out():
    defense, faces = made(12, reading="debiased"), 0.3 + 0.4 * noise(1, 12)
    operator = defense.linear_operator(None)
    expected = operator(faces) + operator.offset
    draws = sent(defense, faces.expand(4000, -1, -1, -1))
    off, error = draws.mean(dim=0) - expected[0], draws.std(dim=0) / math.sqrt(len(draws))
    assert float((off / error).square().mean()) == pytest.approx(1, abs=0.3)  # rounding hides in the noise
    keep = defense.keep
    variance = (4.0 ** torch.arange(8) * keep * (1 - keep) / (2 * keep - 1) ** 2).sum(dim=1) / 255**2
    torch.testing.assert_close(draws.var(dim=0).mean(dim=(1, 2)), variance, rtol=0.03, atol=0)
    assert made(12).linear_operator(None) is None


def test_three_bytes_a_pixel_are_sent_however_they_are_read():
    assert [made(24, reading=reading).bytes_per_face() for reading in ("planes", "debiased", "picture")] == [1728] * 3


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan])
def test_a_budget_is_positive(epsilon):
    with pytest.raises(ValidationError, match="epsilon"):
        LDPSlicingOptions(epsilon=epsilon)


def test_a_single_square_leaves_only_brightness_out():
    """The weakest form: the band that is zeroed holds one mean for the whole face."""
    faces = noise(1, 16)
    first, second = (sent(made(levels=10, epsilon=EXACT), shown) for shown in (0.25 + faces / 2, 0.125 + faces / 2))
    assert float((first != second).double().mean()) < 0.2  # rounding alone


@pytest.mark.parametrize("reading", ["debiased", "picture"])
def test_half_precision_in_training_changes_nothing_of_what_is_sent(reading):
    defense, faces = made(reading=reading), noise(2, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = sent(defense, faces)
    torch.testing.assert_close(half, sent(defense, faces))
