"""Training curves: the loss of attacks on held-out faces, and of recognisers as far as progress was logged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from bench.results import AttackInfo
from reports.cells import Setting
from reports.figures.svg import LINES, MARKERS, SERIES, Drawing, draw, entry

Curve = tuple[str, Sequence[tuple[float, float]]]


def training_figures(setting: Setting, number: int) -> list[Drawing]:
    """The curves of all attacks, each in a figure of its own scale, and of all recognisers together."""
    drawings = []
    for place, (label, points) in enumerate(_attacks(setting)):
        title = f"Fit of {label}"
        drawings.append(_figure(f"fit-{number}-{place}", title, [(label, points)], "examples seen", setting.synthetic))
    recognisers = {
        losses.task.removeprefix("train "): losses.points for cell in setting.cells for losses in cell.run.losses
    }
    if recognisers:
        title = "Training of the recognisers"
        curves = list(recognisers.items())
        drawings.append(_figure(f"recognisers-{number}", title, curves, "examples seen", setting.synthetic))
    return drawings


def _attacks(setting: Setting) -> list[Curve]:
    """The curve of each attack; one that is a member of a composite, too, has it once."""
    found: dict[tuple[tuple[float, float], ...], str] = {}
    for cell in setting.measured:
        info = cell.run.result.attack
        for name, points in _curves(info) if info is not None else ():
            own = info is not None and name == info.name
            if own or tuple(points) not in found:
                found[tuple(points)] = cell.label if own else f"{name} of {cell.label}"
    return [(label, points) for points, label in found.items()]


def _curves(info: AttackInfo) -> Iterable[Curve]:
    if len(info.curve) > 1:
        yield info.name, [(float(step), loss) for step, loss in info.curve]


def _figure(slug: str, title: str, curves: Sequence[Curve], unit: str, synthetic: bool) -> Drawing:
    def paint(axes: Axes) -> None:
        for place, (label, points) in enumerate(curves):
            axes.plot(
                *zip(*points, strict=True),
                color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=3.5,
                linestyle=LINES[place % len(LINES)],
                label=entry(label) if len(curves) > 1 else None,
            )
        axes.set_xlabel(unit)
        axes.set_ylabel("loss")

    told = "; ".join(
        f"{label}: loss {points[0][1]:.4g} at first, {points[-1][1]:.4g} at the end" for label, points in curves
    )
    return draw(slug, title, f"{told}.", paint, synthetic=synthetic)
