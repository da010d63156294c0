from __future__ import annotations

import pytest

from attacks.schedule import WarmHoldDecay


def test_rises_holds_and_falls():
    schedule = WarmHoldDecay(steps=100, warmup=0.1, decay=0.3)
    factors = [schedule.factor(step) for step in range(schedule.end())]
    assert len(factors) == 100
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:70] == [1.0] * 60
    assert factors[70] == pytest.approx(30 / 31)
    assert factors[99] == pytest.approx(1 / 31)
    assert factors[:10] == sorted(factors[:10])
    assert factors[70:] == sorted(factors[70:], reverse=True)


def test_an_early_decay_keeps_the_shares():
    schedule = WarmHoldDecay(steps=1000, warmup=0.0, decay=0.2)
    assert schedule.end(400) == 500
    assert schedule.factor(399, 400) == 1.0
    assert schedule.factor(499, 400) == pytest.approx(1 / 101)
    assert schedule.end(800) == schedule.end() == 1000


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_every_step_has_a_positive_factor_even_in_the_shortest_training(steps, decay):
    schedule = WarmHoldDecay(steps=steps, warmup=0.5, decay=decay)
    assert 1 <= schedule.hold_end <= steps
    assert all(0 < schedule.factor(step) <= 1 for step in range(steps))


def test_checks_end_with_the_hold_and_hold_its_half():
    schedule = WarmHoldDecay(steps=100, warmup=0.0, decay=0.2)
    assert schedule.checks()[-1] == schedule.hold_end == 80
    assert 40 in schedule.checks()
    assert schedule.checks() == sorted(set(schedule.checks()))
    assert WarmHoldDecay(1, 0.0, 0.0).checks() == [1]
