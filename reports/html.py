"""The page: one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench import __version__
from bench.measures import KINDS
from bench.run.archive import data_uri
from reports.cells import Cell, Setting
from reports.figures import distributions, pareto, roc_figure, strength_figures, training_figures
from reports.gallery import Sheet, may_show, sheets
from reports.maps import confusion_figures, frequency_figures, state_figure
from reports.provenance import provenance, records, warnings
from reports.published import Source, matching
from reports.summary import Finding, failures, findings, recovery_table, subject, summary
from reports.svg import Drawing
from reports.table import Table

_TEMPLATES = Path(__file__).parent / "templates"
#: What leaks, as far as it is drawn against utility.
_PARETO = ("ssim", "type1_tar", "linkage")


@dataclass(frozen=True)
class View:
    """One setting of the page; see the templates."""

    title: str
    synthetic: bool
    findings: list[Finding]
    summary: Table
    filters: Mapping[str, list[str]]
    drawings: Mapping[str, list[Drawing]]
    training: list[Drawing]
    sheets: list[Sheet]
    faces_note: str
    recovery: Table | None


def report_page(settings: Sequence[Setting], *, images: bool, embed_faces: bool, speed: Table | None = None) -> str:
    """The whole report as one HTML document.

    Args:
        settings: the runs, grouped.
        images: whether any faces are shown.
        embed_faces: whether real ones are, too.
        speed: a table of benchmarks.

    Raises:
        MissingError: a picture of a run is not one.
    """
    views = [_view(setting, place, images, embed_faces) for place, setting in enumerate(settings, start=1)]
    runs = [cell for setting in settings for _, cell in setting.runs]
    defenses = list(dict.fromkeys(cell.defense for cell in runs))
    failed = failures(settings)
    lead = f"{len(runs)} runs: {', '.join(defenses)}" + (f"; {len(failed)} failed" if failed else "")
    return page(
        "report.html.j2",
        title="What leaks, and what it costs",
        lead=lead,
        views=views,
        warnings=warnings(settings),
        runs=len(runs),
        failures=failed,
        speed=speed,
        provenance=provenance(settings),
        records=records(settings),
        sources=_sources(settings),
        kinds=list(KINDS.values()),
    )


def page(template: str, **context: Any) -> str:
    """Render a template of this package with its styles and script inside; everything in ``context`` is escaped."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            version=__version__,
            style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
        )
    )


def filters(table: Table) -> dict[str, list[str]]:
    """What a table can be filtered by: the values of each key of its rows."""
    values: dict[str, dict[str, None]] = {}
    for row in table.rows:
        for key, value in row.keys.items():
            values.setdefault(key, {})[value] = None
    return {key: list(ordered) for key, ordered in values.items()}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Drawings were written by an XML serialiser, which escaped the names in them.
    environment.filters["svg"] = Markup
    environment.filters["picture"] = data_uri
    return environment


def _view(setting: Setting, number: int, images: bool, embed_faces: bool) -> View:
    table = summary(setting, number)
    withheld = [cell for _, cell in setting.runs if cell.run.samples and not may_show(cell, embed_faces=embed_faces)]
    return View(
        title=subject(setting),
        synthetic=setting.synthetic,
        findings=findings(setting),
        summary=table,
        filters=filters(table),
        drawings=_drawings(setting, number),
        training=training_figures(setting, number),
        sheets=sheets(setting, embed_faces=embed_faces) if images else [],
        faces_note=_faces_note(images, withheld),
        recovery=recovery_table(setting, number),
    )


def _faces_note(images: bool, withheld: Sequence[Cell]) -> str:
    if not images:
        return "Faces were left out (--no-images)."
    if withheld:
        return f"The real faces of {len(withheld)} runs were left out; --embed-faces shows them."
    return ""


def _drawings(setting: Setting, number: int) -> dict[str, list[Drawing]]:
    curves = [roc_figure(setting, number, table) for table in ("scores", "linkage")]
    states = state_figure(setting, number)
    return {
        "Privacy against utility and speed": [
            drawing for name in _PARETO if (drawing := pareto(setting, number, name))
        ],
        "Telling people apart": [*filter(None, curves), *distributions(setting, number)],
        "Stronger attackers": strength_figures(setting, number),
        "What the defence drew": [*([states] if states else []), *confusion_figures(setting, number)],
        "Frequencies": frequency_figures(setting, number),
    }


def _sources(settings: Sequence[Setting]) -> list[Source]:
    sources: dict[str, Source] = {}
    for cell in (cell for setting in settings for cell in setting.cells):
        for figure in matching(str(cell.run.manifest.config.get("defense")), [cell.name]):
            sources[figure.source.id] = figure.source
    return list(sources.values())
