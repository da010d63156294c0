"""``bench list``: what can be named on the command line, and what each name takes."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType

from bench.commands.console import show, table
from bench.commands.flags import AsJson, default_text
from bench.errors import UsageError, failing_as
from bench.files import cache_folder, keep, kept
from bench.plugins import CHAIN, Option, attacks, defenses, describe, make_defense, recognisers
from bench.registry import pick
from bench.run.config import DATA, INTERCEPTIONS, Setting, settings
from bench.run.launch import uncollected

if TYPE_CHECKING:
    from attacks.base import Attack
    from defenses.base import Defense


#: Side of the faces in pixels for which is said how much a defence sends.
_SIZE = 64


def list_(
    kind: Annotated[
        str, typer.Argument(help="defenses, attacks, datasets, recognisers, backbones, heads, metrics or settings.")
    ],
    name: Annotated[str | None, typer.Argument(help="One of them, with all its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what can be named on the command line; with a NAME its options, their types, defaults, ranges, meanings."""
    if name is not None and CHAIN in name and _plural(kind) == "defenses":  # a chain is none of those listed
        with uncollected():
            defense = _defense(defenses().get(name))
        show(defense, as_json, lambda: _entry(defense))
        return
    with uncollected():
        entries = _remembered(kind)
    if name is None:
        show(entries, as_json, lambda: _table(entries))
        return
    entry = pick(kind.lower().removesuffix("s"), name, {entry["name"]: entry for entry in entries})
    show(entry, as_json, lambda: _entry(entry))


def catalogue(kind: str) -> list[dict[str, Any]]:
    """The entries of ``bench list KIND``; a kind may be in the singular, defences have a c, and recognisers a z.

    Raises:
        UsageError: there is no such list.
    """
    return pick("list", _plural(kind), _MAKERS)()


#: What lists are made of, beside installed packages.
_PACKAGES = ("attacks", "bench", "defenses", "reports")


def _remembered(kind: str) -> list[dict[str, Any]]:
    """:func:`catalogue`, made once for these files of the project and these installed packages.

    What a plug-in is stands in its module and nowhere else, and its module needs torch, which takes four times as long
    to import as all that a list needs otherwise. What other packages registered is looked up anew each time: nothing
    tells which of their files it depends on.
    """
    make = pick("list", _plural(kind), _MAKERS)
    if entry_points(group=f"bench.{_plural(kind)}"):
        return make()
    path, key = cache_folder() / "lists" / f"{_plural(kind)}.json", _version(Path(__file__).parents[2])
    if (stored := kept(path)) is not None and stored["key"] == key:
        return list(stored["entries"])
    entries = make()
    with contextlib.suppress(OSError):  # a folder that cannot be written: made again the next time
        keep(path, {"key": key, "entries": entries})
    return entries


def _version(root: Path) -> str:
    """SHA-256 over the project's files in ``root``, and the names and versions of all installed packages."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(file for package in _PACKAGES for file in (root / package).rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            digest.update(f"{file.relative_to(root)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    folders = [Path(folder) for folder in sys.path if Path(folder).is_dir()]
    installed = sorted(entry.name for folder in folders for entry in folder.glob("*.dist-info"))
    digest.update("\0".join(installed).encode())
    return digest.hexdigest()


def _plural(kind: str) -> str:
    return kind.lower().replace("defence", "defense").replace("recognizer", "recogniser").removesuffix("s") + "s"


def _dump(options: Iterable[Option]) -> list[dict[str, Any]]:
    return [option.model_dump(mode="json", exclude={"metavar"}) for option in options]


def _plugin(plugin: type[Attack] | type[Defense]) -> dict[str, Any]:
    presets = {preset: dict(options) for preset, options in plugin.presets.items()}
    facts = {"name": plugin.name, "summary": plugin.summary, "reference": plugin.reference, "presets": presets}
    return {**facts, "options": _dump(describe(plugin.Options))}


def _defenses() -> list[dict[str, Any]]:
    return [_defense(defense) for _, defense in defenses().items()]


def _defense(defense: type[Defense]) -> dict[str, Any]:
    from reports.published import published

    return _plugin(defense) | {
        "level": defense.level,
        "trainable": defense.trainable,
        "fidelity": defense.fidelity,
        f"bytes ({_SIZE} px)": _bytes(defense.name),
        "hidden": defense.hidden,
        "learns": defense.learns,
        "weakened": dict(defense.weakened),
        "departures": dict(defense.departures),
        "published": {
            ", ".join((figure.source.short, *filter(None, (figure.attack, figure.knowledge)))): figure.values
            for figure in published()
            if figure.defense == defense.name
        },
    }


def _bytes(name: str) -> int | None:
    """What a defence sends of a face; None of one that has no default options, or is broken."""
    with contextlib.suppress(UsageError), failing_as(f"defence {name}", UsageError, Exception):
        return make_defense(name, {}, "cpu", _SIZE).bytes_per_face()
    return None


def _attacks() -> list[dict[str, Any]]:
    from attacks.base import LinkageAttack

    return [
        _plugin(attack)
        | {
            "kind": "linkage" if issubclass(attack, LinkageAttack) else "recovery",
            "needs": sorted(attack.needs),
            "uses": sorted(attack.uses),
            "opens": ["none", *sorted(attack.opens)],
            "cost": attack.cost,
            "budgets": [DATA, INTERCEPTIONS, *attack.budgets],
        }
        for _, attack in attacks().items()
    ]


def _datasets() -> list[dict[str, Any]]:
    from bench.data.loaders import DATASETS

    return [
        {
            "name": name,
            "summary": dataset.summary,
            "needs": ["--data-root"] if dataset.needs_root else [],
            "options": _dump(describe(dataset.Options)),
        }
        for name, dataset in DATASETS.items()
    ]


def _backbones() -> list[dict[str, Any]]:
    import torch

    from bench.nets.backbones import BACKBONES
    from bench.nets.recogniser import build_recogniser

    with torch.device("meta"):
        sizes = {name: build_recogniser(name, (3, 112, 112), 512).parameter_count for name in BACKBONES}
    return [{"name": name, "parameters (RGB, 112 px, 512-d)": f"{n / 1e6:.2f} M"} for name, n in sizes.items()]


def _recognisers() -> list[dict[str, Any]]:
    from bench.nets.backbones import BACKBONES
    from bench.nets.checkpoints import NAMES

    kinds: dict[str, Iterable[str]] = {
        "plug-in": recognisers(),
        "checkpoint": NAMES,
        "backbone, trained in a run": BACKBONES,
    }
    ways = ("--recogniser {}", "--recogniser FILE", "--backbone {}")
    return [
        {"name": name, "kind": kind, "given as": way.format(name)}
        for (kind, names), way in zip(kinds.items(), ways, strict=True)
        for name in names
    ]


def _heads() -> list[dict[str, Any]]:
    from bench.recognition.options import HEADS

    return [{"name": name, "summary": (inspect.getdoc(head) or "").splitlines()[0]} for name, head in HEADS.items()]


def _metrics() -> list[dict[str, Any]]:
    from bench.measures import KINDS

    shown = {"group": "group", "range": "span", "unit": "unit", "higher means": "direction", "summary": "meaning"}
    return [
        {"name": name, **{column: getattr(kind, field) for column, field in shown.items()}}
        for name, kind in KINDS.items()
    ]


_MAKERS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "defenses": _defenses,
    "attacks": _attacks,
    "datasets": _datasets,
    "recognisers": _recognisers,
    "backbones": _backbones,
    "heads": _heads,
    "metrics": _metrics,
    "settings": lambda: _dump(settings()),
}

#: What the table of all leaves to the page of one.
_DETAILS = (
    *("options", "presets", "reference", "uses", "opens", "cost", "budgets"),
    *("hidden", "learns", "weakened", "departures", "published"),
)


def _table(entries: list[dict[str, Any]]) -> RenderableType:
    if "meaning" in entries[0]:
        return _options(map(Setting.model_validate, entries))
    columns = [column for column in entries[0] if column not in _DETAILS]
    return table(([_text(entry[column]) for column in columns] for entry in entries), *columns)


def _entry(entry: dict[str, Any]) -> RenderableType:
    """All of one entry: a line per fact, then its options."""
    facts = [(key, _text(value)) for key, value in entry.items() if key not in ("name", "options")]
    parts: list[RenderableType] = [table((fact for fact in facts if fact[1]), entry["name"], "")]
    if entry.get("options"):
        parts += ["", _options(map(Option.model_validate, entry["options"]))]
    return Group(*parts)


def _options(options: Iterable[Option]) -> RenderableType:
    rows = ((o.name, o.type, "required" if o.required else default_text(o), o.range, o.meaning) for o in options)
    return table(rows, "option", "type", "default", "range", "meaning")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(
            f"{key}: {', '.join(f'{k}={v}' for k, v in inner.items()) if isinstance(inner, dict) else inner}"
            for key, inner in value.items()
        )
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
