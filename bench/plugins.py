"""Finds defences and attacks: every file of the packages ``defenses`` and ``attacks``, and entry points.

A built-in plug-in is found by its file: ``defenses/arcface_fd.py`` is ``arcface-fd``. Nothing is imported
until a plug-in is asked for, so that listing names costs no import of torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import ValidationError

from bench.errors import UsageError
from bench.registry import Registry

if TYPE_CHECKING:
    from attacks.base import Attack
    from defenses.base import Defense

C = TypeVar("C")


def _from_module(package: str, module_name: str, name: str, base: type[C]) -> type[C]:
    module = importlib.import_module(f"{package}.{module_name}")
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, base)
        and member.__module__ == module.__name__
        and getattr(member, "name", None) == name
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__} called {name!r}, has {len(found)}")
    return found[0]


def _from_entry_point(entry: EntryPoint, base: type[C]) -> type[C]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise UsageError(f"plug-in {entry.name!r} ({entry.value}) cannot be imported: {error}") from error
    if not (inspect.isclass(loaded) and issubclass(loaded, base)):
        raise UsageError(f"plug-in {entry.name!r} ({entry.value}) is not a {base.__name__}")
    return loaded


def _fill(registry: Registry[type[Any]], package: ModuleType, base: str, group: str) -> None:
    def base_class() -> type[Any]:
        return cast("type[Any]", getattr(importlib.import_module(f"{package.__name__}.base"), base))

    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in package.SUPPORT_MODULES:
            name = module.name.replace("_", "-")
            registry.add(
                name,
                functools.partial(
                    lambda module_name, name: _from_module(package.__name__, module_name, name, base_class()),
                    module.name,
                    name,
                ),
            )
    for entry in entry_points(group=group):
        registry.add(entry.name, functools.partial(lambda entry: _from_entry_point(entry, base_class()), entry))


@functools.cache
def defenses() -> Registry[type[Defense]]:
    """All defences by name."""
    registry: Registry[type[Defense]] = Registry("defence")
    _fill(registry, importlib.import_module("defenses"), "Defense", "bench.defenses")
    return registry


@functools.cache
def attacks() -> Registry[type[Attack]]:
    """All attacks by name."""
    registry: Registry[type[Attack]] = Registry("attack")
    _fill(registry, importlib.import_module("attacks"), "Attack", "bench.attacks")
    return registry


def explain(error: ValidationError, what: str) -> str:
    """One line for a person out of a pydantic error: which key, what is wrong, what was given."""
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(p) for p in problem["loc"]) or "value"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            parts.append(f"{key}: {message[0].lower() + message[1:]} (got {problem['input']!r})")
    return f"{what}: {'; '.join(parts)}"


def make_options(plugin: type[Defense] | type[Attack], values: dict[str, Any], preset: str, flag: str) -> Any:
    """The validated options of a plug-in: its own preset values below what the person asked for.

    Raises:
        UsageError: an unknown or invalid option; the message lists the options there are.
    """
    try:
        return plugin.Options.model_validate({**plugin.presets.get(preset, {}), **values})
    except ValidationError as error:
        names = ", ".join(plugin.Options.model_fields) or "none"
        raise UsageError(f"{explain(error, f'{flag} of {plugin.name}')} (options: {names})") from None


def make_defense(name: str, values: dict[str, Any], preset: str, image_size: int) -> Defense:
    """The defence ``name`` with its options, for faces of ``image_size`` pixels.

    Raises:
        UsageError: unknown name, or options that are unknown, invalid or do not fit together.
    """
    plugin = defenses().get(name)
    options = make_options(plugin, values, preset, "-o")
    try:
        return plugin(options, image_size=image_size)
    except ValueError as error:
        raise UsageError(f"-o of {name}: {error}") from error


def make_attack(name: str, values: dict[str, Any], preset: str) -> Attack:
    """The attack ``name`` with its options.

    Raises:
        UsageError: unknown name, or options that are unknown or invalid.
    """
    plugin = attacks().get(name)
    return plugin(make_options(plugin, values, preset, "-a"))
