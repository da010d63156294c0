"""What commands print for people: results, verdicts of the gate, baselines, comparisons and sweeps as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.text import Text

from bench.gate.baseline import Baseline
from bench.gate.compare import Difference
from bench.gate.formats import COLUMNS, cells, interval, number
from bench.gate.verdict import CellVerdict, FigureVerdict, GateReport, Verdict
from bench.measures import KINDS, MISSING, kind_at, leak, shown
from bench.measures import interval as entry_interval
from bench.results import (
    LEAST_ACCURACY,
    NO_BETTER,
    AttackInfo,
    AttackResult,
    EvaluatorInfo,
    Explanation,
    Identity,
    Inversion,
    Linkage,
    Measure,
    Quality,
    Recovery,
    RunResult,
    StrengthCurve,
    TemplateProtection,
    Throughput,
    Utility,
    Verification,
    measures,
)
from bench.sweep.cells import KeyFigure, Status, SweepState
from reports.cells import labels
from reports.plan import titled
from reports.summary import most_linked, stolen
from reports.table import Table as Data

_QUALITY = tuple(name for name, kind in KINDS.items() if kind.group == "recovery")
#: A terminal has no room for more; metrics.json and the report hold ranks 5 and 20 and the distance, too.
_IDENTITY = ("type1_tar", "type2_tar", "type1_far_1e3", "type2_far_1e3", "rank1", "cosine")


def render_table(tables: Iterable[Data]) -> RenderableType:
    """Tables of a report, each under its caption; a row that repeats the name above it leaves that out."""
    parts: list[RenderableType] = []
    for table in tables:
        rows: list[list[str]] = []
        above = ""
        for row in (*table.rows, *table.foot):
            cells = [row[column] for column in table.columns]
            shown = [
                f"{cell.text} {cell.interval}".rstrip()
                if column.numeric
                else f"{cell.text}: {cell.note}"
                if cell.note
                else cell.text
                for column, cell in zip(table.columns, cells, strict=True)
            ]
            rows.append(["" if shown[0] == above else shown[0], *shown[1:]])
            above = shown[0]
        parts.append(titled(Text(table.caption), [c.heading for c in table.columns], rows, left=table.headers))
    return Group(*parts)


# -- a result --------------------------------------------------------------------------------------


def figure(name: str, measure: Measure | None, *, bounds: bool = True) -> str:
    """A measure as a person reads it: with the larger half of its interval, a dash where it is missing.

    The two ends of the interval are in ``metrics.json``; a terminal has no room for both.
    """
    if measure is None or measure.value is None:
        return "-"
    kind = KINDS[name]
    text = f"{kind.scale * measure.value:.{kind.decimals}f}"
    if bounds and measure.ci95 is not None:
        low, high = measure.ci95
        text += f" ±{kind.scale * max(high - measure.value, measure.value - low):.{kind.decimals}f}"
    return text


def render_result(result: RunResult, directory: Path) -> RenderableType:
    """Everything a run has to say: utility, templates, each attack, the worst case, throughput, warnings, files."""
    parts: list[RenderableType] = [_headline(result)]
    if (utility := result.utility) is not None:
        rows = {result.defense.name if result.defense else "protected": utility, "unprotected": utility.unprotected}
        if utility.teacher is not None and result.teacher is not None:
            rows[f"its teacher, {result.teacher.name}"] = utility.teacher
        for name, protocol in utility.protocols.items():
            rows |= {f"{name}: {label}": getattr(protocol, label) for label in ("protected", "unprotected")}
        packs = [f"{name} ({protocol.protected.pairs})" for name, protocol in utility.protocols.items()]
        further = f", and of {', '.join(packs)}" if packs else ""
        parts.append(_verifications(f"Recognition of the victims ({utility.pairs} pairs){further}", rows))
        parts += _searches(utility)
    if result.template is not None:
        parts += _template(result.template)
    for name, attack in result.attack_results.items():
        parts += [Text(f"Attack {name}", style="bold underline")] if result.attacks else []
        parts += _attack(name, attack, result)
    if result.worst_case is not None:
        failed = f"; incomplete: {', '.join(result.failed)} failed" if result.failed else ""
        parts.append(Text(f"Worst case of all attacks, victim by victim{failed}", style="bold underline"))
        parts += _recovery("worst case", result.worst_case, result)
        linked = {name: part.figure("linkage") for name, part in result.attack_results.items()}
        most = max(linked, key=lambda name: leak("linkage", linked[name]))
        if (measure := linked[most]) is not None and measure.value is not None:
            parts.append(
                Text(f"linked best by {most}: {figure('linkage', measure)} % of pairs with plain faces told apart")
            )
        if result.worst_case_test is not None and result.worst_case_test.above is False:
            parts.append(Text(f"worst case: {NO_BETTER}", style="bold red"))
    if result.throughput:
        parts.append(_throughput(result.throughput, result.defense.bytes_per_face if result.defense else 0))
    parts += [Text(f"null: {reason}", style="dim") for reason in dict.fromkeys(_reasons(result))]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in result.warnings]
    cached = f", reused: {', '.join(result.cached)}" if result.cached else ""
    parts.append(Text(f"{sum(result.seconds.values()):.0f} s{cached}", style="dim"))
    parts.append(Text(f"files: {directory}"))
    parts.append(Text(f"faces: {directory / 'samples' / 'contact-sheet.png'}"))
    return Group(*parts)


def _headline(result: RunResult) -> Text:
    defense, dataset = result.defense, result.dataset
    infos = [attack.attack for attack in result.attack_results.values()]
    if defense is None or not infos or dataset is None:
        return Text(f"{result.run_id}: {result.status}{f': {result.error}' if result.error else ''}")
    states = f", {defense.states} states ({defense.entropy_bits:.2f} bits)" if defense.states else ""
    return Text(
        f"{defense.name}{states} against {', '.join(info.name for info in infos)} ({infos[0].knowledge}) on "
        f"{'synthetic faces' if dataset.synthetic else dataset.name}, {dataset.image_size} px, "
        f"{dataset.probes} victim images",
        style="bold",
    )


def _verifications(title: str, rows: Mapping[str, Verification]) -> RenderableType:
    fars = list(next(iter(rows.values())).tar_at_far)
    table = []
    for label, row in rows.items():
        figures = [figure(name, getattr(row, name)) for name in ("accuracy", "auc", "eer")]
        table.append([label, *figures, *(figure("tar_at_far", row.tar_at_far[far]) for far in fars)])
    return titled(title, ["", "accuracy %", "AUC %", "EER %", *(f"TAR@{far} %" for far in fars)], table)


def _searches(utility: Utility) -> Iterable[RenderableType]:
    """Templates of several images, 1:1 and 1:N, and the victims among distractors."""
    parts = list(utility.templates_and_galleries())
    for title, kind, place in (
        ("Templates, 1:1: TAR in % at FAR", "tar_at_far", "tar_at_far."),
        ("Search in galleries, 1:N: rank-1 in %", "identified", "rank1"),
        ("Search in galleries, 1:N: TPIR in % at FPIR", "tpir_at_fpir", "tpir_at_fpir."),
    ):
        found = [(name, of, {p: m for p, m in figures.items() if p.startswith(place)}) for name, of, figures in parts]
        places = list(dict.fromkeys(p for *_, figures in found for p in figures))
        if places:
            columns = [p.rpartition(".")[2].replace("rank1", "all") for p in places]
            rows = [[f"{name}: {of}", *(figure(kind, f.get(p)) for p in places)] for name, of, f in found if f]
            yield titled(title, ["", *columns], rows)


def _template(template: TemplateProtection) -> Iterable[RenderableType]:
    pairs = next(iter(template.verification.values())).pairs
    where = "beside the templates" if template.key_stored else "apart from the templates"
    title = f"Template protection ({pairs} pairs; keys are kept {where})"
    yield _verifications(title, {f"{key} key": row for key, row in template.verification.items()})
    replay, diverse = (
        f"{figure(name, at_1e2)} % at FAR 1e-2, {figure(f'{name}_1e3', at_1e3)} % at 1e-3"
        for name, at_1e2, at_1e3 in (
            ("replay", template.replay_far_1e2, template.replay_far_1e3),
            ("diverse", template.diverse_far_1e2, template.diverse_far_1e3),
        )
    )
    yield Text(f"renewability: revoked templates that pass under the new key: {replay}")
    yield Text(f"diversity: images that are not known again under another key: {diverse}")
    chance = "" if template.d_sys_chance is None else f"; chance reaches {template.d_sys_chance:.3f}"
    yield Text(
        "unlinkability of templates under two keys: "
        f"D_sys {figure('template_d_sys', template.d_sys)} (0 unlinkable, 1 fully linkable{chance})"
    )
    yield Text(f"  {_maximal('template_maximal', template.maximal)}")


def _maximal(name: str, maximal: Measure) -> str:
    """Maximal linkability, and what it leaves to any test that links."""
    bound = most_linked(maximal)
    limits = "" if bound is None else f" (TMR at most {100 * bound:.1f} % at FMR 1e-2)"
    return f"maximal linkability {figure(name, maximal)} bits{limits}"


def _inversion(inversion: Inversion) -> Iterable[Text]:
    same, renewed = (
        f"{figure(name, at_1e2)} % at FAR 1e-2, {figure(f'{name}_1e3', at_1e3)} % at 1e-3"
        for name, at_1e2, at_1e3 in (
            ("pass_same", inversion.same_far_1e2, inversion.same_far_1e3),
            ("pass_renewed", inversion.renewed_far_1e2, inversion.renewed_far_1e3),
        )
    )
    yield Text(
        f"Inversion ({stolen(inversion)}): embedding cosine {figure('embedding_cosine', inversion.cosine)} "
        f"(floor: {figure('embedding_cosine', inversion.floor)})"
    )
    yield Text(f"  pass against the stolen template: {same}")
    yield Text(f"  pass against another image's template under a new key: {renewed}")
    yield Text(
        f"  linked across keys: D_sys {figure('estimate_d_sys', inversion.d_sys)}, "
        f"{_maximal('estimate_maximal', inversion.maximal)}"
    )
    yield Text(f"  linked with unprotected embeddings: D_sys {figure('estimate_d_sys_plain', inversion.d_sys_plain)}")


def _attack(name: str, attack: AttackResult, result: RunResult) -> Iterable[RenderableType]:
    if attack.recovery is not None:
        yield from _recovery(name, attack.recovery, result)
    if attack.linkage is not None:
        yield from _linkage(attack.linkage)
    if attack.inversion is not None:
        yield from _inversion(attack.inversion)
    yield _judged(attack.attack)
    if (inference := attack.state_inference) is not None:
        chance = "" if inference.chance is None else f" (guessing: {100 * inference.chance:.1f} %)"
        yield Text(
            f"State inference: the attack names what was drawn for {figure('state_faces', inference.faces)} % of the "
            f"interceptions{chance}, and the place of {figure('state_channels', inference.channels)} % of the channels"
        )
    counted = {
        "queries_per_victim": "score queries per victim",
        "fit_queries": "embedding queries while it was fitted",
        "protection_queries": "pictures sent through the client while it was fitted",
    }
    details = attack.attack.details
    if asked := [f"{details[key]:,.10g} {what}" for key, what in counted.items() if key in details]:
        yield Text(f"{attack.attack.name}: {', '.join(asked)}")
    if "protection_map" in details:
        yield Text(f"{attack.attack.name}: what the client does, by its answers: {details['protection_map']}")
    if "methods" in details:
        yield Text(f"{attack.attack.name}: by {details['method']}; {_methods(details)}")
    if attack.strength is not None:
        yield from (_strength(attack.strength), _gain(attack.strength))


def _methods(details: Mapping[str, Any]) -> str:
    """What each method got on held-out public people, or why it was left out, beside plain faces."""
    told = []
    for name, figures in details["methods"].items():
        label = f"{name} ({figures['recovery']})" if "recovery" in figures else name
        left_out = [
            f"{key.replace('_', ' ')}: {figures[key]}" for key in ("not_applicable", "skipped") if key in figures
        ]
        told.append(f"{label} {left_out[0] if left_out else _told_apart(figures.get('accuracy'))}")
    return (
        f"held-out public people told apart: {', '.join(told)}, plain faces {_told_apart(details['teacher_accuracy'])}"
    )


def _told_apart(accuracy: float | None) -> str:
    return "unknown" if accuracy is None else f"{accuracy:.1%}"


def _judged(info: AttackInfo) -> Text:
    """Whether the attack had its chance: against floors, in training, over states; also where nobody can tell."""
    floors = {True: "better than every floor", False: NO_BETTER, None: "not held against the floors"}[info.above_floor]
    if info.above_floor is not None and info.floor_test is not None:
        floors += f" ({info.floor_test.told()})"
    trained = {True: "saturated", False: "unsaturated: a lower bound", None: "saturation not judged"}[info.saturated]
    covered = {True: "states covered", False: "states not covered", None: "coverage of states not judged"}
    parts = [floors, trained, covered[info.states_covered]]
    if info.broken:
        plain = "" if info.plain_test is None else info.plain_test.told()
        parts.insert(0, f"broken (on unprotected faces: {plain})" if plain else "broken")
    weak = info.broken or info.above_floor is False
    return Text(f"{info.name}: {'; '.join(parts)}", style="bold red" if weak else "")


def _recovery(label: str, recovery: Recovery, result: RunResult) -> Iterable[RenderableType]:
    parts = recovery.parts(label)

    def row(heading: str, part: Quality | Identity, names: Sequence[str], *, bounds: bool) -> list[str]:
        measures = (part.figure(name) if isinstance(part, Quality) else getattr(part, name) for name in names)
        return [heading, *(figure(name, m, bounds=bounds) for name, m in zip(names, measures, strict=True))]

    table = [row(heading, quality, _QUALITY, bounds=quality is recovery) for heading, quality in parts.items()]
    headings = ["", *(KINDS[name].column for name in _QUALITY)]
    yield titled("Recovery (victims never seen in training)", headings, table, bold=(0,))
    # A column that is null in every row is said below, with the reason.
    known = [
        name for name in _IDENTITY if any(leak(name, quality.figure(name)) > -math.inf for quality in parts.values())
    ]
    title = "Identity leakage under " + ", or ".join(judge.told for judge in result.judges.values())
    title += "; the worst of them, then each" if len(result.judges) > 1 else ""
    if known:
        table = []
        for heading, quality in parts.items():
            table.append(row(heading, quality, known, bounds=quality is recovery))
            if heading in (label, "ceiling"):  # what each judge makes of a floor stands in metrics.json
                table += [row(f"  by {name}", found, known, bounds=False) for name, found in quality.judges.items()]
        yield titled(title, ["", *(KINDS[name].column for name in known)], table, bold=(0,))
    for judge in result.judges.values():
        yield Text(_judge(judge), style="bold red" if _is_weak(judge) else "")


def _is_weak(judge: EvaluatorInfo) -> bool:
    """Whether it says nothing of identities; of results before such figures were withheld, by its accuracy alone."""
    accuracy = judge.accuracy.value
    return judge.withheld is not None or (accuracy is not None and accuracy < LEAST_ACCURACY)


def _judge(judge: EvaluatorInfo) -> str:
    """A judge's thresholds, and what it is fed."""
    weak = ""
    if _is_weak(judge):
        weak = f"too weak to judge, {shown('accuracy', judge.accuracy)} % of plain pairs told apart"
        weak += "; its figures are withheld; " if judge.withheld else "; "
    text = f"judge {judge.name}: {weak}threshold {judge.threshold:.3f} at FAR {judge.far_at_threshold:.2%}"
    if judge.threshold_far_1e3 is not None:
        text += (
            f", {judge.threshold_far_1e3:.3f} at FAR 1e-3 (which rests on {judge.accepted_far_1e3} of "
            f"{judge.impostor_pairs} impostor pairs)"
        )
    if judge.input_size is not None:
        size = "x".join(map(str, judge.input_size))
        fed = [judge.layout, size, judge.input_range, judge.colours]
        fed += [f"in batches of {judge.batch}"] if judge.batch else []
        fed += [f"normalised inside ({judge.normalisation})"] if judge.normalisation else []
        text += f"; fed {' '.join(filter(None, fed[:4]))}{''.join(f', {part}' for part in fed[4:])}"
    return text


def _linkage(linkage: Linkage) -> Iterable[RenderableType]:
    what = "protected" if linkage.judge is None else "recovered"
    rows = {
        f"{what} against plain": linkage.protected_plain,
        f"{what} against {what}": linkage.protected_protected,
        "ceiling: plain against plain": linkage.plain,
    }
    if not linkage.protected_plain.pairs:
        return  # the reason stands among those of other figures
    by = "" if linkage.judge is None else f" by their recovered faces, under {linkage.judge}"
    title = f"Linkage of the victims{by} ({linkage.protected_plain.pairs} pairs)"
    yield _verifications(title, {label: row for label, row in rows.items() if row.pairs})
    scores = ", ".join(f"{name.replace('_', ' ')} {figure('d_sys', score)}" for name, score in linkage.d_sys.items())
    rank1 = figure("linkage_rank1", linkage.rank1)
    chance = "" if linkage.d_sys_chance is None else f"; chance reaches {linkage.d_sys_chance:.3f}"
    yield Text(f"rank-1 among plain faces: {rank1} %; D_sys (0 unlinkable, 1 fully linkable{chance}): {scores}")


def _strength(curve: StrengthCurve) -> RenderableType:
    names = list(curve.points[-1].values)
    rows = [[f"{point.budget:,.10g}", *(figure(name, point.values[name]) for name in names)] for point in curve.points]
    title = f"Strength: what leaks against the attacker's budget of {curve.axis}"
    headings = [curve.axis, *(KINDS[name].column for name in names)]
    return titled(title, headings, rows, left=0, bold=(len(rows) - 1,))


def _gain(curve: StrengthCurve) -> Text:
    """What the last doubling of the budget gained, and what follows from it."""
    verdict = {True: "still gaining: a lower bound", False: "no longer gaining", None: "not judged"}[curve.unsaturated]
    gains = []
    for name, measure in curve.gain_of_last_doubling.items():
        if measure.value is None:
            return Text(f"last doubling: {verdict} ({measure.reason})")
        low, high = measure.ci95 or (measure.value, measure.value)
        gains.append(
            f"{KINDS[name].heading} {measure.value:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"(counts above {curve.tolerance[name]:g})"
        )
    return Text(f"last doubling: {verdict}; {', '.join(gains)}")


def _throughput(throughput: Mapping[str, Throughput], sent: int) -> RenderableType:
    first = next(iter(throughput.values()))
    rows = []
    for name, row in throughput.items():
        speed, latency = row.images_per_second, row.latency_ms
        rate = f"{speed.median:.0f}", f"{speed.q1:.0f}-{speed.q3:.0f}"
        rows.append([name, *rate, f"{latency.median:.2f}", f"{latency.q1:.2f}-{latency.q3:.2f}"])
    title = f"Throughput on {first.device}, batch {first.batch}; {sent:,} bytes sent per face"
    return titled(title, ["", "images/s", "quartiles", "one face, ms", "quartiles"], rows)


def _reasons(result: RunResult) -> Iterable[str]:
    """Why figures that stand in the tables are missing."""
    parts: list[object] = [result.utility, result.template and result.template.verification]
    protected = {"template": result.template}
    for attack in result.attack_results.values():
        parts.append(attack.recovery and attack.recovery.model_copy(update={"floors": {}}))
        if (linkage := attack.linkage) is not None and not linkage.protected_plain.pairs:
            yield f"linkage: {linkage.protected_plain.accuracy.reason}"
        elif linkage is not None:
            parts += [each for each in (linkage.protected_plain, linkage.protected_protected) if each.pairs]
        for place, measure in measures(protected | {"inversion": attack.inversion}):
            if measure.value is None and (kind := kind_at(place)) is not None:
                yield f"{kind.heading}: {measure.reason}"
    for part in parts:
        for place, measure in measures(part):
            name = place.rpartition(".")[2]
            if measure.value is None and "tar_at_far" in place:
                yield f"TAR@FAR={name}: {measure.reason}"
            elif measure.value is None and name in _QUALITY:
                yield f"{KINDS[name].heading}: {(measure.reason or '').removeprefix('LPIPS: ')}"


# -- the gate --------------------------------------------------------------------------------------

_VERDICT_COLOUR: dict[Verdict, str] = dict.fromkeys(get_args(Verdict), "red") | {
    "pass": "green",
    "inconclusive": "yellow",
}


def render_gate(report: GateReport) -> RenderableType:
    """Every run with its figures, what cannot be compared, and the outcome."""
    parts = [part for cell in report.cells for part in _cell(cell)]
    parts += [Text(f"not judged: {line}", style="yellow") for line in report.extra]
    outcomes = [cell.outcome for cell in report.cells]
    told = ", ".join(f"{outcomes.count(verdict)} {verdict}" for verdict in get_args(Verdict) if verdict in outcomes)
    parts.append(Text(f"{report.outcome.upper()} ({told})", style=f"bold {_VERDICT_COLOUR[report.outcome]}"))
    return Group(*parts)


def _cell(cell: CellVerdict) -> Iterable[RenderableType]:
    verdict = Text(cell.outcome, _VERDICT_COLOUR[cell.outcome])
    title = Text(f"{cell.cell}{f' in {cell.run}' if cell.run else ''}: ", style="bold") + verdict
    rows: list[list[str | Text]] = [
        [_short(figure.figure), *cells(figure)[1:], _verdict(figure)] for figure in cell.figures
    ]
    yield titled(title, [*COLUMNS, ""], rows) if rows else title
    told = [
        f"{figure.figure}: {figure.note}" for figure in cell.figures if figure.note and figure.victims != "identical"
    ]
    for note in [*told, *cell.notes]:
        yield Text(f"  {note}", style="dim" if cell.outcome == "pass" else "")
    yield Text()


def _verdict(figure: FigureVerdict) -> Text:
    marks = [word for word in ("improved", "blind") if getattr(figure, word)]
    marks += ["identical"] if figure.victims == "identical" else []
    return Text(figure.outcome, _VERDICT_COLOUR[figure.outcome]) + Text("".join(f", {mark}" for mark in marks))


def render_baseline(baseline: Baseline, path: str) -> RenderableType:
    """What was written: expected values, how much runs differ, what is tolerated and what a pass rules out."""
    headings = ("figure", "expected", "between seeds", "trained anew", "tolerated", "a pass rules out")
    parts: list[RenderableType] = []
    for cell in baseline.cells:
        rows = []
        for name, expected in cell.figures.items():
            spread = (expected.seed_sd, expected.repeat_sd, expected.tolerance)
            ruled_out = f"{expected.excluded:.2g}" if expected.guarded else "nothing"
            rows.append([_short(name), f"{expected.value:.4g}", *(f"{value:.2g}" for value in spread), ruled_out])
        runs = f"{len(cell.runs)} {'run' if len(cell.runs) == 1 else 'runs'}"
        parts.append(titled(f"{cell.key.label}: {runs}", headings, rows))
    return Group(*parts, Text(f"written: {path}"))


def render_difference(difference: Difference) -> RenderableType:
    """Settings that differ, then every figure; bold where chance among the victims does not explain a change."""
    parts: list[RenderableType] = []
    if difference.settings:
        rows = [[s.kind, s.name, s.first or "-", s.second or "-"] for s in difference.settings]
        parts.append(titled("What differs", ["", "setting", difference.first, difference.second], rows, left=4))
    headings = ("figure", "first", "second", "change", "95 % interval", "victims")
    figures, changed = [], []
    for place, change in enumerate(difference.figures):
        values = number(change.first), number(change.second), number(change.change, "+.3g"), interval(change.ci95)
        figures.append([_short(change.figure), *values, change.victims or "-"])
        if change.ci95 and not change.ci95[0] <= 0 <= change.ci95[1]:
            changed.append(place)
    parts.append(titled("Figures: second minus first, with its interval over people", headings, figures, bold=changed))
    for run, warnings in difference.warnings.items():
        parts += [Text(f"{run}: {warning}", style="yellow") for warning in warnings]
    return Group(*parts)


def _short(place: str) -> str:
    """The place of a figure without the parts that go without saying."""
    return place.replace("recovery.", "").replace("identity.", "")


# -- an explanation --------------------------------------------------------------------------------

#: Frequencies that a terminal names.
_MOST = 8


def render_explanation(explanation: Explanation, file: Path) -> RenderableType:
    """The frequencies on which each relies most, with their share of all, and how well expressions are told apart."""
    from reports.maps import frequency, reliances  # here, as it draws: no other table needs matplotlib

    parts: list[RenderableType] = []
    for who, reliance in reliances(explanation):
        for what, values in (("occlusion", reliance.occlusion), ("gradient", reliance.gradient)):
            title = f"{who} by {what}, {explanation.faces} faces"
            if values is None:
                parts.append(Text(f"{title}: {reliance.reasons.get(what, 'not measured')}", style="dim"))
                continue
            total = sum(value or 0.0 for value in values) or 1.0
            most = sorted(range(len(values)), key=lambda place: values[place] or 0.0, reverse=True)[:_MOST]
            rows = [
                [frequency(place), number(values[place]), f"{(values[place] or 0.0) / total:.1%}"] for place in most
            ]
            parts.append(titled(title, ("frequency", "value", "share"), rows))
    if (told := explanation.expression) is not None:
        rows = [
            ["behind the defence", *_figure("accuracy", told.protected)],
            ["on plain faces", *_figure("accuracy", told.unprotected)],
            ["chance", f"{100 * told.chance:.1f}", ""],
        ]
        title = f"Expressions told apart (synthetic faces: {', '.join(told.classes)}), %"
        parts.append(titled(title, ("", "accuracy", "95 % interval"), rows))
    parts.append(Text(str(file), overflow="fold"))
    return Group(*parts)


def _figure(name: str, measure: Measure) -> tuple[str, str]:
    return shown(name, measure), entry_interval(name, measure)


# -- a sweep ---------------------------------------------------------------------------------------

_STATUS_COLOUR: Mapping[str, str] = {"success": "green", "failed": "red", "refused": "yellow"}


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
    if any(cell.no_better for cell in sweep.cells):
        parts.append(Text(f"! {NO_BETTER}", style="dim"))
    parts += [Text(f"{cell.status}: {cell.name}: {cell.error}", style="red") for cell in sweep.cells if cell.error]
    left_out = dict.fromkeys(reason for cell in sweep.cells for reason in cell.left_out.values())
    parts += [Text(f"left out: {reason}", style="dim") for reason in left_out]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in _warnings(sweep)]
    parts += [Text(cell.directory, overflow="fold") for cell in sweep.cells if cell.directory]
    parts.append(Text(f"sweep: {Path(sweep.directory) / 'sweep.json'}"))
    return Group(*parts)


def _sweep_table(sweep: SweepState, title: str) -> RenderableType:
    names = [name for name in KINDS if any(name in cell.figures for cell in sweep.cells)]
    defenses = labels([(cell.defense, cell.defense_options) for cell in sweep.cells])
    rows: list[list[str | Text]] = []
    for cell, defense in zip(sweep.cells, defenses, strict=True):
        marks = " *" * cell.unsaturated + " !" * cell.no_better
        status = Text(cell.status + marks, style=_STATUS_COLOUR.get(cell.status, ""))
        figures = (_key_figure(name, cell.figures.get(name)) for name in names)
        rows.append([defense, cell.attack, cell.knowledge, str(cell.seed), status, *figures])
    headings = ("defence", "attack", "knowledge", "seed", "status", *(KINDS[name].column for name in names))
    return titled(title, headings, rows, left=5)


def _key_figure(name: str, figure: KeyFigure | None) -> str:
    """The figure, and in brackets what it has to be read against."""
    if figure is None:
        return MISSING
    bounds = [shown(name, bound) for bound in (figure.floor, figure.ceiling) if bound is not None]
    return shown(name, figure.value) + (f" ({' to '.join(bounds)})" if bounds else "")


def _warnings(sweep: SweepState) -> Iterable[str]:
    """Each warning once, with the number of cells that have it where not all have."""
    measured = [cell for cell in sweep.cells if cell.status == "success"]
    for warning in dict.fromkeys(warning for cell in measured for warning in cell.warnings):
        first, *others = (cell.name for cell in measured if warning in cell.warnings)
        some = f"{first} and {len(others)} more: " if others else f"{first}: "
        yield warning if len(others) + 1 == len(measured) else f"{some}{warning}"
