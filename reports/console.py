"""The tables that a run prints on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.results import (
    AttackInfo,
    Linkage,
    Measure,
    Quality,
    RunPlan,
    RunResult,
    StateInference,
    StrengthCurve,
    Throughput,
    Verification,
)

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
    if result.recovery is not None:
        rows = _recovery_rows(result)
        parts.append(_table("Recovery (victims never seen in training)", rows, _QUALITY))
        identity = [(name, quality, bold) for name, quality, bold in rows]
        parts.append(_table(_identity_title(result), identity, _IDENTITY))
    if result.linkage is not None:
        parts += _linkage(result.linkage)
    if result.state_inference is not None:
        parts.append(_state_inference(result.state_inference))
    if result.attack is not None:
        parts += _queries(result.attack)
    if result.strength is not None:
        parts += [_strength(result.strength), _gain(result.strength)]
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
    defense, attack, dataset = result.defense, result.attack, result.dataset
    if defense is None or attack is None or dataset is None:
        return Text(f"{result.run_id}: {result.status}")
    states = f", {defense.states} states ({defense.entropy_bits:.2f} bits)" if defense.states else ""
    kind = "synthetic faces" if dataset.synthetic else dataset.name
    return Text(
        f"{defense.name}{states} against {attack.name} ({attack.knowledge}) on {kind}, "
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


def _recovery_rows(result: RunResult) -> list[tuple[str, Quality, bool]]:
    recovery = result.recovery
    assert recovery is not None
    assert result.attack is not None
    members = [(f"  {name}", member, False) for name, member in recovery.members.items()]
    floors = [(f"floor: {name.replace('_', ' ')}", floor, False) for name, floor in recovery.floors.items()]
    own = f"{result.attack.name}, worst case" if members else result.attack.name
    return [(own, recovery, True), *members, *floors, ("ceiling", recovery.ceiling, False)]


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
    """What an attack asked of the provider, its members one by one."""
    counted = {"queries_per_victim": "score queries per victim", "fit_queries": "embedding queries while it was fitted"}
    asked = [f"{attack.details[key]:,.10g} {what}" for key, what in counted.items() if key in attack.details]
    if asked:
        yield Text(f"{attack.name}: {', '.join(asked)}")
    for member in attack.members.values():
        yield from _queries(member)


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
    if result.recovery is not None:
        for name in _QUALITY:
            measure: Measure = getattr(result.recovery, name)
            if measure.value is None:
                yield f"{_HEADINGS[name]}: {(measure.reason or '').removeprefix('LPIPS: ')}"
    verifications: list[Verification] = [] if result.utility is None else [result.utility]
    if result.linkage is not None:
        verifications += [result.linkage.protected_plain, result.linkage.protected_protected]
    for verification in verifications:
        for far, measure in verification.tar_at_far.items():
            if measure.value is None:
                yield f"TAR@FAR={far}: {measure.reason}"


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
