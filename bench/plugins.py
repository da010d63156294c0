"""Finds defences and attacks, makes them from options, and describes option models.

Recognisers of other packages are found in the same way.

Plug-ins are every file of the packages ``defenses`` and ``attacks`` (``defenses/arcface_fd.py`` is ``arcface-fd``), and
entry points. Nothing is imported until a plug-in is asked for, so that listing names costs no import of torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from bench.errors import UsageError, failing_as
from bench.registry import Registry, target

if TYPE_CHECKING:
    from torch import nn

    from attacks.base import Attack
    from defenses.base import Defense

C = TypeVar("C")
T = TypeVar("T")


def _from_module(module_name: str, name: str, load_base: Callable[[], type[C]]) -> type[C]:
    module, base = importlib.import_module(module_name), load_base()
    members = [member for member in vars(module).values() if inspect.isclass(member) and issubclass(member, base)]
    named = [member for member in members if member.__module__ == module_name and getattr(member, "name", None) == name]
    if len(named) != 1:
        raise TypeError(f"{module_name} must define exactly one {base.__name__} called {name!r}, has {len(named)}")
    return named[0]


def _from_entry_point(entry: EntryPoint, load_base: Callable[[], type[C]]) -> type[C]:
    base, what = load_base(), f"plug-in {entry.name!r} ({entry.value})"
    with failing_as(f"{what} cannot be imported", UsageError, Exception):
        loaded = entry.load()
    if not (inspect.isclass(loaded) and issubclass(loaded, base)):
        raise UsageError(f"{what} is not a {base.__name__}")
    if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        raise UsageError(f"{what} does not define {', '.join(missing)}")
    for name, declared in get_type_hints(base).items():
        of_class = get_origin(declared) is ClassVar
        if of_class or (name in vars(base) and not isinstance(getattr(loaded, name), property)):
            kind = get_args(declared)[0] if of_class else declared
            try:
                TypeAdapter(kind).validate_python(getattr(loaded, name, None))
            except ValidationError as error:
                raise UsageError(explain(error, f"{what}: its {name}")) from error
    _check_name(getattr(loaded, "name"), what)  # noqa: B009 - which nothing but a plug-in's base declares
    return loaded


#: Names of plug-ins, which name folders, too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{what} cannot be called {name!r:.80}: letters, digits, dots, dashes and underscores make a name"
        )


def _add_entry_points(registry: Registry[T], group: str, load: Callable[[EntryPoint], T]) -> None:
    """Add what other packages registered.

    Raises:
        UsageError: what an installed package declares cannot be read, or a name cannot be one or is taken.
    """
    with failing_as("the entry points of an installed package cannot be read (pip check)", UsageError, Exception):
        entries = entry_points(group=group)
    for entry in entries:
        what = f"{registry.kind} {entry.name!r} ({entry.value}, of an installed package)"
        _check_name(entry.name, what)
        if entry.name in registry:
            raise UsageError(f"{what}: another {registry.kind} has this name, uninstall one of them")
        registry.add(entry.name, functools.partial(load, entry))


def _registry(kind: str, package_name: str, base: str, registry: Registry[type[Any]] | None = None) -> Registry[Any]:
    """The plug-ins of a package, and those of its entry points; each is imported when it is asked for."""
    registry = Registry(kind) if registry is None else registry
    package = importlib.import_module(package_name)
    load_base = target(f"{package_name}.base:{base}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in package.SUPPORT_MODULES:
            name = module.name.replace("_", "-")
            registry.add(name, functools.partial(_from_module, f"{package_name}.{module.name}", name, load_base))
    _add_entry_points(registry, f"bench.{package_name}", lambda entry: _from_entry_point(entry, load_base))
    return registry


#: Between the names of defences through which a face is sent one after the other.
CHAIN = "+"


class _Defenses(Registry[type["Defense"]]):
    """Defences by name and, as ``A+B``, chains of them, which are made on demand and not listed."""

    def __init__(self) -> None:
        super().__init__("defence")
        self._chains: dict[str, type[Defense]] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and all(super(_Defenses, self).__contains__(part) for part in name.split(CHAIN))

    def get(self, name: str) -> type[Defense]:
        if CHAIN not in name:
            return super().get(name)
        if name not in self._chains:
            members = [super(_Defenses, self).get(part.strip()) for part in name.split(CHAIN)]
            try:
                self._chains[name] = target("defenses.compose:chain")()(members)
            except ValueError as error:
                raise UsageError(f"defence {name}: {error}") from None
        return self._chains[name]


@functools.cache
def defenses() -> Registry[type[Defense]]:
    """All defences by name; one asked for as ``A+B`` is the chain of both."""
    return _registry("defence", "defenses", "Defense", _Defenses())


@functools.cache
def attacks() -> Registry[type[Attack]]:
    """All attacks by name."""
    return _registry("attack", "attacks", "Attack")


def _made_by_entry_point(entry: EntryPoint) -> nn.Module:
    from torch import nn

    what = f"recogniser {entry.name!r} ({entry.value})"
    with failing_as(f"{what} cannot be made", UsageError, Exception):
        made = entry.load()()
        if not isinstance(made, nn.Module):
            raise UsageError(f"{what} is no torch.nn.Module but {type(made).__name__}")
        return made.eval()


@functools.cache
def recognisers() -> Registry[nn.Module]:
    """The recognisers of other packages by name: each made once, by what its entry point names, without arguments."""
    registry: Registry[nn.Module] = Registry("recogniser")
    _add_entry_points(registry, "bench.recognisers", _made_by_entry_point)
    return registry


class Option(BaseModel):
    """One field of an option model, as lists and pages show it.

    The name of a nested model's field is dotted (``training.epochs``), the type is in words (``int``, ``quick | cpu``,
    ``list of float``), the default as in JSON; ``metavar`` stands for the value in ``--help``.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    default: Any = None
    required: bool = False
    range: str = ""
    meaning: str = ""
    metavar: str | None = None


class _TolerantSchema(GenerateJsonSchema):
    """Knows no type for what JSON cannot hold, instead of failing."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def describe(model: type[BaseModel]) -> list[Option]:
    """The fields of an option model in order, those of nested models in their place."""
    schema = model.model_json_schema(schema_generator=_TolerantSchema)
    return list(_options(schema, schema.get("$defs", {}), "", {}))


def _options(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, defaults: Mapping[str, Any]
) -> Iterator[Option]:
    for name, field in schema.get("properties", {}).items():
        merged = {**definitions.get(field.get("$ref", "").rpartition("/")[2], {}), **field}
        default = defaults.get(name, merged.get("default"))
        if "properties" in merged:
            yield from _options(merged, definitions, f"{prefix}{name}.", default or {})
            continue
        yield Option(
            name=prefix + name,
            type=_type(merged),
            default=default,
            required=name in schema.get("required", ()),
            range=_range(merged),
            meaning=field.get("description", ""),
            metavar=merged.get("metavar"),
        )


_TYPES = {
    "integer": "int",
    "number": "float",
    "string": "text",
    "boolean": "true | false",
    "object": "table",
    "null": "none",
}


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        parts = schema.get("prefixItems")
        return f"({', '.join(map(_type, parts))})" if parts else f"list of {_type(schema.get('items', {}))}"
    if schema.get("format") == "path":
        return "path"
    return _TYPES.get(schema.get("type", ""), "any")


_LIMITS = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}


def _range(schema: Mapping[str, Any]) -> str:
    limits = [sign + _number(schema[key]) for key, sign in _LIMITS.items() if key in schema]
    limits += [
        f"{word} {schema[key]}" for key, word in (("minItems", "at least"), ("maxItems", "at most")) if key in schema
    ]
    if inner := _range(schema["items"]) if isinstance(schema.get("items"), Mapping) else "":
        limits.append(f"each {inner}")
    return ", ".join([*limits, *filter(None, map(_range, schema.get("anyOf", ())))])


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if power > 20 and value == 2**power else f"{value:g}" if value < 1e6 else str(value)


#: Of a value that is refused, so much is shown.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def explain(error: ValidationError, what: str) -> str:
    """One line for a person out of a pydantic error: which key, what is wrong, and the value where it is one."""
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(p) for p in problem["loc"])
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}")
        elif isinstance(problem["input"], Mapping):  # values that do not go together, which the message names
            parts.append(f"{key}: {problem['msg']}".removeprefix(": ").replace("Value error, ", "", 1))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            told = f"{key}: {message[0].lower() + message[1:]} (got {_BRIEF.repr(problem['input'])})"
            parts.append(told.removeprefix(": "))
    return f"{what}: {'; '.join(parts)}"


def make_options(plugin: type[Defense] | type[Attack], values: dict[str, Any], preset: str, flag: str) -> Any:
    """The validated options of a plug-in: its own preset values below what the person asked for.

    Raises:
        UsageError: an unknown or invalid option; the message lists the options there are.
    """
    try:
        return plugin.Options.model_validate({**plugin.presets.get(preset, {}), **values})
    except ValidationError as error:
        names = ", ".join(option.name for option in describe(plugin.Options)) or "none"
        raise UsageError(f"{explain(error, f'{flag} of {plugin.name}')} (options: {names})") from None


def make_defense(name: str, values: dict[str, Any], preset: str, image_size: int, *, seed: int = 0) -> Defense:
    """The defence ``name`` with its options, for faces of ``image_size`` pixels; not fitted.

    Initial weights come from ``seed``; torch's global generator is left as it was.

    Raises:
        UsageError: unknown name, or options that are unknown, invalid or do not fit together.
    """
    from bench.randomness import seeded

    plugin = defenses().get(name)
    options = make_options(plugin, values, preset, "-o")
    with failing_as(f"-o of {name}", UsageError, Exception), seeded(seed, "weights"):
        return plugin(options, image_size=image_size).eval()


def make_attack(name: str, values: dict[str, Any], preset: str) -> Attack:
    """The attack ``name`` with its options.

    Raises:
        UsageError: unknown name, or options that are unknown or invalid.
    """
    plugin = attacks().get(name)
    options = make_options(plugin, values, preset, "-a")
    with failing_as(f"-a of {name}", UsageError, Exception):
        return plugin(options)
