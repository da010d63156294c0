"""When a strength curve still rises, and when an attack is no better than a guess."""

from types import SimpleNamespace

import pytest

from bench.metrics.bootstrap import ALIKE
from bench.results import NO_BETTER, AttackInfo, Measure
from bench.run.findings import FLOOR_MARGINS, Findings, chance_test, floor_test, strength_curve

TOLERANCE = {"ssim": 0.005, "cosine": 0.01}


def measure(value, low=None, high=None):
    ci95 = None if low is None else (low, high)
    return Measure(value=value, ci95=ci95, n=9, direction="leakage", reason=None if ci95 else ALIKE)


FEW = Measure(value=0.9, n=9, direction="leakage", reason="a confidence interval needs at least two identities")


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


def test_the_floor_that_comes_nearest_decides_and_its_interval_must_clear_the_margin():
    low = FLOOR_MARGINS["ssim"]

    def tested(**ends):
        return floor_test({"ssim": {name: measure(0.1, end, 0.3) for name, end in ends.items()}}, FLOOR_MARGINS)

    assert tested(grey=0.2, noise=low + 1e-6).above is True
    close = tested(grey=0.2, noise=low - 1e-6)
    assert close.above is False
    assert close.floors == {"ssim": "noise"}
    assert close.gains["ssim"].ci95 == (low - 1e-6, 0.3)
    assert close.told() == "SSIM +0.100 [+0.010, +0.300] against noise"


def test_one_figure_is_enough_and_without_any_nothing_is_said():
    lost, nothing = {"grey": measure(-0.1, -0.2, -0.05)}, {"grey": measure(None)}
    assert floor_test({"ssim": lost, "cosine": {"grey": measure(0.1, 0.05, 0.2)}}, FLOOR_MARGINS).above is True
    # A judge that cannot judge leaves the picture to decide.
    assert floor_test({"ssim": lost, "cosine": nothing}, FLOOR_MARGINS).above is False
    blind = floor_test({"ssim": nothing, "cosine": nothing}, FLOOR_MARGINS)
    assert (blind.above, blind.gains) == (None, {})


@pytest.mark.parametrize(
    ("accuracy", "auc", "above"),
    [
        (measure(0.6, 0.55, 0.65), measure(0.5, 0.4, 0.6), True),
        (measure(0.6, 0.50, 0.70), measure(0.6, 0.5, 0.7), False),
        (measure(0.5, 0.4, 0.6), measure(0.7, 0.6, 0.8), True),
        (measure(0.6), measure(None), True),  # the same in every resample: there is nothing to be unsure of
        (measure(0.5), measure(0.5), False),
        (FEW, FEW, None),  # too few people decide nothing
    ],
)
def test_linkage_is_held_against_guessing(accuracy, auc, above):
    assert chance_test({"linkage": accuracy, "linkage_auc": auc}).above is above


@pytest.mark.parametrize("saturated", [True, False])
def test_of_an_attack_no_better_than_a_floor_nothing_is_called_saturated(saturated):
    findings = Findings(several=False)
    info = AttackInfo(name="a", options={}, knowledge="whitebox", saturated=saturated, states_covered=None)
    under = floor_test({"ssim": {"grey": measure(-0.1, -0.2, -0.05)}}, FLOOR_MARGINS)
    over = floor_test({"ssim": {"grey": measure(0.4, 0.3, 0.5)}}, FLOOR_MARGINS)
    flat = curve(dict.fromkeys(("ssim", "cosine"), measure(0.0, -0.1, 0.1)))
    assert flat.unsaturated is False
    findings.add(info, flat, under, over, {})
    found = findings.results["a"]
    assert (found.attack.above_floor, found.attack.broken) == (False, False)
    assert found.attack.saturated is found.strength.unsaturated is None
    assert findings.warnings[0].startswith(NO_BETTER)
    findings.add(info, flat, over, under, {})
    found = findings.results["a"]
    assert (found.attack.above_floor, found.attack.broken) == (True, True)
    assert found.attack.saturated is saturated
    assert found.strength.unsaturated is False
    assert any("broken" in warning for warning in findings.warnings)
