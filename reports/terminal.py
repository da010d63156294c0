"""The tables that a run prints on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.gate.baseline import Baseline
from bench.gate.compare import Difference, FigureChange
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Verdict
from bench.measures import KINDS, MISSING, shown
from bench.results import (
    AttackInfo,
    AttackResult,
    Linkage,
    Measure,
    Quality,
    Recovery,
    RunPlan,
    RunResult,
    StateInference,
    StrengthCurve,
    Throughput,
    Verification,
)
from bench.sweep.cells import CellState, KeyFigure, Status, SweepState

#: Decimals of each figure; the rest is shown in per cent.
_DECIMALS = {
    "ssim": 3,
    "psnr": 2,
    "psnr_aligned": 2,
    "ms_ssim": 3,
    "lpips": 3,
    "cosine": 3,
    "knn_distance": 3,
    "d_sys": 3,
}
_HEADINGS = {
    "ssim": "SSIM",
    "psnr": "PSNR dB",
    "psnr_aligned": "aligned",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "type1_tar": "type I %",
    "type2_tar": "type II %",
    "rank1": "rank-1 %",
    "rank5": "rank-5 %",
    "cosine": "cosine",
    "knn_distance": "distance",
    "accuracy": "accuracy %",
    "auc": "AUC %",
}
_QUALITY = ("ssim", "psnr", "psnr_aligned", "ms_ssim", "lpips")
_IDENTITY = ("type1_tar", "type2_tar", "rank1", "rank5", "cosine", "knn_distance")


def figure(name: str, measure: Measure | None, *, interval: bool = True) -> str:
    """A measure as a person reads it: per cent for rates, the larger half of its interval, a dash where missing.

    The two ends of the interval are in ``metrics.json``; a terminal has no room for both.
    """
    if measure is None or measure.value is None:
        return "-"
    decimals = _DECIMALS.get(name)
    scale = 1.0 if decimals is not None else 100.0
    digits = decimals if decimals is not None else 1
    text = f"{measure.value * scale:.{digits}f}"
    if interval and measure.ci95 is not None:
        low, high = measure.ci95
        text += f" ±{max(high - measure.value, measure.value - low) * scale:.{digits}f}"
    return text


def render_result(result: RunResult, directory: Path) -> RenderableType:
    """Everything a run has to say: utility, what the attack got, its strength, throughput, warnings, files."""
    parts: list[RenderableType] = [_headline(result)]
    if result.utility is not None:
        parts.append(_utility(result))
    for name, attack in result.attack_results.items():
        if result.attacks:
            parts.append(Text(f"Attack {name}", style="bold underline"))
        parts += _attack(name, attack, result)
    if result.worst_case is not None:
        parts.append(Text("Worst case of all attacks, victim by victim", style="bold underline"))
        parts += _recovery("worst case", result.worst_case, result)
    if result.throughput:
        parts.append(_throughput(result.throughput, result.defense.bytes_per_face if result.defense else 0))
    reasons = dict.fromkeys(_reasons(result))
    parts += [Text(f"null: {reason}", style="dim") for reason in reasons]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in result.warnings]
    total = sum(result.seconds.values())
    cached = f", reused: {', '.join(result.cached)}" if result.cached else ""
    parts.append(Text(f"{total:.0f} s{cached}", style="dim"))
    parts.append(Text(f"files: {directory}"))
    parts.append(Text(f"faces: {directory / 'samples' / 'contact-sheet.png'}"))
    return Group(*parts)


def _headline(result: RunResult) -> Text:
    defense, dataset = result.defense, result.dataset
    infos = [one.attack for one in result.attack_results.values()]
    if defense is None or not infos or dataset is None:
        return Text(f"{result.run_id}: {result.status}")
    states = f", {defense.states} states ({defense.entropy_bits:.2f} bits)" if defense.states else ""
    kind = "synthetic faces" if dataset.synthetic else dataset.name
    return Text(
        f"{defense.name}{states} against {', '.join(info.name for info in infos)} ({infos[0].knowledge}) on {kind}, "
        f"{dataset.image_size} px, {dataset.probes} victim images",
        style="bold",
    )


def _utility(result: RunResult) -> Table:
    utility = result.utility
    assert utility is not None
    name = result.defense.name if result.defense else "protected"
    rows = {name: utility, "unprotected": utility.unprotected}
    return _verifications(f"Recognition of the victims ({utility.pairs} pairs)", rows)


def _verifications(title: str, rows: Mapping[str, Verification]) -> Table:
    fars = list(next(iter(rows.values())).tar_at_far)
    table = _new_table(title)
    for heading in ("", "accuracy %", "AUC %", "EER %", *(f"TAR@{far} %" for far in fars)):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, row in rows.items():
        measures = [row.accuracy, row.auc, row.eer, *(row.tar_at_far[far] for far in fars)]
        table.add_row(escape(label), *(figure("rate", measure) for measure in measures))
    return table


def _linkage(linkage: Linkage) -> Iterable[RenderableType]:
    rows = {
        "protected against plain": linkage.protected_plain,
        "protected against protected": linkage.protected_protected,
        "ceiling: plain against plain": linkage.plain,
    }
    yield _verifications(f"Linkage of the victims ({linkage.protected_plain.pairs} pairs)", rows)
    scores = ", ".join(f"{name.replace('_', ' ')} {figure('d_sys', one)}" for name, one in linkage.d_sys.items())
    rank1 = figure("rank1", linkage.rank1)
    chance = "" if linkage.d_sys_chance is None else f"; chance reaches {linkage.d_sys_chance:.3f}"
    yield Text(f"rank-1 among plain faces: {rank1} %; D_sys (0 unlinkable, 1 fully linkable{chance}): {scores}")


def _attack(name: str, attack: AttackResult, result: RunResult) -> Iterable[RenderableType]:
    if attack.recovery is not None:
        yield from _recovery(name, attack.recovery, result)
    if attack.linkage is not None:
        yield from _linkage(attack.linkage)
    if attack.state_inference is not None:
        yield _state_inference(attack.state_inference)
    yield from _queries(attack.attack)
    if attack.strength is not None:
        yield from (_strength(attack.strength), _gain(attack.strength))


def _recovery(label: str, recovery: Recovery, result: RunResult) -> Iterable[RenderableType]:
    floors = [(f"floor: {name.replace('_', ' ')}", floor, False) for name, floor in recovery.floors.items()]
    rows = [(label, recovery, True), *floors, ("ceiling", recovery.ceiling, False)]
    yield _table("Recovery (victims never seen in training)", rows, _QUALITY)
    yield _table(_identity_title(result), rows, _IDENTITY)


def _identity_title(result: RunResult) -> str:
    evaluator = result.evaluator
    if evaluator is None:
        return "Identity leakage"
    return (
        f"Identity leakage under {evaluator.name} (plain-pair accuracy {evaluator.accuracy:.1%}, "
        f"threshold {evaluator.threshold:.3f} at FAR {evaluator.far_at_threshold:.2%})"
    )


def _table(title: str, rows: Iterable[tuple[str, Quality, bool]], names: tuple[str, ...]) -> Table:
    table = _new_table(title)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(_HEADINGS[name], justify="right", no_wrap=True)
    for label, quality, bold in rows:
        holder = quality.identity if names is _IDENTITY else quality
        cells = [figure(name, getattr(holder, name), interval=bold) for name in names]
        table.add_row(escape(label), *cells, style="bold" if bold else None)
    return table


def _state_inference(inference: StateInference) -> Text:
    chance = "" if inference.chance is None else f" (guessing: {100 * inference.chance:.1f} %)"
    return Text(
        f"State inference: the attack names what was drawn for {figure('rate', inference.faces)} % of the "
        f"interceptions{chance}, and the place of {figure('rate', inference.channels)} % of the channels"
    )


def _queries(attack: AttackInfo) -> Iterable[Text]:
    """What an attack asked of the provider."""
    counted = {"queries_per_victim": "score queries per victim", "fit_queries": "embedding queries while it was fitted"}
    asked = [f"{attack.details[key]:,.10g} {what}" for key, what in counted.items() if key in attack.details]
    if asked:
        yield Text(f"{attack.name}: {', '.join(asked)}")


def _strength(curve: StrengthCurve) -> Table:
    table = _new_table(f"Strength: what leaks against the attacker's budget of {curve.axis}")
    table.add_column(curve.axis, justify="right")
    names = list(curve.points[-1].values)
    for name in names:
        table.add_column(_HEADINGS.get(name, name), justify="right", no_wrap=True)
    for point in curve.points:
        cells = [figure(name, point.values[name]) for name in names]
        style = "bold" if point is curve.points[-1] else None
        table.add_row(f"{point.budget:,.10g}", *cells, style=style)
    return table


def _gain(curve: StrengthCurve) -> Text:
    """What the last doubling of the budget gained, and what follows from it."""
    verdict = {True: "still gaining: a lower bound", False: "no longer gaining", None: "not judged"}[curve.unsaturated]
    gains = []
    for name, measure in curve.gain_of_last_doubling.items():
        if measure.value is None:
            return Text(f"last doubling: {verdict} ({measure.reason})")
        low, high = measure.ci95 or (measure.value, measure.value)
        gains.append(
            f"{_HEADINGS.get(name, name).removesuffix(' %')} {measure.value:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"(counts above {curve.tolerance[name]:g})"
        )
    return Text(f"last doubling: {verdict}; {', '.join(gains)}")


def _throughput(throughput: dict[str, Throughput], sent: int) -> Table:
    first = next(iter(throughput.values()))
    table = _new_table(f"Throughput on {first.device}, batch {first.batch}; {sent:,} bytes sent per face")
    for heading in ("", "images/s", "quartiles", "one face, ms", "quartiles"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in throughput.items():
        speed, latency = row.images_per_second, row.latency_ms
        table.add_row(
            name,
            f"{speed.median:.0f}",
            f"{speed.q1:.0f}-{speed.q3:.0f}",
            f"{latency.median:.2f}",
            f"{latency.q1:.2f}-{latency.q3:.2f}",
        )
    return table


def _reasons(result: RunResult) -> Iterable[str]:
    linkages = []
    for attack in result.attack_results.values():
        linkages += [attack.linkage] if attack.linkage is not None else []
        for name in _QUALITY if attack.recovery is not None else ():
            measure = attack.figure(name)
            if measure is not None and measure.value is None:
                yield f"{_HEADINGS[name]}: {(measure.reason or '').removeprefix('LPIPS: ')}"
    verifications: list[Verification] = [] if result.utility is None else [result.utility]
    for linkage in linkages:
        verifications += [linkage.protected_plain, linkage.protected_protected]
    for verification in verifications:
        for far, rate in verification.tar_at_far.items():
            if rate.value is None:
                yield f"TAR@FAR={far}: {rate.reason}"


def render_plan(plan: RunPlan) -> RenderableType:
    """The resolved plan of ``--dry-run``."""
    table = _new_table(f"Plan of {plan.run_id}")
    for heading in ("stage", "what", "cached", "estimate"):
        table.add_column(heading, overflow="fold")
    for stage in plan.stages:
        estimate = "-" if stage.seconds is None else f"{stage.seconds:.0f} s"
        table.add_row(stage.name, escape(stage.what), "yes" if stage.cached else "no", estimate)
    settings = _new_table("Settings")
    settings.add_column("setting")
    settings.add_column("value", overflow="fold")
    for key, value in plan.config.items():
        settings.add_row(key, escape(str(value)))
    total = Text(f"estimate: {plan.seconds:.0f} s in all, on {plan.device}", style="bold")
    return Group(settings, table, total)


def _new_table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)


_VERDICT_COLOUR: dict[Verdict, str] = {
    "pass": "green",
    "inconclusive": "yellow",
    "regress": "red",
    "broken attack": "red",
    "failed": "red",
    "missing": "red",
}


_GATE_HEADINGS = ("baseline", "now", "change", "95 % interval", "tolerated", "rules out", "detectable")


def render_gate(report: GateReport) -> RenderableType:
    """Every run with its figures, what cannot be compared, and the outcome."""
    parts: list[RenderableType] = []
    for cell in report.cells:
        parts += _cell(cell)
    parts += [Text(f"not judged: {line}", style="yellow") for line in report.extra]
    counts = {
        outcome: sum(cell.outcome == outcome for cell in report.cells)
        for outcome in _VERDICT_COLOUR
        if any(cell.outcome == outcome for cell in report.cells)
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    parts.append(Text(f"{report.outcome.upper()} ({told})", style=f"bold {_VERDICT_COLOUR[report.outcome]}"))
    return Group(*parts)


def render_baseline(baseline: Baseline, path: str) -> RenderableType:
    """What was written: expected values, how much runs differ, what is tolerated and what a pass rules out."""
    parts: list[RenderableType] = []
    for cell in baseline.cells:
        table = _new_gate_table(f"{cell.key.label}: {len(cell.runs)} {'run' if len(cell.runs) == 1 else 'runs'}")
        for heading in ("figure", "expected", "between seeds", "trained anew", "tolerated", "a pass rules out"):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for name, figure in cell.figures.items():
            spread = (figure.seed_sd, figure.repeat_sd, figure.tolerance)
            ruled_out = f"{figure.excluded:.2g}" if figure.guarded else "nothing"
            table.add_row(_short(name), f"{figure.value:.4g}", *(f"{value:.2g}" for value in spread), ruled_out)
        parts.append(table)
    parts.append(Text(f"written: {path}"))
    return Group(*parts)


def render_difference(found: Difference) -> RenderableType:
    """Settings that differ, then every figure."""
    parts: list[RenderableType] = []
    if found.settings:
        table = _new_gate_table("What differs")
        for heading in ("", "setting", found.first, found.second):
            table.add_column(escape(heading), overflow="fold")
        for setting in found.settings:
            values = ("-" if value is None else value for value in (setting.first, setting.second))
            table.add_row(setting.kind, escape(setting.name), *(escape(value) for value in values))
        parts.append(table)
    table = _new_gate_table("Figures: second minus first, with its interval over people")
    for heading in ("figure", "first", "second", "change", "95 % interval", "victims"):
        table.add_column(heading, justify="left" if heading in ("figure", "victims") else "right")
    for figure in found.figures:
        table.add_row(_short(figure.figure), *_change_cells(figure), style=_changed_style(figure))
    parts.append(table)
    for run, warnings in found.warnings.items():
        parts += [Text(f"{run}: {warning}", style="yellow") for warning in warnings]
    return Group(*parts)


def _cell(cell: CellVerdict) -> list[RenderableType]:
    parts: list[RenderableType] = []
    title = Text(f"{cell.cell}{f' in {cell.run}' if cell.run else ''}: ") + Text(
        cell.outcome, _VERDICT_COLOUR[cell.outcome]
    )
    if cell.figures:
        table = _new_gate_table(title)
        table.add_column("figure", overflow="fold")
        for heading in _GATE_HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for figure in cell.figures:
            table.add_row(*_figure_cells(figure))
        parts.append(table)
    else:
        parts.append(title)
    own = [f"{one.figure}: {one.note}" for one in cell.figures if one.note and one.victims != "identical"]
    parts += [Text(f"  {note}", style="dim" if cell.outcome == "pass" else "") for note in [*own, *cell.notes]]
    return [*parts, Text()]


def _figure_cells(figure: FigureVerdict) -> tuple[str, ...]:
    verdict = f"[{_VERDICT_COLOUR[figure.outcome]}]{figure.outcome}[/]"
    verdict += "".join(f", {word}" for word in ("improved", "blind") if getattr(figure, word))
    if figure.victims == "identical":
        verdict += ", identical"
    return (
        _short(figure.figure),
        _number(figure.baseline),
        _number(figure.now),
        _signed(figure.change),
        _interval(figure.ci95),
        f"{figure.tolerance:.2g}",
        f"{figure.margin:.2g}",
        "-" if figure.detectable is None else f"{figure.detectable:.2g}",
        verdict,
    )


def _change_cells(figure: FigureChange) -> tuple[str, ...]:
    return (
        _number(figure.first),
        _number(figure.second),
        _signed(figure.change),
        _interval(figure.ci95),
        figure.victims or "-",
    )


def _changed_style(figure: FigureChange) -> str | None:
    """Bold where chance among the victims does not explain the change."""
    return "bold" if figure.ci95 is not None and not figure.ci95[0] <= 0 <= figure.ci95[1] else None


def _short(figure: str) -> str:
    """The place of a figure without the parts that go without saying."""
    return escape(figure.removeprefix("recovery.").replace("identity.", ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _interval(ends: tuple[float, float] | None) -> str:
    # Square brackets would be read as markup.
    return "-" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}"


def _new_gate_table(title: str | Text) -> Table:
    title = Text(title) if isinstance(title, str) else title
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


_STATUS_COLOUR: dict[Status, str] = {
    "success": "green",
    "failed": "red",
    "refused": "yellow",
    "running": "",
    "pending": "",
}


def render_sweep(sweep: SweepState) -> RenderableType:
    """Every cell with its key figures, why some have none, the warnings of the runs, and where the runs lie."""
    counts = {status: sweep.count(status) for status in get_args(Status) if sweep.count(status)}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    parts: list[RenderableType] = [_sweep_table(sweep, f"{len(sweep.cells)} cells: {told}")]
    if any(cell.figures for cell in sweep.cells):
        note = "in brackets: best guess without an attack to unprotected faces (of accuracy: unprotected faces)"
        parts.append(Text(note, style="dim"))
    if any(cell.unsaturated for cell in sweep.cells):
        parts.append(Text("* unsaturated: the attack was still improving, its figures are lower bounds", style="dim"))
    parts += [Text(f"{cell.status}: {cell.name}: {cell.error}", style="red") for cell in sweep.cells if cell.error]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in _warnings(sweep)]
    parts += [Text(cell.directory, overflow="fold") for cell in sweep.cells if cell.directory]
    journal = Path(sweep.directory) / "sweep.json"
    parts.append(Text(f"sweep: {journal}"))
    return Group(*parts)


def _sweep_table(sweep: SweepState, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    names = [name for name in KINDS if any(name in cell.figures for cell in sweep.cells)]
    for heading in ("defence", "attack", "knowledge", "seed", "status"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(f"{KINDS[name].heading} {KINDS[name].unit}".strip(), justify="right", no_wrap=True)
    for cell in sweep.cells:
        status = Text(cell.status + (" *" if cell.unsaturated else ""), style=_STATUS_COLOUR[cell.status])
        figures = (_figure(name, cell.figures.get(name)) for name in names)
        table.add_row(escape(cell.defense), escape(cell.attack), cell.knowledge, str(cell.seed), status, *figures)
    return table


def _figure(name: str, figure: KeyFigure | None) -> str:
    """The figure, and in brackets what it has to be read against."""
    if figure is None:
        return MISSING
    bounds = [shown(name, bound) for bound in (figure.floor, figure.ceiling) if bound is not None]
    return shown(name, figure.value) + (f" ({' to '.join(bounds)})" if bounds else "")


def _warnings(sweep: SweepState) -> Iterable[str]:
    """Each warning once, with the number of cells that have it where not all have."""
    measured = [cell for cell in sweep.cells if cell.status == "success"]
    for warning in dict.fromkeys(warning for cell in measured for warning in cell.warnings):
        holders = [cell for cell in measured if warning in cell.warnings]
        yield warning if len(holders) == len(measured) else f"{_some(holders)}: {warning}"


def _some(cells: list[CellState]) -> str:
    return cells[0].name if len(cells) == 1 else f"{cells[0].name} and {len(cells) - 1} more"
