"""What a random defence had drawn, and what attacks named: how often right, and what was taken for what."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from reports.cells import Setting
from reports.figures.svg import INK, MUTED, PAPER, SERIES, Drawing, draw, shorten, spread

IntArray = npt.NDArray[np.integer]

_ROW = 0.34
#: More states than this make no readable matrix.
_MOST_STATES = 64


def state_figure(setting: Setting, number: int) -> Drawing | None:
    """A bar for each run: interceptions named right and wrong, with a mark where guessing would end."""
    found = [
        (cell, inference, inference.faces.value)
        for cell in setting.measured
        if (inference := cell.run.result.state_inference) is not None and inference.faces.value is not None
    ]
    if not found:
        return None

    def paint(axes: Axes) -> None:
        for place, (_, inference, right) in enumerate(found):
            axes.barh(place, 100 * right, color=SERIES[0], label="" if place else "named right")
            axes.barh(
                place,
                100 - 100 * right,
                left=100 * right,
                color=PAPER,
                edgecolor=MUTED,
                hatch="///",
                label="" if place else "named wrong",
            )
            if inference.chance is not None:
                axes.vlines(
                    100 * inference.chance,
                    place - 0.45,
                    place + 0.45,
                    color=INK,
                    linewidth=2,
                    label="" if place else "guessing",
                )
        axes.set_yticks(range(len(found)), [shorten(f"{cell.attack} ({cell.knowledge})")[:32] for cell, _, _ in found])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("interceptions, %")
        axes.grid(axis="y", visible=False)

    told = "; ".join(
        f"{cell.label}: {100 * right:.1f} % of interceptions named right"
        + ("" if inference.chance is None else f", guessing {100 * inference.chance:.1f} %")
        for cell, inference, right in found
    )
    return draw(
        f"states-{number}",
        "State inference",
        f"{told}.",
        paint,
        synthetic=setting.synthetic,
        size=(4.7, 0.9 + _ROW * len(found)),
    )


def confusion_figures(setting: Setting, number: int) -> list[Drawing]:
    """Per attack that named states, a matrix of the state drawn (down) against the one named (across)."""
    drawings: list[Drawing] = []
    for cell in setting.measured:
        if cell.run.states is None:
            continue
        for attack, table in cell.run.states.groupby("attack"):
            drawn, named = table["drawn"].to_numpy(int), table["named"].to_numpy(int)
            listed = None if cell.run.result.defense is None else cell.run.result.defense.states
            states = listed or int(max(drawn.max(), named.max())) + 1
            if (
                states <= _MOST_STATES
                and drawn.min() >= 0
                and named.min() >= -1
                and max(drawn.max(), named.max()) < states
            ):
                slug = f"confusion-{number}-{len(drawings)}"
                drawings.append(
                    _confusion(slug, f"{cell.defense}, {attack} ({cell.knowledge})", drawn, named, states, setting)
                )
    return drawings


def _confusion(slug: str, who: str, drawn: IntArray, named: IntArray, states: int, setting: Setting) -> Drawing:
    counts = np.zeros((states, states + 1), dtype=int)
    np.add.at(counts, (drawn, np.where(named < 0, states, named)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def paint(axes: Axes) -> None:
        for row, place in zip(*np.nonzero(counts), strict=True):
            colour = SERIES[0] if row == place else SERIES[1]
            square = Rectangle((place - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=0.25 + 0.75 * shares[row, place])
            axes.add_patch(square)
        axes.set_xlim(-0.5, states + 0.5)
        axes.set_ylim(states - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.axvline(states - 0.5, color=MUTED, linewidth=0.8)
        ticks = spread(range(states), most=9)
        axes.set_xticks([*ticks, states], [*map(str, ticks), "none"])
        axes.set_yticks(ticks)
        axes.set_xlabel("state named")
        axes.set_ylabel("state drawn")

    right = int(counts.diagonal().sum())
    told = f"{who}: {right} of {len(drawn)} interceptions named right"
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if wrong.any():
        row, place = np.unravel_index(wrong.argmax(), wrong.shape)
        taken = "none of the states" if place == states else f"state {place}"
        told += f"; most often wrong: state {row} taken for {taken}, {wrong[row, place]} times"
    return draw(
        slug, f"State confusion: {shorten(who)}", f"{told}.", paint, synthetic=setting.synthetic, size=(3.6, 3.6)
    )
