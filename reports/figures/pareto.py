"""Privacy against utility against throughput: one point for each defence, at its worst case."""

from __future__ import annotations

from matplotlib.axes import Axes

from bench.measures import KINDS, leak
from bench.results import Measure
from reports.cells import Setting
from reports.figures.svg import INK, MARKERS, MUTED, SERIES, Drawing, draw, entry
from reports.summary import fastest, lowest_accuracy
from reports.worst import worst_case


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
                fmt=MARKERS[place % len(MARKERS)],
                color=SERIES[place % len(SERIES)],
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
        floor = _floor(setting, name)
        if floor is not None:
            axes.axhline(kind.scale * floor, color=MUTED, linewidth=0.8, label="highest trivial floor")
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
    for point in sorted(points, key=lambda one: (-one[0], one[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _unprotected(setting: Setting) -> float | None:
    for cell in setting.measured:
        utility = cell.run.result.utility
        if utility is not None and utility.unprotected.accuracy.value is not None:
            return 100 * utility.unprotected.accuracy.value
    return None


def _floor(setting: Setting, name: str) -> float | None:
    """What trivial guesses get by a figure of recovery, the highest of all runs."""
    if name == "linkage":
        return 0.5
    floors = [
        getattr(floor if hasattr(floor, name) else floor.identity, name)
        for cell in setting.measured
        if (recovery := cell.run.result.recovery) is not None
        for floor in recovery.floors.values()
    ]
    value: float | None = max(floors, key=lambda one: leak(name, one)).value if floors else None
    return value
