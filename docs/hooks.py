"""Hooks of MkDocs, and the parts of pages that are made from the code.

``python docs/hooks.py`` writes the parts about settings and figures anew into the pages, where they are committed; a
test compares them. Those about plug-ins are made when the pages are built: a new plug-in is one new file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.commands.flags import default_text, spellings
from bench.commands.list import catalogue
from bench.measures import KINDS
from bench.plugins import Option, defenses, describe
from bench.run.config import OTHER_VARIABLES, PRESETS, Setting, settings
from bench.sweep.options import AXES, SweepOptions

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

#: The parts by name.
PARTS: dict[str, Callable[[], str]] = {}

_AT_BUILD = re.compile(r"<!-- made at build: (?P<name>\w+) -->")
_PART = re.compile(r"(?<=<!-- made from the code: )(?P<name>\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read pages from the configuration's own folder, where links between them also work in a plain view.

    MkDocs refuses this as a setting, so that a build does not copy itself; here the site lies outside, and the
    configuration is excluded.
    """
    config.docs_dir = str(Path(config.config_file_path).resolve().parent)
    return config


def on_page_markdown(markdown: str, **_: object) -> str:
    """Make the parts about plug-ins."""
    return _AT_BUILD.sub(lambda part: PARTS[part["name"]](), markdown)


def filled(page: str) -> str:
    """A page with its parts made anew."""
    return _PART.sub(lambda part: f"{part['name']} -->\n\n{PARTS[part['name']]()}\n", page)


def _table(columns: str, rows: Iterable[Iterable[str]]) -> str:
    heads = columns.split(", ")
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _part(made: Callable[[], str]) -> Callable[[], str]:
    PARTS[made.__name__] = made
    return made


def _flag_row(option: Option) -> tuple[str, ...]:
    flag = f"--{option.name.rpartition('.')[2].replace('_', '-')}"
    names = f"`{flag}`, `--no-{flag[2:]}`" if option.type == "true | false" else ", ".join(map(_code, spellings(flag)))
    return names, _values(option), default_text(option), option.meaning


def _values(option: Option) -> str:
    kinds = [kind for kind in option.type.split(" | ") if kind != "none"]
    return ", ".join([*kinds, *([option.range] if option.range else [])]) if option.type != "true | false" else ""


@_part
def run_flags() -> str:
    """The settings of a run that have a flag."""
    return _table("option, value, default, meaning", (_flag_row(setting) for setting in settings() if setting.flag))


@_part
def run_settings() -> str:
    """The other settings of a run."""

    def row(setting: Setting) -> tuple[str, ...]:
        presets = [f"{name} {_plain(setting.presets[name])}" for name in PRESETS if name in setting.presets]
        presets += [f"{name} {_plain(value)} under a teacher" for name, value in setting.taught.items()]
        return _code(setting.name), _values(setting), _plain(setting.default), ", ".join(presets), setting.meaning

    rows = [row(setting) for setting in settings() if not setting.flag]
    return _table("key, value, default, presets, meaning", rows)


def _plain(value: object) -> str:
    if value is None or value in ([], {}):
        return ""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).lower()


@_part
def variables() -> str:
    """The variables that are no settings of a run."""
    return _table("variable, meaning", ((_code(name), meaning) for name, meaning in OTHER_VARIABLES.items()))


@_part
def sweep_flags() -> str:
    """The settings of a sweep, and the flags that it shares with a run."""
    sweep = [_flag_row(option) for option in describe(SweepOptions) if option.type != "table"]
    flags = [_flag_row(setting)[0] for setting in settings() if setting.flag and setting.name not in AXES.values()]
    shared = (", ".join(flags), "", "", "As for [`bench run`](#bench-run), for all cells.")
    return _table("option, value, default, meaning", [*sweep, shared])


@_part
def metrics() -> str:
    """What is measured."""
    rows = ((_code(name), kind.group, kind.span, kind.direction, kind.meaning) for name, kind in KINDS.items())
    return _table("metric, group, range, higher means, meaning", rows)


@_part
def attack_needs() -> str:
    """What each attack assumes."""
    rows = (
        (_code(attack["name"]), ", ".join(attack["needs"]), ", ".join(attack["uses"]))
        for attack in catalogue("attacks")
    )
    return _table("attack, needs, uses where granted", rows)


@_part
def defense_secrets() -> str:
    """What each defence does, and what it keeps to itself."""
    rows = []
    for entry in catalogue("defenses"):
        defense = defenses().get(entry["name"])(image_size=64)
        states = defense.states()
        counted = "" if states is None else f"{len(states)} by default"
        rows.append((_code(entry["name"]), entry["level"], entry["summary"], "yes" if defense.secret else "", counted))
    return _table("defence, level, what it does, secret, states", rows)


def _plugin(entry: dict[str, Any]) -> str:
    facts = [entry["summary"].capitalize() + "."]
    facts += [
        f"{fact.capitalize()}: {', '.join(entry[fact])}." for fact in ("needs", "uses", "budgets") if entry.get(fact)
    ]
    facts += [f"{fact.capitalize()}: {entry[fact]}." for fact in ("cost", "reference") if entry.get(fact)]
    options = [Option.model_validate(option) for option in entry["options"]]
    rows = ((_code(o.name), _values(o) or "true, false", _code(default_text(o)), o.meaning) for o in options)
    table = _table("option, value, default, meaning", rows) if options else ""
    return f"### {entry['name']}\n\n{' '.join(facts)}\n\n{table}"


PARTS["attack_options"] = lambda: "\n".join(map(_plugin, catalogue("attacks")))
PARTS["defense_options"] = lambda: "\n".join(map(_plugin, catalogue("defenses")))

if __name__ == "__main__":
    for file in Path(__file__).parent.glob("*.md"):
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
