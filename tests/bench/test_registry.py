"""The registry: lazy, and helpful about names it does not know."""

import pytest

from bench.errors import UsageError
from bench.registry import Registry


def test_loads_lazily_and_once():
    loads = []
    registry = Registry[str]("thing")
    registry.add("name", lambda: loads.append(1) or "object")
    assert loads == []
    assert registry.get("name") == registry.get("name") == "object"
    assert loads == [1]


@pytest.mark.parametrize(
    ("name", "near"), [("partailface", "did you mean 'partialface'? available"), ("xyzzy", "'xyzzy': available")]
)
def test_unknown_name_lists_what_exists_and_the_nearest(name, near):
    registry = Registry[int]("defence")
    for known in ("partialface", "none", "blur"):
        registry.add(known, lambda: 0)
    with pytest.raises(UsageError) as caught:
        registry.get(name)
    assert f"unknown defence {name!r}: " in str(caught.value)
    assert f"{near}: blur, none, partialface" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_name_can_be_taken_once():
    registry = Registry[int]("head")
    registry.add("arcface", lambda: 1)
    with pytest.raises(ValueError, match="two heads are called 'arcface'"):
        registry.add("arcface", lambda: 2)


def test_iterates_in_order():
    registry = Registry[str]("head")
    for name in ("b", "a"):
        registry.add(name, lambda name=name: name.upper())
    assert list(registry) == ["a", "b"]
    assert dict(registry.items()) == {"a": "A", "b": "B"}
    assert "c" not in registry
