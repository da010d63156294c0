"""When a strength curve still rises."""

from types import SimpleNamespace

import pytest

from bench.results import Measure
from bench.run.findings import strength_curve

TOLERANCE = {"ssim": 0.005, "cosine": 0.01}


def measure(value, low=None, high=None):
    ci95 = None if low is None else (low, high)
    return Measure(value=value, ci95=ci95, n=9, direction="leakage", reason=None if ci95 else "alike")


def curve(gains, budget="steps=1,2,4"):
    attacks = SimpleNamespace(config=SimpleNamespace(budget=budget))

    def gain(name, after, before):
        assert (after, before) == (2, 1)
        return gains[name]

    def leakage(point):
        return {"ssim": measure(0.1 * point), "psnr": measure(10.0)}

    return strength_curve(attacks, [], range(3), leakage, gain, TOLERANCE)


@pytest.mark.parametrize(
    ("ssim", "cosine", "verdict"),
    [
        (measure(0.02, 0.01, 0.03), measure(0.0, -0.1, 0.1), True),
        (measure(0.0, -0.1, 0.1), measure(0.02, 0.011, 0.03), True),  # either one counts
        (measure(0.02, 0.004, 0.05), measure(0.05, 0.01, 0.09), False),  # not surely above the tolerance
        (measure(-0.1, -0.2, -0.05), measure(-0.1, -0.2, -0.05), False),
        (measure(0.02), measure(0.0), True),  # no interval: the value decides
        (measure(0.002), measure(0.0), False),
    ],
)
def test_a_gain_counts_above_its_tolerance(ssim, cosine, verdict):
    strength = curve({"ssim": ssim, "cosine": cosine})
    assert strength.unsaturated is verdict
    assert strength.gain_of_last_doubling == {"ssim": ssim, "cosine": cosine}
    assert strength.tolerance == TOLERANCE
    assert [point.budget for point in strength.points] == [1, 2, 4]
    assert strength.points[2].values["ssim"].value == pytest.approx(0.2)


@pytest.mark.parametrize(("budget", "compared"), [("steps=2,4,5", False), ("steps=2,4,6", True)])
def test_close_budgets_are_not_compared(budget, compared):
    big = measure(0.5, 0.4, 0.6)
    strength = curve({"ssim": big, "cosine": big}, budget)
    assert strength.unsaturated is (True if compared else None)
    assert (strength.gain_of_last_doubling["ssim"].value is not None) is compared
