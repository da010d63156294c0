"""Leakage against what the attacker may spend: faces, steps, queries, or interceptions of one face."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.measures import KINDS
from bench.results import Measure, StrengthCurve
from reports.cells import Cell, Setting
from reports.figures.svg import LINES, MARKERS, SERIES, Drawing, draw, entry

#: What the axes of a budget count, and the figures of a curve that are drawn.
_AXES = {"data": "public faces", "k": "interceptions per face", "steps": "training steps", "queries": "queries"}
_DRAWN = ("ssim", "psnr_aligned", "cosine", "type1_tar", "accuracy")


def strength_figures(setting: Setting, number: int) -> list[Drawing]:
    """One figure for each axis and measure, with a line for each run that has such a curve."""
    curves: dict[str, list[tuple[Cell, StrengthCurve]]] = {}
    for cell in setting.measured:
        if (curve := cell.run.result.strength) is not None:
            curves.setdefault(curve.axis, []).append((cell, curve))
    return [
        _figure(f"strength-{place}-{name.replace('_', '-')}-{number}", axis, name, having, setting.synthetic)
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


def _figure(slug: str, axis: str, name: str, curves: list[tuple[Cell, StrengthCurve]], synthetic: bool) -> Drawing:
    kind = KINDS[name]
    heading = "linkage accuracy" if name == "accuracy" else kind.heading
    verdict = {True: "still gaining", False: "no longer gaining", None: "not judged"}

    def paint(axes: Axes) -> None:
        for place, (cell, curve) in enumerate(curves):
            points = _points(curve, name)
            budgets = [budget for budget, _, _ in points]
            values = [kind.scale * value for _, value, _ in points]
            ends = [measure.ci95 or (value, value) for _, value, measure in points]
            colour = SERIES[place % len(SERIES)]
            axes.plot(
                budgets,
                values,
                color=colour,
                marker=MARKERS[place % len(MARKERS)],
                linestyle=LINES[place % len(LINES)],
                label=entry(f"{cell.label}: {verdict[curve.unsaturated]}"),
            )
            axes.fill_between(
                budgets,
                [kind.scale * low for low, _ in ends],
                [kind.scale * high for _, high in ends],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        spent = sorted({budget for _, curve in curves for budget, _, _ in _points(curve, name)})
        axes.set_xscale("log")
        axes.set_xticks(spent if len(spent) < 9 else spent[:: len(spent) // 6])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_AXES.get(axis, axis))
        axes.set_ylabel(f"{heading}, {kind.unit}" if kind.unit else heading)

    told = "; ".join(
        f"{cell.label}: "
        + ", ".join(f"{kind.scale * value:.3g} at {budget:,.10g}" for budget, value, _ in _points(curve, name))
        + f" ({verdict[curve.unsaturated]})"
        for cell, curve in curves
    )
    title = f"{heading} against {_AXES.get(axis, axis)}"
    return draw(slug, f"{title[0].upper()}{title[1:]}", f"{told}.", paint, synthetic=synthetic)
