from __future__ import annotations

import pytest

from attacks.plateau import Plateau

FLOOR = 0.2


def test_a_flat_last_doubling_is_a_plateau_whatever_came_before():
    assert Plateau().reached([(1, 0.2), (2, 0.1), (4, 0.0995)], FLOOR)


def test_a_falling_last_doubling_is_none():
    assert not Plateau().reached([(1, 0.11), (2, 0.1), (4, 0.09)], FLOOR)


@pytest.mark.parametrize(("loss", "reached"), [(0.0971, True), (0.0969, False)])
def test_the_relative_tolerance_is_a_share_of_the_earlier_loss(loss, reached):
    assert Plateau(relative=0.03, absolute=1e-9).reached([(100, 0.1), (200, loss)], FLOOR) is reached


@pytest.mark.parametrize(("loss", "reached"), [(0.0081, True), (0.0079, False)])
def test_the_absolute_tolerance_is_a_share_of_the_floor(loss, reached):
    assert Plateau(relative=1e-9, absolute=0.01).reached([(100, 0.01), (200, loss)], FLOOR) is reached


def test_a_rising_loss_is_a_plateau():
    assert Plateau().reached([(1, 0.1), (2, 0.12)], FLOOR)


@pytest.mark.parametrize("curve", [[], [(8, 0.1)], [(5, 0.1), (8, 0.1)], [(1, 0.1), (8, 0.1)]])
def test_without_a_point_near_half_nothing_is_claimed(curve):
    assert Plateau().gain(curve) is None
    assert not Plateau().reached(curve, FLOOR)


@pytest.mark.parametrize(("loss", "reached"), [(1.02, True), (1.04, False)])
def test_what_does_worse_than_the_floor_has_not_come_to_rest(loss, reached):
    assert Plateau(relative=0.03).reached([(100, loss * FLOOR), (200, loss * FLOOR)], FLOOR) is reached


def test_the_point_nearest_to_half_is_compared():
    assert Plateau().gain([(30, 0.5), (50, 0.3), (60, 0.25), (100, 0.2)]) == pytest.approx(0.1)
