"""What commands print: the result on stdout, as tables or as one JSON document; all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from bench.errors import shown

#: Width of tables where nobody's terminal limits it.
FILE_WIDTH = 120


@dataclass(frozen=True)
class _Harmless:
    """What is shown, without control characters that come from a file and that a terminal would obey."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.what, options):
            text = segment.text
            if segment.control is None and not text.isprintable():
                text = "\n".join(map(shown, text.split("\n")))
            yield Segment(text, segment.style, segment.control)


class _Harmlessly(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Harmless(renderable) for renderable in renderables]


out = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
err = Console(stderr=True)
for console in (out, err):
    console.push_render_hook(_Harmlessly())


class Command(TyperCommand):
    """A command whose stdout carries what is printed here alone: what plug-ins and libraries print goes to stderr."""

    def invoke(self, ctx: Any) -> Any:
        before, out.file = out._file, sys.stdout
        try:
            with redirect_stdout(sys.stderr):
                return super().invoke(ctx)
        finally:
            out._file = before


def print_json(document: Any) -> None:
    """Print one JSON document: a model, its text, or what :mod:`json` can write."""
    if isinstance(document, BaseModel):
        document = document.model_dump_json(indent=2)
    elif not isinstance(document, str):
        document = json.dumps(document, indent=2)
    out.file.write(document.rstrip("\n") + "\n")


def show(document: Any, as_json: bool, render: Callable[[], RenderableType]) -> None:
    """Print a result as JSON, or as what ``render`` makes of it; lines of text are not wrapped."""
    if as_json:
        print_json(document)
    else:
        rendered = render()
        out.print(rendered, highlight=False, soft_wrap=isinstance(rendered, str))


def show_line(document: Any, as_json: bool, line: str) -> None:
    """Print a result as JSON, or as lines of text, as they are."""
    show(document, as_json, lambda: escape(line))


def show_files(files: Iterable[Path], as_json: bool, **told: Iterable[str]) -> None:
    """Print what a command has to tell, sentences by name, and the names of the files that it wrote."""
    names = [str(file) for file in files]
    sentences = {name: list(lines) for name, lines in told.items()}
    show_line(
        {"files": names, **sentences}, as_json, "\n".join([*(s for lines in sentences.values() for s in lines), *names])
    )


def table(rows: Iterable[Iterable[Any]], *columns: str, title: str | None = None) -> Table:
    """A plain table; texts are printed as they are."""
    made = Table(*columns, title=title and escape(title), title_justify="left", box=None, pad_edge=False)
    made.header_style = "bold"
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    return made


def progress_bars() -> Any:
    """Progress on stderr, of which no log is kept."""
    from bench.progress import ProgressBars

    return ProgressBars(err, log=lambda *_, **__: None)
