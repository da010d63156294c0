"""Figures of a report: utility against privacy, inverted templates, ROC and DET curves, scores, budgets, training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.measures import KINDS, leak
from bench.results import Inversion, Measure, StrengthCurve
from reports.cells import Cell, Setting, floors, recognition, worst_case
from reports.summary import fastest, stolen
from reports.svg import INK, LINES, MARKERS, MUTED, SERIES, Drawing, draw, entry, series, spread


def pareto(setting: Setting, number: int, name: str) -> Drawing | None:
    """Recognition to the right, worst-case leakage by ``name`` upwards, and what is sent as the size of a point.

    None without a defence that has both.
    """
    points = [
        (
            defense if len(setting.knowledge) == 1 else f"{defense} ({knowledge})",
            recognised.protected,
            worst,
            f"{_sent(cells):,.0f} kB, {fastest(cells).text} faces/s",
            _sent(cells),
        )
        for (defense, knowledge), cells in setting.rungs.items()
        if (recognised := recognition(cells)) is not None and (worst := worst_case(cells, name)) is not None
    ]
    if not points:
        return None
    kind, places = KINDS[name], []
    slug, title = f"pareto-{name.replace('_', '-')}-{number}", f"Utility against worst-case {kind.heading}"
    labels = ("recognition accuracy, %", f"worst-case {kind.label}")
    with draw(slug, title, labels, synthetic=setting.synthetic) as drawing:
        axes = drawing.axes
        for place, (defense, utility, worst, cost, sent) in enumerate(points):
            x, y = 100 * (utility.value or 0.0), kind.scale * (worst.measure.value or 0.0)
            places.append((x, y))
            bars: Any = {"xerr": _error(utility, 100), "yerr": _error(worst.measure, kind.scale), "elinewidth": 0.8}
            bars["markersize"] = 3 + 1.5 * math.log10(1 + sent)
            axes.errorbar(x, y, **bars, **series(place, line=False), label=entry(f"{defense}: {cost}"))
            leaked = f"{kind.heading} {y:.3g} (strongest: {worst.strongest.attack})"
            drawing.told.append(f"{defense}: accuracy {x:.1f} %, {leaked}, {cost}")
        drawing.closing = " Lower and further right is better; a larger point sends more."
        front = _front(places)
        if len(front) > 1:
            style: Any = {"color": MUTED, "linewidth": 1, "linestyle": ":"}
            axes.plot(*zip(*front, strict=True), **style, label="Pareto front", zorder=0)
        utilities = (cell.run.result.utility for cell in setting.cells)
        plain = [u.unprotected.accuracy.value for u in utilities if u and u.unprotected.accuracy.value is not None]
        if plain:
            axes.axvline(
                100 * plain[0], color=INK, linewidth=0.8, linestyle="--", label="recognition without a defence"
            )
        if guesses := [guess.value for guess in floors(setting.cells, name).values() if guess.value is not None]:
            highest = max(guesses, key=lambda guess: kind.leaks * guess)
            axes.axhline(kind.scale * highest, color=MUTED, linewidth=0.8, label="highest trivial floor")
        axes.text(0.99, 0.02, "better ↘", transform=axes.transAxes, ha="right", va="bottom", color=MUTED)
        axes.margins(0.12, 0.12)
    return drawing


def _sent(cells: Sequence[Cell]) -> float:
    """What a defence sends of a face, in 1,000 bytes."""
    defense = next((cell.run.result.defense for cell in cells if cell.run.result.defense is not None), None)
    return 0.0 if defense is None else defense.bytes_per_face / 1000


def _error(measure: Measure, scale: float) -> list[list[float]] | None:
    if measure.value is None or measure.ci95 is None:
        return None
    low, high = measure.ci95
    return [[scale * max(0.0, measure.value - low)], [scale * max(0.0, high - measure.value)]]


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: less leakage at no less recognition."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


# -- templates -------------------------------------------------------------------------------------


def template_figure(setting: Setting, number: int) -> Drawing | None:
    """Verification under a stolen key to the right, inverted templates that pass once the key is renewed upwards.

    At FAR 1e-2, against the template of another image: what passes against the stolen template alone, revoking ends.

    A colour for each template defence and a marker for what was stolen: one template or several, with keys or without.
    Of several attacks the one of which most pass. None where no template was inverted.
    """
    most: dict[tuple[str, str], tuple[Measure, Inversion]] = {}
    for cell, result in setting.measured:
        template, inversion = cell.run.result.template, result.inversion
        if template is None or inversion is None or "stolen" not in template.verification:
            continue
        place, accuracy = (cell.defense, stolen(inversion)), template.verification["stolen"].accuracy
        before, now = most[place][1].renewed_far_1e2 if place in most else None, inversion.renewed_far_1e2
        if accuracy.value is not None and leak("pass_renewed", now) > leak("pass_renewed", before):
            most[place] = accuracy, inversion
    if not most:
        return None
    colours = {defense: SERIES[n % len(SERIES)] for n, defense in enumerate(dict.fromkeys(name for name, _ in most))}
    labels = ("accuracy under a stolen key, %", "inverted templates that pass once renewed, %")
    title = "Inverted templates against verification"
    with draw(f"templates-drawn-{number}", title, labels, synthetic=setting.synthetic) as drawing:
        axes = drawing.axes
        for (defense, what), (accuracy, inversion) in most.items():
            x, y = 100 * (accuracy.value or 0.0), 100 * (inversion.renewed_far_1e2.value or 0.0)
            errors: Any = {"xerr": _error(accuracy, 100), "yerr": _error(inversion.renewed_far_1e2, 100)}
            style: Any = {"color": colours[defense], "linestyle": "none"}
            style["marker"] = MARKERS[2 * (inversion.records > 1) + (not inversion.key)]
            axes.errorbar(x, y, **errors, **style, elinewidth=0.8, label=entry(f"{defense}: {what}"))
            same = inversion.same_far_1e2.value
            told = "" if same is None else f", {100 * same:.3g} % against the stolen template"
            drawing.told.append(f"{defense}: {what}: {y:.3g} % pass{told}; accuracy under a stolen key {x:.1f} %")
        axes.axhline(1, color=MUTED, linewidth=0.8, label="impostors (FAR 1e-2)")
        axes.text(0.99, 0.02, "better ↘", transform=axes.transAxes, ha="right", va="bottom", color=MUTED)
        axes.margins(0.12, 0.12)
        drawing.closing = " Lower and further right is better."
    return drawing


# -- pairs of faces --------------------------------------------------------------------------------

Values = npt.NDArray[np.float64]

#: Table of scores -> its kinds of pairs, and how they are called. The first is of what the defence sends.
PAIRS = {
    "scores": {"protected": "behind the defence", "unprotected": "without a defence"},
    "linkage": {
        "protected_plain": "linkage of protected and plain",
        "protected_protected": "linkage of protected and protected",
        "plain": "the same attack on plain faces",
    },
}
_BINS = 40


def roc(scores: Values, same: npt.NDArray[np.bool_]) -> tuple[Values, Values]:
    """False and true acceptance rates (T,) at every threshold, from (0, 0) to (1, 1).

    Args:
        scores: (P,), higher is more alike; finite.
        same: (P,), whether a pair shows one person.

    Example:
        >>> far, tar = roc(np.array([0.9, 0.1, 0.5]), np.array([True, False, True]))
        >>> far.tolist(), tar.tolist()
        ([0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    order = np.argsort(-scores, kind="stable")
    # Pairs of one score are accepted together.
    accepted = np.concatenate([[0], np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1])
    genuine = np.concatenate([[0], np.cumsum(same[order])])[accepted]
    return (accepted - genuine) / max(1, int((~same).sum())), genuine / max(1, int(same.sum()))


def _scores(setting: Setting, *tables: str) -> Iterator[tuple[str, str, Values, npt.NDArray[np.bool_]]]:
    """(kind of pairs, label, scores, whether of one person) of recognisers (``scores``) and attacks (``linkage``)."""
    seen = set()
    for cell, _ in setting.measured:
        linking = {(other.attack, other.knowledge) for other in setting.defenses[cell.defense] if other.links}
        for table in tables:
            frame = cell.scores(table)
            several = table == "linkage" and len(linking) > 1
            who = f"{cell.defense}, {cell.attack} ({cell.knowledge})" if several else cell.defense
            for name, what in PAIRS[table].items() if frame is not None else ():
                label = what if name == "unprotected" else f"{who}, {what}"
                # Every attack on a defence stores the same recogniser's scores.
                if frame is not None and label not in seen:
                    seen.add(label)
                    yield name, label, frame[name].to_numpy(dtype="float64"), frame["same"].to_numpy(dtype=bool)


def roc_figure(setting: Setting, number: int, table: str, *, det: bool = False) -> Drawing | None:
    """One curve for each defence (``scores``) or linkage attack (``linkage``), with its ceiling.

    With ``det`` the errors are drawn against each other (detection error trade-off, ISO/IEC 19795-1), both to a
    logarithmic scale.
    """
    curves = []
    for _, label, scores, same in _scores(setting, table):
        far, tar = roc(scores, same)
        keep = spread(range(len(far)))
        curves.append((label, far[keep], tar[keep]))
    if not curves:
        return None
    kind, of = "DET" if det else "ROC", "recognition" if table == "scores" else "linkage"
    labels = ("false acceptance rate", "true acceptance rate")
    if det:
        labels = ("false match rate (FMR)", "false non-match rate (FNMR)")
    slug = f"{kind.lower()}-{table}-{number}"
    with draw(slug, f"{kind} of {of}", labels, synthetic=setting.synthetic) as drawing:
        axes = drawing.axes
        for place, (label, far, tar) in enumerate(curves):
            rates, what = (1 - tar, "rejected") if det else (tar, "accepted")
            axes.plot(far, rates, **series(place, marker=False), label=entry(label), drawstyle="steps-post")
            drawing.told.append(f"{label}: {np.interp(0.1, far, rates):.0%} {what} at a false rate of 10 %")
        least = min(float(far[far > 0].min()) for _, far, _ in curves)
        grid = np.geomspace(least, 1, 50)
        axes.plot(grid, 1 - grid if det else grid, color=MUTED, linewidth=0.8, label="guessing")
        _log_axis(axes, "g")
        axes.set_xlim(least, 1)
        if det:
            _log_axis(axes, "g", "y")
            axes.set_ylim(0.8 * min(float((1 - tar)[tar < 1].min()) for _, _, tar in curves), 1)
        else:
            axes.set_ylim(0, 1.01)
    return drawing


def _log_axis(axes: Axes, digits: str, name: Literal["x", "y"] = "x") -> None:
    """Numbers instead of powers of ten beside the plot."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{digits}}"))
    axis.set_minor_formatter(NullFormatter())


def distributions(setting: Setting, number: int) -> list[Drawing]:
    """Genuine against impostor scores: of each defence's recogniser, and of each linkage attack."""
    drawings: list[Drawing] = []
    for name, label, scores, same in _scores(setting, "scores", "linkage"):
        if name not in ("protected", "protected_plain"):
            continue
        slug = f"scores-{name.replace('_', '-')}-{number}-{len(drawings)}"
        labels = ("score", "density")
        with draw(slug, f"Scores: {label}", labels, synthetic=setting.synthetic) as drawing:
            ends = float(scores.min()), float(scores.max())
            size = max(1.0, *map(abs, ends))
            alike = ends[1] - ends[0] < 1e-9 * size  # too close for so many bins
            edges = np.linspace(*((ends[0] - size / 2, ends[1] + size / 2) if alike else ends), _BINS + 1)
            for place, (who, values) in enumerate((("same person", scores[same]), ("two people", scores[~same]))):
                heights, _ = np.histogram(values, bins=edges, density=True)
                style: Any = {"color": SERIES[place], "linestyle": LINES[place]}
                drawing.axes.stairs(heights, edges, color=SERIES[place], fill=True, alpha=0.25)
                drawing.axes.stairs(heights, edges, **style, label=f"{who} ({len(values):,} pairs)")
                if len(values):
                    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
                    drawing.told.append(f"{who}: median {median:.3f}, middle half {low:.3f} to {high:.3f}")
            drawing.axes.axhline(0, color=INK, linewidth=0.5)
        drawings.append(drawing)
    return drawings


# -- budgets ---------------------------------------------------------------------------------------

#: What the axes of a budget count, and the figures of a curve that are drawn.
_AXES = {"data": "public faces", "k": "interceptions per face", "steps": "training steps", "queries": "queries"}
_DRAWN = ("ssim", "psnr_aligned", "cosine", "type1_tar", "linkage")


def strength_figures(setting: Setting, number: int) -> list[Drawing]:
    """One figure for each axis and measure, with a line for each run that has such a curve."""
    curves: dict[str, list[tuple[Cell, StrengthCurve]]] = {}
    for cell, result in setting.measured:
        if (curve := result.strength) is not None:
            curves.setdefault(curve.axis, []).append((cell, curve))
    return [
        _strength(f"strength-{place}-{name.replace('_', '-')}-{number}", axis, name, having, setting.synthetic)
        for place, (axis, all_curves) in enumerate(curves.items())
        for name in _DRAWN
        if (having := [(cell, curve) for cell, curve in all_curves if not _points(curve, name).empty])
    ]


def _points(curve: StrengthCurve, name: str) -> pd.DataFrame:
    """Budget, value and interval of the points at which the figure was measured, in the unit that it is shown in."""
    scale = KINDS[name].scale
    rows = [
        (point.budget, scale * value, *(scale * end for end in measure.ci95 or (value, value)))
        for point in curve.points
        if (measure := point.values.get(name)) is not None and (value := measure.value) is not None
    ]
    return pd.DataFrame(rows, columns=["budget", "value", "low", "high"])


def _strength(
    slug: str, axis: str, name: str, curves: Sequence[tuple[Cell, StrengthCurve]], synthetic: bool
) -> Drawing:
    kind, counted = KINDS[name], _AXES.get(axis, axis)
    verdict = {True: "still gaining", False: "no longer gaining", None: "not judged"}
    title = f"{kind.heading} against {counted}"
    title = f"{title[0].upper()}{title[1:]}"
    with draw(slug, title, (counted, kind.label), synthetic=synthetic) as drawing:
        axes = drawing.axes
        for place, (cell, curve) in enumerate(curves):
            points, style = _points(curve, name), series(place)
            label = f"{cell.label}: {verdict[curve.unsaturated]}"
            axes.plot(points["budget"], points["value"], **style, label=entry(label))
            axes.fill_between(
                points["budget"], points["low"], points["high"], color=style["color"], alpha=0.15, linewidth=0
            )
            values = (f"{row.value:.3g} at {row.budget:,.10g}" for row in points.itertuples())
            drawing.told.append(f"{cell.label}: {', '.join(values)} ({verdict[curve.unsaturated]})")
        spent = sorted({budget for _, curve in curves for budget in _points(curve, name)["budget"]})
        _log_axis(axes, ",.10g")
        axes.set_xticks(spent if len(spent) < 9 else spent[:: len(spent) // 6])
    return drawing


# -- training --------------------------------------------------------------------------------------


def training_figures(setting: Setting, number: int) -> list[Drawing]:
    """The curves of all attacks, each in a figure of its own scale, and of all recognisers together."""
    drawings = []
    for place, (cell, result) in enumerate(setting.measured):
        if len(curve := result.attack.curve) > 1:
            slug, title = f"fit-{number}-{place}", f"Fit of {cell.label}"
            drawings.append(_losses(slug, title, {cell.label: curve}, setting.synthetic))
    recognisers = {
        losses.task.removeprefix("train "): losses.points for cell in setting.cells for losses in cell.run.losses
    }
    if recognisers:
        title = "Training of the recognisers"
        drawings.append(_losses(f"recognisers-{number}", title, recognisers, setting.synthetic))
    return drawings


def _losses(slug: str, title: str, curves: Mapping[str, Sequence[tuple[float, float]]], synthetic: bool) -> Drawing:
    with draw(slug, title, ("examples seen", "loss"), synthetic=synthetic) as drawing:
        for place, (label, points) in enumerate(curves.items()):
            named = entry(label) if len(curves) > 1 else None
            drawing.axes.plot(*zip(*points, strict=True), **series(place), markersize=3.5, label=named)
            drawing.told.append(f"{label}: loss {points[0][1]:.4g} at first, {points[-1][1]:.4g} at the end")
    return drawing
