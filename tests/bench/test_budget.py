"""What can be written after --budget, and what it makes of an attempt."""

from typing import ClassVar

import pytest

from bench import plugins
from bench.attempt import Attempt, attempts
from bench.budget import Budget
from bench.config import resolve
from bench.errors import UsageError

BASE = {"defense": "none", "attack": "unet"}


@pytest.mark.parametrize(
    ("text", "axis", "values"),
    [
        ("k=1,2,4", "k", (1, 2, 4)),
        ("k=8", "k", (1, 2, 4, 8)),
        ("k=2", "k", (1, 2)),  # no eighth of an interception
        (" steps = 1000 ", "steps", (125, 250, 500, 1000)),
        ("data=1", "data", (0.125, 0.25, 0.5, 1)),
        ("data=0.4", "data", (0.05, 0.1, 0.2, 0.4)),
        ("data=0.1,1", "data", (0.1, 1)),
        ("data=500,1000", "data", (500, 1000)),
        ("data=1000", "data", (125, 250, 500, 1000)),
    ],
)
def test_values_are_read(text, axis, values):
    budget = Budget.parse(text)
    assert (budget.axis, budget.values) == (axis, pytest.approx(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k", "write AXIS=VALUES"),
        ("=1,2", "write AXIS=VALUES"),
        ("k=", "write AXIS=VALUES"),
        ("k=1,a", "not a list of numbers"),
        ("k=1,,2", "not a list of numbers"),
        ("k=0,1", "above 0"),
        ("k=1,inf", "above 0"),
        ("k=1", "at least two"),
        ("k=2,1", "each above the one before"),
        ("k=2,2", "each above the one before"),
        ("k=1,2.5", "whole numbers"),
        ("steps=0.5,1", "whole numbers"),
        ("data=0.5,1.5", "whole numbers, or all shares up to 1"),
        ("data=1,500", "all shares up to 1 or all numbers of faces"),
    ],
)
def test_what_cannot_be_is_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)
    with pytest.raises(UsageError, match=message):
        resolve({**BASE, "budget": text}, {})


def test_a_run_without_one_has_one_attempt():
    config = resolve({**BASE, "queries": 3, "attack_options": {"images": "77"}}, {})
    assert attempts(config) == [Attempt("unet", "cpu", {"images": "77"}, interceptions=3)]


class TestAttempts:
    @pytest.fixture(autouse=True)
    def _axis(self, monkeypatch):
        class Stepping(plugins.attacks().get("unet")):
            budgets: ClassVar = {"steps": "images"}

        monkeypatch.setitem(plugins.attacks()._loaded, "unet", Stepping)

    def test_the_last_is_the_runs_own(self):
        config = resolve({**BASE, "budget": "steps=100,200", "attack_options": {"widths": "4,8"}}, {})
        first, last = attempts(config)
        assert first.make().options.images == 100
        assert last.make().options.images == 200
        assert last.make().options.widths == first.make().options.widths == (4, 8)
        config = resolve({**BASE, "budget": "data=0.5,1", "queries": 2}, {})
        assert [(one.public, one.interceptions) for one in attempts(config)] == [(0.5, 2), (1, 2)]
        config = resolve({**BASE, "budget": "k=1,4"}, {})
        assert [(one.public, one.interceptions) for one in attempts(config)] == [(1, 1), (1, 4)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"budget": "images=1,2"}, r"unet has no axis 'images' \(axes: data, k, steps\)"),
            ({"budget": "steps=1,2", "attack_options": {"images": "3"}}, "both set images of unet"),
            ({"budget": "k=1,2", "queries": 4}, "--queries 4 is not the largest"),
        ],
    )
    def test_contradictions_are_refused(self, changes, message):
        with pytest.raises(UsageError, match=message):
            attempts(resolve({**BASE, **changes}, {}))
