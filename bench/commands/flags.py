"""Flags that several commands share, and flags made from declared settings."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bench.data.loaders import DATASETS
from bench.plugins import Option, attacks, defenses
from bench.recognition.options import HEADS
from bench.run.config import Setting, nested

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")]
Images = Annotated[bool, typer.Option("--images/--no-images", help="Show faces on the page.")]
EmbedFaces = Annotated[
    bool, typer.Option("--embed-faces", help="Show real faces, too; without it only synthetic ones are shown.")
]
EveryAttempt = Annotated[
    bool, typer.Option("--all", help="Show attempts that were killed or superseded by a later run, too.")
]
DefenseOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-o", metavar="KEY=VALUE", help="Option of the defence, or of one of a chain: MEMBER.KEY=VALUE; repeatable."
    ),
]
AttackOptions = Annotated[
    list[str] | None,
    typer.Option("-a", metavar="KEY=VALUE", help="Option of the attack, or ATTACK.KEY=VALUE of one; repeatable."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting (bench list settings), e.g. training.epochs=8."),
]

#: What takes the names of a registry.
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "defense": defenses,
    "defenses": defenses,
    "attack": attacks,
    "attacks": attacks,
    "dataset": lambda: DATASETS,
    "training.head": lambda: HEADS,
}

#: Types of options that have no names for values.
_NO_NAMES = {"int", "float", "text", "path", "table", "any", "true", "false"}


def completion(name: str, choices: Iterable[str] = ()) -> Callable[[str], list[str]]:
    """What a shell offers for the option ``name``: the names of its registry, else the ``choices``.

    Of a list or a chain the last name is completed.
    """

    def complete(incomplete: str) -> list[str]:
        begun = re.split(r"[,+]", incomplete)[-1]
        before = incomplete.removesuffix(begun)
        return [before + known for known in _NAMES.get(name, lambda: choices)() if known.startswith(begun)]

    return complete


_METAVARS = {"int": "N", "float": "X", "path": "PATH"}


def with_flags(options: Iterable[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for every option; it gets those that were given, nested by name, as ``flags``.

    Values arrive as typed, as they do from the environment and a file: the model is the one place that checks them.
    """
    parameters = {option.name.rpartition(".")[2]: option for option in options}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def parsed(**given: Any) -> None:
            values = {option.name: given.pop(name) for name, option in parameters.items()}
            command(**given, flags=nested({name: value for name, value in values.items() if value is not None}))

        signature = inspect.signature(command, eval_str=True)
        both = [_parameter(name, option) for name, option in parameters.items()]
        both += [parameter for name, parameter in signature.parameters.items() if name != "flags"]
        parsed.__signature__ = signature.replace(parameters=both)  # type: ignore[attr-defined]
        parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in both}
        return parsed

    return decorate


def _parameter(name: str, option: Option) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    boolean = option.type == "true | false"
    kinds = [kind for kind in option.type.removeprefix("list of ").split(" | ") if kind != "none"]
    notes = [" | ".join(kinds)] if len(kinds) > 1 and not boolean else []
    notes += [f"default: {default}"] if (default := default_text(option)) else []
    info = typer.Option(
        *((f"{flag}/--no-{flag[2:]}",) if boolean else spellings(flag)),
        metavar=None if boolean else option.metavar or _METAVARS.get(kinds[0], "NAME"),
        help=escape(option.meaning + (f" [{'; '.join(notes)}]" if notes else "")),
        autocompletion=completion(option.name, [kind for kind in kinds if kind not in _NO_NAMES]),
    )
    annotation = Annotated[bool | None, info] if boolean else Annotated[str | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def spellings(flag: str) -> tuple[str, ...]:
    """A flag, and how else it may be written: a defence with a c, too."""
    return tuple(dict.fromkeys((flag, flag.replace("defense", "defence"))))


def default_text(option: Option) -> str:
    """The default of an option in words; nothing where there is none."""
    if isinstance(option, Setting) and option.presets:
        return "by preset"
    if isinstance(option.default, bool):
        return "yes" if option.default else "no"
    if isinstance(option.default, list):
        return ",".join(map(str, option.default))
    return "" if option.default is None else str(option.default)
