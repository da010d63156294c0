"""Hooks of MkDocs, and the parts of pages that are made from the code.

``python docs/hooks.py`` writes those parts anew into pages that are committed; tests compare them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.commands.flags import default_text
from bench.measures import KINDS
from bench.plugins import Option, describe
from bench.run.config import OTHER_VARIABLES, PRESETS, Setting, settings
from bench.sweep.options import AXES, SweepOptions

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

_PART = re.compile(r"(?<=<!-- made from the code: )(?P<name>\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read pages from the configuration's own folder, where links between them also work in a plain view.

    MkDocs refuses this as a setting, so that a build does not copy itself; here the site lies outside, and the
    configuration is excluded.
    """
    config.docs_dir = str(Path(config.config_file_path).resolve().parent)
    return config


def filled(page: str) -> str:
    """A page with its parts made anew."""
    return _PART.sub(lambda part: f"{part['name']} -->\n\n{PARTS[part['name']]()}\n", page)


def _table(columns: str, rows: Iterable[Iterable[str]]) -> str:
    heads = columns.split(", ")
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _flag_row(option: Option) -> tuple[str, ...]:
    flag = f"--{option.name.rpartition('.')[2].replace('_', '-')}"
    names = f"`{flag}`, `--no-{flag[2:]}`" if option.type == "true | false" else f"`{flag}`"
    return names, _values(option), default_text(option), option.meaning


def _values(option: Option) -> str:
    kinds = [kind for kind in option.type.split(" | ") if kind != "none"]
    return ", ".join([*kinds, *([option.range] if option.range else [])]) if option.type != "true | false" else ""


def run_flags() -> str:
    """The settings of a run that have a flag."""
    return _table("option, value, default, meaning", (_flag_row(setting) for setting in settings() if setting.flag))


def run_settings() -> str:
    """The other settings of a run."""

    def row(setting: Setting) -> tuple[str, ...]:
        presets = ", ".join(f"{name} {_plain(setting.presets[name])}" for name in PRESETS if name in setting.presets)
        return _code(setting.name), _values(setting), _plain(setting.default), presets, setting.meaning

    rows = [row(setting) for setting in settings() if not setting.flag]
    return _table("key, value, default, presets, meaning", rows)


def _plain(value: object) -> str:
    if value is None or value in ([], {}):
        return ""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).lower()


def variables() -> str:
    """The variables that are no settings of a run."""
    return _table("variable, meaning", ((_code(name), meaning) for name, meaning in OTHER_VARIABLES.items()))


def sweep_flags() -> str:
    """The settings of a sweep, and the flags that it shares with a run."""
    own = [_flag_row(option) for option in describe(SweepOptions) if option.type != "table"]
    flags = [_flag_row(setting)[0] for setting in settings() if setting.flag and setting.name not in AXES.values()]
    shared = (", ".join(flags), "", "", "As for [`bench run`](#bench-run), for all cells.")
    return _table("option, value, default, meaning", [*own, shared])


def metrics() -> str:
    """What is measured."""
    rows = ((_code(name), kind.group, kind.span, kind.direction, kind.meaning) for name, kind in KINDS.items())
    return _table("metric, group, range, higher means, meaning", rows)


PARTS = {made.__name__: made for made in (run_flags, run_settings, variables, sweep_flags, metrics)}

if __name__ == "__main__":
    for file in Path(__file__).parent.glob("*.md"):
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
