"""``bench report`` and ``bench leaderboard``: documents from run directories.

A page is one HTML file that loads nothing and runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench import __version__
from bench.files import write_text
from bench.measures import KINDS
from bench.run.archive import data_uri, load_runs
from reports.benchmarks import benchmark_table
from reports.cells import Setting, settings
from reports.figures import distributions, pareto, roc_figure, strength_figures, template_figure, training_figures
from reports.formats import leaderboard_csv, leaderboard_markdown, report_csv, report_latex, report_markdown
from reports.gallery import may_show, sheets
from reports.maps import confusion_figures, frequency_figures, state_figure
from reports.provenance import provenance, records, warnings
from reports.published import matching
from reports.summary import (
    COLUMNS,
    across_table,
    failures,
    findings,
    floor_rows,
    identification_table,
    judged,
    printed_rows,
    protocol_table,
    recovery_table,
    subject,
    summary,
    template_table,
    worst_rows,
)
from reports.table import Table

_TEMPLATES = Path(__file__).parent / "templates"
#: What leaks, as far as it is drawn against utility.
_PARETO = ("ssim", "type1_tar", "linkage")


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    images: bool = True,
    embed_faces: bool = False,
    benchmarks: Sequence[Path] = (),
) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.tex`` and ``measures.csv``.

    Args:
        runs: run directories, or folders that hold some.
        out: folder to write to; made if it is not there.
        images: whether the page shows faces.
        embed_faces: whether real ones, too; synthetic ones need no leave.
        benchmarks: files that pytest-benchmark wrote.

    Returns:
        The files.

    Raises:
        MissingError: a folder is no run directory, or a file of one cannot be read or is not what it should be.
    """
    grouped, speed = settings(load_runs(runs)), benchmark_table(benchmarks)
    page = report_page(grouped, images=images, embed_faces=embed_faces, speed=speed)
    return _write(
        out,
        {
            "report.html": page,
            "report.md": report_markdown(grouped, speed),
            "report.tex": report_latex(grouped, speed),
            "measures.csv": report_csv(grouped),
        },
    )


def report_page(
    grouped: Sequence[Setting],
    *,
    images: bool,
    embed_faces: bool,
    speed: Table | None = None,
    template: str = "report.html.j2",
    **more: Any,
) -> str:
    """The page of a report, as HTML.

    Args:
        grouped: its runs.
        images: whether it shows faces.
        embed_faces: whether real ones, too.
        speed: of pytest-benchmark.
        template: one that extends that of the report.
        more: what this template needs beyond that; ``title`` takes the place of the report's.
    """
    defenses = dict.fromkeys(cell.defense for setting in grouped for _, cell in setting.runs)
    failed = len(failures(grouped))
    cells = [cell for setting in grouped for cell in setting.cells]
    printed = [figure for cell in cells for figure in matching(cell.run.manifest.config.get("defense"), {cell.name})]
    context: dict[str, Any] = {
        "title": "What leaks, and what it costs",
        "lead": f"{_runs(grouped)} runs: {', '.join(defenses)}" + (f"; {failed} failed" if failed else ""),
        "views": [_view(setting, number, images, embed_faces) for number, setting in enumerate(grouped, start=1)],
        "speed": speed,
        "records": list(records(grouped)),
        "sources": list({figure.source.id: figure.source for figure in printed}.values()),
        "kinds": list(KINDS.values()),
        "warnings": warnings(grouped),
        "failures": failures(grouped),
        "runs": _runs(grouped),
        "provenance": provenance(grouped),
    }
    return render_page(template, **context | more)


def _view(setting: Setting, number: int, images: bool, embed_faces: bool) -> dict[str, Any]:
    """One setting of the page, as its template takes it."""
    pareto_figures = [pareto(setting, number, name) for name in _PARETO]
    curves = [roc_figure(setting, number, table) for table in ("scores", "linkage")]
    curves.insert(1, roc_figure(setting, number, "scores", det=True))
    states = state_figure(setting, number)
    withheld = sum(
        cell.run.samples is not None and not may_show(cell, embed_faces=embed_faces) for _, cell in setting.runs
    )
    note = f"The real faces of {withheld} runs were left out; --embed-faces shows them." if withheld else ""
    return {
        "title": subject(setting),
        "synthetic": setting.synthetic,
        "findings": findings(setting),
        "summary": summary(setting, number),
        "protocols": list(filter(None, [protocol_table(setting, number), identification_table(setting, number)])),
        "templates": list(filter(None, [template_table(setting, number), across_table(setting, number)])),
        "drawings": {
            "Privacy against utility and speed": list(filter(None, pareto_figures)),
            "Inverted templates": list(filter(None, [template_figure(setting, number)])),
            "Telling people apart": [*filter(None, curves), *distributions(setting, number)],
            "Stronger attackers": strength_figures(setting, number),
            "What the defence drew": [*filter(None, [states]), *confusion_figures(setting, number)],
            "Frequencies": frequency_figures(setting, number),
        },
        "training": training_figures(setting, number),
        "sheets": sheets(setting, embed_faces=embed_faces) if images else [],
        "faces_note": note if images else "Faces were left out (--no-images).",
        "recovery": recovery_table(setting, number),
    }


_TITLE = "Leaderboard of defences"
_LEAD = (
    "One row for each defence, at its worst case over all attacks; below each figure the attack that leaks most. "
    "Only runs of one protocol version, dataset, image size and judge stand in one table."
)


def write_leaderboard(directory: Path, out: Path) -> list[Path]:
    """Write ``leaderboard.html``, ``leaderboard.md``, ``leaderboard.csv`` and, as SVG, utility against leakage.

    ``utility-ssim-N.svg`` and the like are of setting N, for each leading figure that was measured beside recognition;
    ``templates-N.svg`` has what passes of inverted templates.

    Args:
        directory: a run directory or a folder that holds some.
        out: folder to write to; made if it is not there.

    Returns:
        The files.

    Raises:
        MissingError: it holds no run, or a file of one cannot be read.
    """
    grouped = settings(load_runs([directory]))
    boards = [_board(setting, number) for number, setting in enumerate(grouped, start=1)]
    ranked = list(zip(grouped, boards, strict=True))
    style = _style_sheet()
    drawings = {
        f"{name}-{number}.svg": drawing
        for number, setting in enumerate(grouped, start=1)
        for name, drawing in {
            **{f"utility-{name.replace('_', '-')}": pareto(setting, number, name) for name in _PARETO},
            "templates": template_figure(setting, number),
        }.items()
    }
    figures = {name: drawing.file(style) for name, drawing in drawings.items() if drawing is not None}
    return _write(
        out,
        {
            "leaderboard.html": render_page(
                "leaderboard.html.j2",
                title=_TITLE,
                lead=_LEAD,
                boards=ranked,
                warnings=warnings(grouped),
                failures=failures(grouped),
                runs=_runs(grouped),
                provenance=provenance(grouped),
            ),
            "leaderboard.md": leaderboard_markdown(_TITLE, _LEAD, grouped, boards),
            "leaderboard.csv": leaderboard_csv(grouped),
            **figures,
        },
    )


def _board(setting: Setting, number: int) -> Table:
    """One row for each defence of a setting; one of which nothing was measured says so."""
    # The attack and its knowledge are said below each figure; how fast it is belongs to no defence.
    columns = tuple(column for column in COLUMNS if column.key not in ("knowledge", "recover"))
    rows = []
    for name, worst in worst_rows(setting).items():
        rows += [worst, *printed_rows(name, setting.defenses[name])]
    caption = f"Defences at their worst case: {subject(setting)}.{judged(setting)}"
    return Table(f"board-{number}", caption, columns, tuple(rows), tuple(floor_rows(setting))).without_empty_columns()


def _write(out: Path, documents: Mapping[str, str]) -> list[Path]:
    """Write each document into ``out``; nothing is written unless all of them could be made."""
    for name, document in documents.items():
        write_text(out / name, document)
    return [out / name for name in documents]


def _runs(grouped: Sequence[Setting]) -> int:
    return sum(len(setting.runs) for setting in grouped)


def render_page(template: str, *, scripts: Sequence[str] = ("report.js",), **context: Any) -> str:
    """Render a template of this package with its styles and scripts inside; everything in ``context`` is escaped."""
    script = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            version=__version__,
            style=Markup(_style_sheet()),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
        )
    )


def _style_sheet() -> str:
    return (_TEMPLATES / "report.css").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Drawings were written by an XML serialiser, which escaped the names in them.
    environment.filters |= {"svg": Markup, "picture": data_uri}
    return environment
