"""Rounding by the width of the interval."""

import math

import pytest
from run_folders import measure

from bench.measures import KINDS, MISSING, interval, leak, shown
from bench.results import Measure


@pytest.mark.parametrize(
    ("name", "value", "low", "high", "expected", "ends"),
    [
        ("ssim", 0.85123, 0.8449, 0.8571, "0.851", "[0.845, 0.857]"),
        ("ssim", 0.85123, 0.6, 0.95, "0.85", "[0.60, 0.95]"),
        ("type1_tar", 0.478, 0.331, 0.6, "48", "[33, 60]"),
        ("type1_tar", 0.996, 0.988, 1.0, "99.6", "[98.8, 100.0]"),
        ("psnr", 19.804, 19.4, 20.18, "19.80", "[19.40, 20.18]"),
        ("psnr", 19.804, 16.0, 23.0, "19.8", "[16.0, 23.0]"),
        ("psnr", 119.8, 60.0, 140.0, "120", "[60, 140]"),
    ],
)
def test_the_interval_decides_the_digits(name, value, low, high, expected, ends):
    figure = Measure(value=value, ci95=(low, high), direction="utility")
    assert (shown(name, figure), interval(name, figure)) == (expected, ends)


def test_without_an_interval_the_figure_has_its_own_digits():
    figure = Measure(value=0.5, direction="utility")
    assert shown("ssim", figure) == "0.500"
    assert shown("accuracy", figure) == "50.0"
    assert interval("ssim", figure) == ""
    pinned = Measure(value=1.0, ci95=(1.0, 1.0), direction="utility")
    assert shown("ssim", pinned) == "1.000"


def test_what_is_missing_is_a_dash_and_leaks_least():
    for missing in (None, measure(None)):
        assert shown("lpips", missing) == MISSING
        assert leak("lpips", missing) == -math.inf


def test_a_smaller_distance_leaks_more():
    assert leak("lpips", measure(0.1)) > leak("lpips", measure(0.5))
    assert leak("ssim", measure(0.1)) < leak("ssim", measure(0.5))
    assert set(KINDS) >= {"lpips", "ssim", "linkage", "d_sys", "accuracy"}


def test_figures_whose_square_is_no_number_are_refused():
    for figure in ({"value": 1e200}, {"value": 0.5, "ci95": (0.4, -1e308)}):
        with pytest.raises(ValueError, match="no figure is so large"):
            Measure(**figure, direction="leakage")
