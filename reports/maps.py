"""Maps of a report: the frequencies that a defence sends, and the states that it drew and attacks named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bench.results import DefenseInfo
from reports.cells import Setting
from reports.svg import INK, MUTED, PAPER, SERIES, Drawing, draw, shorten, spread

IntArray = npt.NDArray[np.integer]

_ROW = 0.34
#: More states than this make no readable matrix.
_MOST_STATES = 64


def state_figure(setting: Setting, number: int) -> Drawing | None:
    """A bar for each run: interceptions named right and wrong, with a mark where guessing would end."""
    inferred = [
        (cell, inference, inference.faces.value)
        for cell, result in setting.measured
        if (inference := result.state_inference) is not None and inference.faces.value is not None
    ]
    if not inferred:
        return None

    def paint(axes: Axes) -> None:
        for place, (_, inference, right) in enumerate(inferred):
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
        axes.set_yticks(
            range(len(inferred)), [shorten(f"{cell.attack} ({cell.knowledge})")[:32] for cell, _, _ in inferred]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("interceptions, %")
        axes.grid(axis="y", visible=False)

    told = "; ".join(
        f"{cell.label}: {100 * right:.1f} % of interceptions named right"
        + ("" if inference.chance is None else f", guessing {100 * inference.chance:.1f} %")
        for cell, inference, right in inferred
    )
    return draw(
        f"states-{number}",
        "State inference",
        f"{told}.",
        paint,
        synthetic=setting.synthetic,
        size=(4.7, 0.9 + _ROW * len(inferred)),
    )


def confusion_figures(setting: Setting, number: int) -> list[Drawing]:
    """Per attack that named states, a matrix of the state drawn (down) against the one named (across)."""
    drawings: list[Drawing] = []
    for cell, _ in setting.measured:
        table = cell.run.states
        if table is None or (table := table[table["attack"] == cell.name]).empty:
            continue
        drawn, named = table["drawn"].to_numpy(int), table["named"].to_numpy(int)
        listed = None if cell.run.result.defense is None else cell.run.result.defense.states
        states = listed or int(max(drawn.max(), named.max())) + 1
        known = drawn.min() >= 0 and named.min() >= -1 and max(drawn.max(), named.max()) < states
        if states <= _MOST_STATES and known:
            who = f"{cell.defense}, {cell.attack} ({cell.knowledge})"
            drawings.append(_confusion(f"confusion-{number}-{len(drawings)}", who, drawn, named, states, setting))
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


# -- frequencies -----------------------------------------------------------------------------------

_SIDE = 8


def frequency_figures(setting: Setting, number: int) -> list[Drawing]:
    """One map for each defence that names the frequencies it keeps (``kept_channels`` of its details)."""
    drawings = []
    for place, (defense, cells) in enumerate(setting.defenses.items()):
        info = next((cell.run.result.defense for cell in cells if cell.run.result.defense is not None), None)
        kept = _numbers(info, "kept_channels")
        if kept and all(0 <= channel < _SIDE * _SIDE for channel in kept):
            energy = _numbers(info, "channel_energy")
            drawings.append(
                _map(f"frequencies-{number}-{place}", defense, [int(channel) for channel in kept], energy, setting)
            )
    return drawings


def _numbers(info: DefenseInfo | None, name: str) -> list[float]:
    values = [] if info is None else info.details.get(name)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return []
    return [float(value) for value in values]


def _map(slug: str, defense: str, kept: Sequence[int], energy: Sequence[float], setting: Setting) -> Drawing:
    known = len(energy) == _SIDE * _SIDE and all(math.isfinite(value) and value >= 0 for value in energy)
    # Energy spans orders of magnitude between the mean and the highest frequency.
    shade = np.log10(np.maximum(energy, 1e-3)) if known else np.zeros(_SIDE * _SIDE)
    low, high = float(shade.min()), float(shade.max())

    def paint(axes: Axes) -> None:
        for channel in range(_SIDE * _SIDE):
            row, place = divmod(channel, _SIDE)
            sent = channel in kept
            alpha = 0.15 + 0.85 * (float(shade[channel]) - low) / max(high - low, 1e-9) if known else 0.75
            face = SERIES[0] if known or sent else PAPER
            axes.add_patch(
                Rectangle(
                    (place - 0.47, row - 0.47),
                    0.94,
                    0.94,
                    facecolor=face,
                    edgecolor=INK,
                    linewidth=0.8,
                    alpha=alpha if known or sent else 0.2,
                )
            )
            if not sent:
                axes.text(place, row, "×", ha="center", va="center", fontsize=11, color=INK)
        axes.set_xlim(-0.6, _SIDE - 0.4)
        axes.set_ylim(_SIDE - 0.4, -0.6)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xticks(range(_SIDE))
        axes.set_yticks(range(_SIDE))
        axes.set_xlabel("horizontal frequency")
        axes.set_ylabel("vertical frequency")

    dropped = sorted(set(range(_SIDE * _SIDE)) - set(kept))
    told = f"{defense} may send {len(kept)} of 64 frequencies of each colour; never sent (crosses): {dropped}."
    told += " Darker holds more energy." if known else " The run does not hold the energy of the frequencies."
    title = f"Frequencies of {defense}" + (": energy" if known else ": kept and pruned")
    return draw(slug, title, told, paint, synthetic=known and setting.synthetic, size=(3.6, 3.5))
