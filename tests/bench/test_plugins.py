"""Plug-ins: one file is enough, entry points work, bad options are one line."""

import sys
import types
from importlib.metadata import EntryPoint

import pytest

from bench import plugins
from bench.errors import UsageError
from bench.registry import Registry
from defenses.base import Defense


def test_every_file_is_a_plugin_named_after_it():
    registry = plugins.defenses()
    assert {"none", "blur", "pixelate", "noise", "arcface-fd", "fixed-subset", "partialface"} <= set(registry)
    for name in registry:
        assert registry.get(name).name == name
    assert "unet" in plugins.attacks()
    assert plugins.attacks().get("unet").name == "unet"


def test_support_modules_are_not_plugins():
    assert "base" not in plugins.defenses()
    assert "frequency" not in plugins.defenses()
    assert "base" not in plugins.attacks()


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
    registry = Registry("defence")
    plugins._fill(registry, package, "Defense", "no.such.group")
    assert list(registry) == ["my-defense"]
    assert issubclass(registry.get("my-defense"), Defense)
    for name in ("extra_defenses.my_defense", "extra_defenses.base"):
        sys.modules.pop(name, None)


def test_entry_points_are_plugins(monkeypatch):
    import defenses as package

    entry = EntryPoint(name="third-party", value="defenses.none:" + plugins.defenses().get("none").__name__, group="g")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    registry = Registry("defence")
    plugins._fill(registry, package, "Defense", "g")
    assert registry.get("third-party") is plugins.defenses().get("none")


@pytest.mark.parametrize(
    ("value", "message"), [("no_such_module:X", "cannot be imported"), ("pathlib:Path", "is not a Defense")]
)
def test_a_broken_entry_point_is_one_line(monkeypatch, value, message):
    import defenses as package

    entry = EntryPoint(name="third-party", value=value, group="g")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    registry = Registry("defence")
    plugins._fill(registry, package, "Defense", "g")
    with pytest.raises(UsageError, match=message):
        registry.get("third-party")


def test_unknown_option_lists_the_options():
    with pytest.raises(UsageError) as caught:
        plugins.make_defense("partialface", {"vieuws": "3"}, "cpu", 64)
    assert "unknown key 'vieuws'" in str(caught.value)
    assert "views" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_value_names_the_option():
    with pytest.raises(UsageError, match="views"):
        plugins.make_defense("partialface", {"views": "many"}, "cpu", 64)


def test_own_values_beat_the_presets(monkeypatch):
    plugin = plugins.defenses().get("partialface")
    monkeypatch.setattr(plugin, "presets", {"quick": {"views": 2}})
    assert plugins.make_defense("partialface", {}, "quick", 64).views == 2
    assert plugins.make_defense("partialface", {"views": "5"}, "quick", 64).views == 5
