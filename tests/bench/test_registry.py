"""The registry: lazy, and helpful about names it does not know."""

import pytest

from bench.errors import UsageError
from bench.registry import Registry


def test_loads_lazily_and_once():
    loads = []
    registry = Registry[str]("thing")
    registry.add("one", lambda: loads.append(1) or "ONE")
    assert loads == []
    assert registry.get("one") == "ONE"
    assert registry.get("one") == "ONE"
    assert loads == [1]


def test_unknown_name_lists_what_exists_and_the_nearest():
    registry = Registry[int]("defence")
    for name in ("partialface", "none", "blur"):
        registry.add(name, lambda: 0)
    with pytest.raises(UsageError) as caught:
        registry.get("partailface")
    message = str(caught.value)
    assert "unknown defence 'partailface'" in message
    assert "did you mean 'partialface'?" in message
    assert "blur, none, partialface" in message
    assert caught.value.exit_code == 2


def test_far_off_name_gets_no_suggestion():
    registry = Registry[int]("defence")
    registry.add("none", lambda: 0)
    with pytest.raises(UsageError) as caught:
        registry.get("xyzzy")
    assert "did you mean" not in str(caught.value)


def test_a_name_can_be_taken_once():
    registry = Registry[int]("head")
    registry.add("arcface", lambda: 1)
    with pytest.raises(ValueError, match="two heads are called 'arcface'"):
        registry.add("arcface", lambda: 2)


def test_iterates_in_order():
    registry = Registry[int]("head")
    for name in ("b", "a"):
        registry.add(name, lambda: 1)
    assert list(registry) == ["a", "b"]
    assert "a" in registry
    assert "c" not in registry
