"""``bench report`` and ``bench leaderboard``: documents from run directories.

A page is one HTML file that loads nothing and runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench import __version__
from bench.errors import MissingError
from bench.files import write_text
from bench.measures import KINDS
from bench.run.archive import Run, data_uri, load_runs
from reports.benchmarks import benchmark_table
from reports.cells import Setting, attempts, settings
from reports.figures import distributions, pareto, roc_figure, strength_figures, template_figure, training_figures
from reports.formats import leaderboard_csv, leaderboard_markdown, report_csv, report_latex, report_markdown
from reports.gallery import may_show, sheets, strip
from reports.maps import confusion_figures, frequency_figures, reliance_figures, state_figure
from reports.provenance import provenance, records, warnings
from reports.published import matching
from reports.summary import (
    COLUMNS,
    HEADLINE,
    across_table,
    expression_table,
    facts,
    failures,
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
from reports.verdict import Standing, figure, verdicts

_TEMPLATES = Path(__file__).parent / "templates"
#: What leaks, as far as it is drawn against utility.
_PARETO = (HEADLINE, "ssim", "linkage")


class Written(NamedTuple):
    """What a report or a leaderboard wrote: its files, and what it opens with, a sentence for each setting and rung."""

    files: list[Path]
    verdicts: list[str]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    images: bool = True,
    embed_faces: bool = False,
    every: bool = False,
    benchmarks: Sequence[Path] = (),
) -> Written:
    """Write ``report.html``, ``report.md``, ``report.tex`` and ``measures.csv``.

    Args:
        runs: run directories, or folders that hold some.
        out: folder to write to; made if it is not there.
        images: whether the page shows faces.
        embed_faces: whether real ones, too; synthetic ones need no leave.
        every: whether to show killed and superseded attempts, too.
        benchmarks: files that pytest-benchmark wrote.

    Raises:
        MissingError: a folder is no run directory, a file of one cannot be read or is not what it should be, or no run
            has ended.
    """
    grouped, left_out = _settings(load_runs(runs), every)
    speed = benchmark_table(benchmarks)
    page = report_page(grouped, images=images, embed_faces=embed_faces, speed=speed, left_out=left_out)
    return _write(
        out,
        grouped,
        {
            "report.html": page,
            "report.md": report_markdown(grouped, speed, left_out),
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
    left_out: str = "",
    template: str = "report.html.j2",
    **more: Any,
) -> str:
    """The page of a report, as HTML.

    Args:
        grouped: its runs.
        images: whether it shows faces.
        embed_faces: whether real ones, too.
        speed: of pytest-benchmark.
        left_out: which attempts are not among them.
        template: one that extends that of the report.
        more: what this template needs beyond that; ``title`` takes the place of the report's.
    """
    defenses = dict.fromkeys(cell.defense for setting in grouped for _, cell in setting.runs)
    failed = len(failures(grouped))
    cells = [cell for setting in grouped for cell in setting.cells]
    printed = [figure for cell in cells for figure in matching(cell.run.manifest.config.get("defense"), {cell.name})]
    context: dict[str, Any] = {
        "title": "What leaks, and what it costs",
        "lead": f"{_counted(_runs(grouped), 'run')} of {_counted(len(defenses), 'defence')}"
        + (f"; {failed} failed" if failed else ""),
        "views": [_view(setting, number, images, embed_faces) for number, setting in enumerate(grouped, start=1)],
        "speed": speed,
        "records": list(records(grouped)),
        "sources": list({figure.source.id: figure.source for figure in printed}.values()),
        "kinds": list(KINDS.values()),
        "warnings": warnings(grouped),
        "failures": failures(grouped),
        "left_out": left_out,
        "runs": _runs(grouped),
        "provenance": provenance(grouped),
    }
    return render_page(template, **context | more)


def _settings(runs: Sequence[Run], every: bool) -> tuple[list[Setting], str]:
    """The settings of runs and what was left out: attempts that say nothing more, unless ``every`` one is asked for.

    Raises:
        MissingError: no run has ended.
    """
    if every:
        return settings(runs), ""
    kept, *left = attempts(runs)
    words = ("killed or not finished", "superseded by a later run of the same settings")
    told = [
        f"{len(some)} {what} ({', '.join(run.directory.name for run in some)})"
        for what, some in zip(words, left, strict=True)
        if some
    ]
    if not kept:
        raise MissingError(f"no run has ended: {'; '.join(told)}; run them to their end, or show them with --all")
    return settings(kept), f"Left out: {'; '.join(told)}. --all shows them." if told else ""


def _verdicts(setting: Setting, faces: bool, embed_faces: bool) -> list[dict[str, Any]]:
    """The verdicts of a setting as a page takes them: a card for each defence, on a scale that all share."""
    views = []
    for verdict in verdicts(setting):
        kind = KINDS[verdict.name]
        bounds = [bound for one in verdict.standings for bound in (one.floor, one.ceiling)]
        measures = [*bounds, *(one.worst.measure for one in verdict.standings if one.worst is not None)]
        values = [end for m in measures if m is not None and m.value is not None for end in (m.value, *(m.ci95 or ()))]
        # Rates have ends of their own; what has none is drawn from the least to the most that anybody got.
        low, high = (0.0, 1.0) if kind.unit == "%" else (min(values, default=0.0), max(values, default=1.0))
        cards = [_card(one, low, high or 1.0, faces, embed_faces) for one in verdict.standings]
        views.append({"verdict": verdict, "label": kind.label, "meaning": kind.meaning, "cards": cards})
    return views


def _card(one: Standing, low: float, high: float, faces: bool, embed_faces: bool) -> dict[str, Any]:
    """A defence: its figures in words, where its bar begins and ends in per cent of the scale, and a strip of faces."""

    def place(value: float | None) -> float | None:
        return (
            None if value is None or high <= low else round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)
        )

    measure = None if one.worst is None else one.worst.measure
    floor, ceiling = (None if bound is None else bound.value for bound in (one.floor, one.ceiling))
    return {
        "standing": one,
        "worth": "none" if one.unprotected else one.worth[0].replace(" ", "-"),
        "measure": measure,
        "floor": place(floor),
        "ceiling": place(ceiling),
        "value": place(None if measure is None else measure.value),
        "ends": [place(end) for end in measure.ci95] if measure is not None and measure.ci95 is not None else [],
        "facts": list(facts(one.cells)),
        "strip": strip(one.worst.strongest, embed_faces=embed_faces) if faces and one.worst is not None else [],
    }


def _view(setting: Setting, number: int, images: bool, embed_faces: bool) -> dict[str, Any]:
    """One setting of the page, as its template takes it."""
    pareto_figures = [pareto(setting, number, name) for name in _drawn(setting)]
    curves = [roc_figure(setting, number, table) for table in ("scores", "linkage")]
    curves.insert(1, roc_figure(setting, number, "scores", det=True))
    states = state_figure(setting, number)
    return {
        "number": number,
        "title": subject(setting),
        "synthetic": setting.synthetic,
        "verdicts": _verdicts(setting, images, embed_faces),
        "summary": summary(setting, number),
        "expressions": expression_table(setting, number),
        "protocols": list(filter(None, [protocol_table(setting, number), identification_table(setting, number)])),
        "templates": list(filter(None, [template_table(setting, number), across_table(setting, number)])),
        "drawings": {
            "Privacy against utility and speed": list(filter(None, pareto_figures)),
            "Inverted templates": list(filter(None, [template_figure(setting, number)])),
            "Telling people apart": [*filter(None, curves), *distributions(setting, number)],
            "Stronger attackers": strength_figures(setting, number),
            "What the defence drew": [*filter(None, [states]), *confusion_figures(setting, number)],
            "Frequencies": [*frequency_figures(setting, number), *reliance_figures(setting, number)],
        },
        "training": training_figures(setting, number),
        "sheets": sheets(setting, embed_faces=embed_faces) if images else [],
        "faces_note": _faces_note(setting, images, embed_faces),
        "recovery": recovery_table(setting, number),
    }


def _faces_note(setting: Setting, images: bool, embed_faces: bool) -> str:
    """Which faces were left out of a page, and why; empty for none."""
    if not images:
        return "Faces were left out (--no-images)."
    withheld = sum(
        cell.run.samples is not None and not may_show(cell, embed_faces=embed_faces) for _, cell in setting.runs
    )
    return f"The real faces of {withheld} runs were left out; --embed-faces shows them." if withheld else ""


def _drawn(setting: Setting) -> list[str]:
    """Figures that are drawn against utility: those that decide first."""
    return list(dict.fromkeys((*(verdict.name for verdict in verdicts(setting)), *_PARETO)))


_TITLE = "Leaderboard of defences"
_LEAD = (
    "One row for each defence and rung of knowledge, at its worst case over all attacks; below each figure the attack "
    "that leaks most. Only runs of one protocol version, dataset, image size and judge stand in one table."
)


def write_leaderboard(
    directory: Path, out: Path, *, images: bool = True, embed_faces: bool = False, every: bool = False
) -> Written:
    """Write ``leaderboard.html``, ``leaderboard.md``, ``leaderboard.csv`` and, as SVG, utility against leakage.

    ``utility-ssim-N.svg`` and the like are of setting N, for each leading figure that was measured beside recognition;
    ``templates-N.svg`` has what passes of inverted templates.

    Args:
        directory: a run directory or a folder that holds some.
        out: folder to write to; made if it is not there.
        images: whether the page shows faces.
        embed_faces: whether real ones, too; synthetic ones need no leave.
        every: whether to count killed and superseded attempts, too.

    Raises:
        MissingError: it holds no run that has ended, or a file of one cannot be read.
    """
    grouped, left_out = _settings(load_runs([directory]), every)
    boards = [_board(setting, number) for number, setting in enumerate(grouped, start=1)]
    views = [
        {
            "number": number,
            "title": subject(setting),
            "setting": setting,
            "board": board,
            "verdicts": _verdicts(setting, images, embed_faces),
            "faces_note": _faces_note(setting, images, embed_faces),
        }
        for number, (setting, board) in enumerate(zip(grouped, boards, strict=True), start=1)
    ]
    style = _style_sheet()
    drawings = {
        f"{name}-{number}.svg": drawing
        for number, setting in enumerate(grouped, start=1)
        for name, drawing in {
            **{f"utility-{name.replace('_', '-')}": pareto(setting, number, name) for name in _drawn(setting)},
            "templates": template_figure(setting, number),
        }.items()
    }
    figures = {name: drawing.file(style) for name, drawing in drawings.items() if drawing is not None}
    return _write(
        out,
        grouped,
        {
            "leaderboard.html": render_page(
                "leaderboard.html.j2",
                title=_TITLE,
                lead=_LEAD,
                views=views,
                warnings=warnings(grouped),
                failures=failures(grouped),
                left_out=left_out,
                runs=_runs(grouped),
                provenance=provenance(grouped),
            ),
            "leaderboard.md": leaderboard_markdown(_TITLE, _LEAD, grouped, left_out, boards),
            "leaderboard.csv": leaderboard_csv(grouped),
            **figures,
        },
    )


def _board(setting: Setting, number: int) -> Table:
    """One row for each defence of a setting; one of which nothing was measured says so."""
    # How fast an attack is belongs to no defence.
    columns = tuple(column for column in COLUMNS if column.key != "recover")
    worst, rows = worst_rows(setting), []
    for defense, cells in setting.defenses.items():
        rows += [row for (name, _), row in worst.items() if name == defense]
        rows += printed_rows(defense, cells) if any(name == defense for name, _ in worst) else []
    caption = f"Defences at their worst case: {subject(setting)}.{judged(setting)}"
    return Table(f"board-{number}", caption, columns, tuple(rows), tuple(floor_rows(setting))).without_empty_columns()


def _write(out: Path, grouped: Sequence[Setting], documents: Mapping[str, str]) -> Written:
    """Write each document into ``out``; nothing is written unless all of them could be made."""
    for name, document in documents.items():
        write_text(out / name, document)
    sentences = [f"{subject(setting)}, {verdict.sentence}" for setting in grouped for verdict in verdicts(setting)]
    return Written([out / name for name in documents], sentences)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


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
    environment.globals["figure"] = figure
    return environment
