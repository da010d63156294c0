"""What ``bench run --dry-run`` prints. Apart from the rest, as a plan loads nothing that it does not need."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.measures import MISSING
from bench.results import RunPlan


def titled(
    title: str | Text,
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: int = 1,
    bold: Container[int] = (),
) -> RenderableType:
    """A table in which no name can act as markup.

    The first ``left`` columns hold text, which may wrap, the others figures. Rows at the places ``bold`` stand out.
    """
    table = Table(box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        text = place < left
        table.add_column(escape(heading), overflow="fold", justify="left" if text else "right", no_wrap=not text)
    for place, row in enumerate(rows):
        shielded = (cell if isinstance(cell, Text) else escape(cell) for cell in row)
        table.add_row(*shielded, style="bold" if place in bold else None)
    # A title of the table would be wrapped to its width.
    return Group(title if isinstance(title, Text) else Text(title, style="bold"), table)


def render_plan(plan: RunPlan) -> RenderableType:
    """The resolved plan of ``--dry-run``."""
    words = {True: "yes", False: "no", None: "unknown"}
    stages = []
    for stage in plan.stages:
        seconds = f"{stage.seconds:.0f} s" if stage.seconds is not None else MISSING if stage.cached else "unknown"
        stages.append([stage.name, stage.what, words[stage.cached], seconds])
    settings = [[key, str(value)] for key, value in plan.config.items()]
    return Group(
        titled("Settings", ["setting", "value"], settings, left=2),
        titled(f"Plan of {plan.run_id}", ["stage", "what", "cached", "estimate"], stages, left=4),
        Text(f"estimate: {plan.seconds:.0f} s in all, on {plan.device}, without measuring", style="bold"),
        *(Text(f"note: {note}", style="yellow") for note in plan.notes),
    )
