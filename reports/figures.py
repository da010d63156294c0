"""Figures of a report: utility against privacy, ROC curves and scores, strength of attackers, training curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.measures import KINDS
from bench.results import Measure, StrengthCurve
from reports.cells import Cell, Setting, floors, lowest_accuracy, worst_case
from reports.summary import fastest
from reports.svg import INK, LINES, MUTED, SERIES, Drawing, draw, entry, series, spread


def pareto(setting: Setting, number: int, name: str) -> Drawing | None:
    """Recognition to the right, worst-case leakage by ``name`` upwards; None without a defence that has both."""
    points = []
    for defense, cells in setting.defenses.items():
        utility, worst = lowest_accuracy(cells), worst_case(cells, name)
        if utility is not None and worst is not None:
            points.append((defense, utility, worst, fastest(cells).text))
    if not points:
        return None
    kind = KINDS[name]

    def paint(axes: Axes) -> None:
        for place, (defense, utility, worst, rate) in enumerate(points):
            x, y = _percent(utility), kind.scale * (worst.measure.value or 0.0)
            axes.errorbar(
                x,
                y,
                xerr=_error(utility, 100),
                yerr=_error(worst.measure, kind.scale),
                **series(place, line=False),
                label=entry(f"{defense}: {rate} faces/s"),
                elinewidth=0.8,
            )
        front = _front(
            [(_percent(utility), kind.scale * (worst.measure.value or 0.0)) for _, utility, worst, _ in points]
        )
        if len(front) > 1:
            axes.plot(
                *zip(*front, strict=True), color=MUTED, linewidth=1, linestyle=":", label="Pareto front", zorder=0
            )
        plain = _unprotected(setting)
        if plain is not None:
            axes.axvline(plain, color=INK, linewidth=0.8, linestyle="--", label="recognition without a defence")
        if guesses := [guess.value for guess in floors(setting.cells, name).values() if guess.value is not None]:
            highest = max(guesses, key=lambda guess: kind.leaks * guess)
            axes.axhline(kind.scale * highest, color=MUTED, linewidth=0.8, label="highest trivial floor")
        axes.text(0.99, 0.02, "better ↘", transform=axes.transAxes, ha="right", va="bottom", color=MUTED)
        axes.margins(0.12, 0.12)
        axes.set_xlabel("recognition accuracy, %")
        axes.set_ylabel(f"worst-case {kind.label}")

    told = "; ".join(
        f"{defense}: accuracy {_percent(utility):.1f} %, {kind.heading} {kind.scale * (worst.measure.value or 0):.3g} "
        f"(strongest: {worst.strongest.attack}), {rate} faces per second"
        for defense, utility, worst, rate in points
    )
    return draw(
        f"pareto-{name.replace('_', '-')}-{number}",
        f"Utility against worst-case {kind.heading}",
        f"{told}. Lower and further right is better.",
        paint,
        synthetic=setting.synthetic,
    )


def _percent(measure: Measure) -> float:
    return 100 * (measure.value or 0.0)


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


def _unprotected(setting: Setting) -> float | None:
    for cell in setting.cells:
        utility = cell.run.result.utility
        if utility is not None and utility.unprotected.accuracy.value is not None:
            return 100 * utility.unprotected.accuracy.value
    return None


# -- pairs of faces --------------------------------------------------------------------------------

Values = npt.NDArray[np.float64]

#: How the kinds of pairs are called.
PAIRS = {
    "protected": "behind the defence",
    "unprotected": "without a defence",
    "protected_plain": "linkage of protected and plain",
    "protected_protected": "linkage of protected and protected",
    "plain": "the same attack on plain faces",
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
    ranked = scores[order]
    # Pairs of one score are accepted together.
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True)) + 1
    hits = np.concatenate([[0], np.cumsum(same[order])])
    accepted = np.concatenate([[0], ends])
    genuine = hits[accepted]
    return (accepted - genuine) / max(1, int((~same).sum())), genuine / max(1, int(same.sum()))


def roc_figure(setting: Setting, number: int, table: str) -> Drawing | None:
    """One curve for each defence (``scores``) or linkage attack (``linkage``), with its ceiling."""
    curves = list(_curves(setting, table))
    if not curves:
        return None

    def paint(axes: Axes) -> None:
        for place, (label, far, tar) in enumerate(curves):
            axes.plot(far, tar, **series(place, marker=False), label=entry(label), drawstyle="steps-post")
        least = min(float(far[far > 0].min()) for _, far, _ in curves)
        grid = np.geomspace(least, 1, 50)
        axes.plot(grid, grid, color=MUTED, linewidth=0.8, label="guessing")
        axes.set_xscale("log")
        axes.set_xlim(least, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.01)
        axes.set_xlabel("false acceptance rate")
        axes.set_ylabel("true acceptance rate")

    title = "ROC of recognition" if table == "scores" else "ROC of linkage"
    told = "; ".join(
        f"{label}: {np.interp(0.1, far, tar):.0%} accepted at a false rate of 10 %" for label, far, tar in curves
    )
    return draw(f"roc-{table}-{number}", title, f"{told}.", paint, synthetic=setting.synthetic)


def _curves(setting: Setting, table: str) -> Iterable[tuple[str, Values, Values]]:
    seen = set()
    for cell, _ in setting.measured:
        frame: pd.DataFrame | None = getattr(cell.run, table)
        if frame is None:
            continue
        names = (
            ("protected", "unprotected") if table == "scores" else ("protected_plain", "protected_protected", "plain")
        )
        who = {"protected": cell.defense, "unprotected": ""}
        for name in names:
            label = who.get(name, cell.defense)
            label = f"{label}, {PAIRS[name]}" if label else PAIRS[name]
            if label in seen:  # every attack on a defence stores the same recogniser's scores
                continue
            seen.add(label)
            far, tar = roc(frame[name].to_numpy(dtype="float64"), frame["same"].to_numpy(dtype=bool))
            keep = spread(range(len(far)))
            yield label, far[keep], tar[keep]


def distributions(setting: Setting, number: int) -> list[Drawing]:
    """Genuine against impostor scores: of each defence's recogniser, and of each linkage attack."""
    drawings: dict[str, Drawing] = {}
    for cell, _ in setting.measured:
        for table, names in (("scores", ("protected",)), ("linkage", ("protected_plain",))):
            frame: pd.DataFrame | None = getattr(cell.run, table)
            for name in names if frame is not None else ():
                title = f"Scores: {cell.defense}, {PAIRS[name]}"
                if frame is not None and title not in drawings:
                    slug = f"scores-{name.replace('_', '-')}-{number}-{len(drawings)}"
                    same = frame["same"].to_numpy(dtype=bool)
                    scores = frame[name].to_numpy(dtype="float64")
                    drawings[title] = _distribution(slug, title, scores[same], scores[~same], setting.synthetic)
    return list(drawings.values())


def _distribution(slug: str, title: str, genuine: Values, impostor: Values, synthetic: bool) -> Drawing:
    kinds: Sequence[tuple[str, Values, Any]] = (("same person", genuine, 0), ("two people", impostor, 1))

    def paint(axes: Axes) -> None:
        edges = np.histogram_bin_edges(np.concatenate([genuine, impostor]), bins=_BINS)
        for label, values, place in kinds:
            heights, _ = np.histogram(values, bins=edges, density=True)
            axes.stairs(heights, edges, color=SERIES[place], fill=True, alpha=0.25)
            axes.stairs(
                heights, edges, color=SERIES[place], linestyle=LINES[place], label=f"{label} ({len(values):,} pairs)"
            )
        axes.set_xlabel("score")
        axes.set_ylabel("density")
        axes.axhline(0, color=INK, linewidth=0.5)

    told = "; ".join(
        f"{label}: median {np.median(values):.3f}, middle half {np.quantile(values, 0.25):.3f} to "
        f"{np.quantile(values, 0.75):.3f}"
        for label, values, _ in kinds
        if len(values)
    )
    return draw(slug, title, f"{told}.", paint, synthetic=synthetic)


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
        if (having := [(cell, curve) for cell, curve in all_curves if _points(curve, name)])
    ]


def _points(curve: StrengthCurve, name: str) -> list[tuple[float, float, Measure]]:
    """(budget, value, measure) of the points at which the figure was measured."""
    return [
        (point.budget, measure.value, measure)
        for point in curve.points
        if (measure := point.values.get(name)) is not None and measure.value is not None
    ]


def _strength(slug: str, axis: str, name: str, curves: list[tuple[Cell, StrengthCurve]], synthetic: bool) -> Drawing:
    kind = KINDS[name]
    verdict = {True: "still gaining", False: "no longer gaining", None: "not judged"}

    def paint(axes: Axes) -> None:
        for place, (cell, curve) in enumerate(curves):
            points = _points(curve, name)
            budgets = [budget for budget, _, _ in points]
            values = [kind.scale * value for _, value, _ in points]
            ends = [measure.ci95 or (value, value) for _, value, measure in points]
            axes.plot(budgets, values, **series(place), label=entry(f"{cell.label}: {verdict[curve.unsaturated]}"))
            axes.fill_between(
                budgets,
                [kind.scale * low for low, _ in ends],
                [kind.scale * high for _, high in ends],
                color=SERIES[place % len(SERIES)],
                alpha=0.15,
                linewidth=0,
            )
        spent = sorted({budget for _, curve in curves for budget, _, _ in _points(curve, name)})
        axes.set_xscale("log")
        axes.set_xticks(spent if len(spent) < 9 else spent[:: len(spent) // 6])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_AXES.get(axis, axis))
        axes.set_ylabel(kind.label)

    told = "; ".join(
        f"{cell.label}: "
        + ", ".join(f"{kind.scale * value:.3g} at {budget:,.10g}" for budget, value, _ in _points(curve, name))
        + f" ({verdict[curve.unsaturated]})"
        for cell, curve in curves
    )
    title = f"{kind.heading} against {_AXES.get(axis, axis)}"
    return draw(slug, f"{title[0].upper()}{title[1:]}", f"{told}.", paint, synthetic=synthetic)


# -- training --------------------------------------------------------------------------------------


def training_figures(setting: Setting, number: int) -> list[Drawing]:
    """The curves of all attacks, each in a figure of its own scale, and of all recognisers together."""
    drawings = []
    for place, (cell, result) in enumerate(setting.measured):
        if len(curve := result.attack.curve) > 1:
            fit = [(float(step), loss) for step, loss in curve]
            drawings.append(
                _losses(f"fit-{number}-{place}", f"Fit of {cell.label}", {cell.label: fit}, setting.synthetic)
            )
    recognisers = {
        losses.task.removeprefix("train "): losses.points for cell in setting.cells for losses in cell.run.losses
    }
    if recognisers:
        title = "Training of the recognisers"
        drawings.append(_losses(f"recognisers-{number}", title, recognisers, setting.synthetic))
    return drawings


def _losses(slug: str, title: str, curves: Mapping[str, Sequence[tuple[float, float]]], synthetic: bool) -> Drawing:
    def paint(axes: Axes) -> None:
        for place, (label, points) in enumerate(curves.items()):
            named = entry(label) if len(curves) > 1 else None
            axes.plot(*zip(*points, strict=True), **series(place), markersize=3.5, label=named)
        axes.set_xlabel("examples seen")
        axes.set_ylabel("loss")

    told = "; ".join(
        f"{label}: loss {points[0][1]:.4g} at first, {points[-1][1]:.4g} at the end" for label, points in curves.items()
    )
    return draw(slug, title, f"{told}.", paint, synthetic=synthetic)
