"""When a strength curve still rises."""

import pytest

from bench.results import Measure
from bench.run.findings import strength_curve

TOLERANCE = {"ssim": 0.005, "cosine": 0.01}


def measure(value, low=None, high=None):
    ci95 = None if low is None else (low, high)
    return Measure(value=value, ci95=ci95, n=9, direction="leakage", reason=None if ci95 else "alike")


def curve(gains, budgets=(1, 2, 4)):
    values = [{"ssim": measure(0.1 * step), "psnr": measure(10.0)} for step, _ in enumerate(budgets)]
    return strength_curve("steps", budgets, values, lambda name: gains[name], TOLERANCE)


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
    found = curve({"ssim": ssim, "cosine": cosine})
    assert found.unsaturated is verdict
    assert found.gain_of_last_doubling == {"ssim": ssim, "cosine": cosine}
    assert found.tolerance == TOLERANCE
    assert [point.budget for point in found.points] == [1, 2, 4]
    assert found.points[2].values["ssim"].value == pytest.approx(0.2)


@pytest.mark.parametrize(("last", "judged"), [(2.9, False), (3.0, True)])
def test_close_budgets_are_not_judged(last, judged):
    big = measure(0.5, 0.4, 0.6)
    found = curve({"ssim": big, "cosine": big}, budgets=(1, 2, last))
    assert found.unsaturated is (True if judged else None)
    assert (found.gain_of_last_doubling["ssim"].value is not None) is judged
