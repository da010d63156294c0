"""``bench new``: a package to start a plug-in of one's own from."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import __version__
from bench.commands.console import show_files
from bench.commands.flags import AsJson
from bench.errors import UsageError
from bench.files import new_folder, write_text
from bench.plugins import attacks, defenses
from bench.registry import Registry, pick

_KINDS: dict[str, Callable[[], Registry[Any]]] = {"defense": defenses, "attack": attacks}

#: What is written -> the template that it is made from.
_FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "{module}.py": "{kind}.py.j2",
    "tests/test_{module}.py": "test_{kind}.py.j2",
    ".github/workflows/test.yml": "test.yml.j2",
}


def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="What it will be called: lower-case words with dashes between them.")],
    as_json: AsJson = False,
) -> None:
    """Write a package with a small working defence or attack, its test and its CI, into a new folder NAME."""
    kind = kind.lower().replace("defence", "defense")
    module, folder = name.replace("-", "_"), Path(name)
    registry = pick("kind of plug-in", kind, _KINDS)()
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise UsageError(f"{name!r} cannot be a plug-in's name: write lower-case words with dashes between them")
    if name in registry:
        raise UsageError(f"{registry.kind} {name!r} exists already: choose another name")
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another name, or another place")
    if module in ("tests", "conftest") or importlib.util.find_spec(module) is not None:
        raise UsageError(f"{module!r} is the name of another Python module: choose another name")

    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bench.commands", "plugin"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    words = {
        "kind": kind,
        "spelled": registry.kind,
        "name": name,
        "module": module,
        "class": "".join(map(str.capitalize, name.split("-"))),
        "version": __version__,
    }
    texts = {
        folder / file.format(**words): templates.get_template(template.format(**words)).render(words)
        for file, template in _FILES.items()
    }
    if re.search(rf"^from (?!{module} ).*\b{words['class']}\b", "\n".join(texts.values()), re.MULTILINE):
        raise UsageError(f"{words['class']!r} is the name of another class that {name!r} needs: choose another name")
    with new_folder(folder) as scratch:
        for path, text in texts.items():
            write_text(scratch / path.relative_to(folder), text)
    show_files(texts, as_json)
