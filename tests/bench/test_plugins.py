"""Plug-ins: one file is enough, entry points work, bad options are one line."""

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from bench import plugins
from bench.data.loaders import DATASETS
from bench.errors import UsageError
from defenses.base import Defense


def test_every_file_is_a_plugin_named_after_it_but_support_modules():
    registry = plugins.defenses()
    assert {"none", "blur", "pixelate", "noise", "arcface-fd", "fixed-subset", "partialface"} <= set(registry)
    assert all(plugin.name == name for name, plugin in registry.items())
    assert plugins.attacks().get("unet").name == "unet"
    assert not {"base", "frequency"} & {*registry, *plugins.attacks()}


def test_a_new_file_is_found_without_touching_another(tmp_path, monkeypatch):
    package = types.ModuleType("extra_defenses")
    package.__path__ = [str(tmp_path)]
    package.SUPPORT_MODULES = frozenset({"base"})
    (tmp_path / "base.py").write_text("from defenses.base import Defense\n")
    (tmp_path / "my_defense.py").write_text(
        "from defenses.base import Defense\n"
        "class Mine(Defense):\n"
        "    name = 'my-defense'\n"
        "    summary = 'mine'\n"
        "    @property\n"
        "    def representation_shape(self):\n"
        "        return (3, self.image_size, self.image_size)\n"
        "    def transform(self, faces, state, generator):\n"
        "        return faces\n"
    )
    monkeypatch.setitem(sys.modules, "extra_defenses", package)
    registry = plugins._registry("defence", "extra_defenses", "Defense")
    assert list(registry) == ["my-defense"]
    assert issubclass(registry.get("my-defense"), Defense)
    for name in ("extra_defenses.my_defense", "extra_defenses.base"):
        sys.modules.pop(name, None)


def test_entry_points_are_plugins(monkeypatch):
    entry = EntryPoint(name="third-party", value="defenses.none:" + plugins.defenses().get("none").__name__, group="g")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "bench.defenses" else [])
    registry = plugins._registry("defence", "defenses", "Defense")
    assert registry.get("third-party") is plugins.defenses().get("none")


@pytest.mark.parametrize(
    ("value", "message"), [("no_such_module:X", "cannot be imported"), ("pathlib:Path", "is not a Defense")]
)
def test_a_broken_entry_point_is_one_line(monkeypatch, value, message):
    entry = EntryPoint(name="third-party", value=value, group="g")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    registry = plugins._registry("defence", "defenses", "Defense")
    with pytest.raises(UsageError, match=message):
        registry.get("third-party")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise SystemExit(0)", r"cannot be imported: .*wanted to end the process \(SystemExit: 0\)"),
        ("Mine.summary = 5", r"its summary: input should be a valid string \(got 5\)"),
        ("Mine.name = '../outside'", r"cannot be called '../outside'"),
        ("Mine.presets = [1]", "its presets: input should be a valid dictionary"),
        ("Mine.Options = dict", "its Options: input should be a subclass of DefenseOptions"),
        ("Mine.trainable = 'perhaps'", "its trainable: input should be a valid boolean"),
        ("class Mine(Defense): pass", "does not define transform"),
    ],
)
def test_a_plugin_that_is_none_is_named_with_what_it_lacks(monkeypatch, tmp_path, statement, message):
    (tmp_path / "broken_plugin.py").write_text(
        f"from defenses.base import Defense\nfrom defenses.none import Unprotected as Mine\n{statement}\n"
        if statement.startswith(("raise", "class"))
        else f"from defenses.none import Unprotected\nclass Mine(Unprotected): pass\n{statement}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("third", "broken_plugin:Mine", group)])
    try:
        with pytest.raises(UsageError, match=message):
            plugins._registry("defence", "defenses", "Defense").get("third")
    finally:
        sys.modules.pop("broken_plugin", None)


@pytest.mark.parametrize(
    ("name", "message"), [("none", "another defence has this name"), ("../x", "cannot be called '../x'")]
)
def test_a_name_that_cannot_be_one_is_refused(monkeypatch, name, message):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint(name, "theirs:Mine", group)])
    with pytest.raises(UsageError, match=message):
        plugins._registry("defence", "defenses", "Defense")


class Inner(BaseModel):
    depth: int = Field(2, ge=1, lt=9, description="How deep.")


class Outer(BaseModel):
    name: str = Field(description="What it is called.")
    kind: Literal["a", "b"] = Field("a", description="Which.")
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field((4, 8), min_length=1, description="Widths.")
    limit: float | None = Field(None, gt=0, description="At most.")
    inner: Inner = Inner(depth=5)
    callback: Callable[[], int] | None = Field(None, description="Nothing that JSON knows.")


def test_an_option_model_is_described():
    options = {option.name: option for option in plugins.describe(Outer)}
    assert list(options) == ["name", "kind", "widths", "limit", "inner.depth", "callback"]
    shown = {name: (option.type, option.default, option.range) for name, option in options.items()}
    assert shown["name"] == ("text", None, "")
    assert shown["kind"] == ("a | b", "a", "")
    assert shown["widths"] == ("list of int", [4, 8], "at least 1, each >= 1")
    assert shown["limit"] == ("float | none", None, "> 0")
    assert shown["inner.depth"] == ("int", 5, ">= 1, < 9")
    assert [option.required for option in options.values()] == [True] + [False] * 5
    assert [option.meaning for option in options.values()][-2:] == ["How deep.", "Nothing that JSON knows."]


@pytest.mark.parametrize("registry", [plugins.defenses(), plugins.attacks(), DATASETS], ids=lambda r: r.kind)
def test_every_option_says_what_it_means(registry):
    for name, plugin in registry.items():
        for option in plugins.describe(plugin.Options):
            assert option.meaning, f"{name}: {option.name}"


@pytest.mark.parametrize(
    ("options", "message"), [({"vieuws": "3"}, r"unknown key 'vieuws'.*views"), ({"views": "many"}, "views")]
)
def test_bad_options_are_named_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        plugins.make_defense("partialface", options, "cpu", 64)
    assert "\n" not in str(caught.value)


def test_given_values_beat_the_presets(monkeypatch):
    plugin = plugins.defenses().get("partialface")
    monkeypatch.setattr(plugin, "presets", {"quick": {"views": 2}})
    assert plugins.make_defense("partialface", {}, "quick", 64).views == 2
    assert plugins.make_defense("partialface", {"views": "5"}, "quick", 64).views == 5
