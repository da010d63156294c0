"""Maps of a report: the frequencies that a defence sends, and the states that it drew and attacks named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patches import Rectangle

from bench.results import DefenseInfo, Explanation, Reliance
from reports.cells import Setting
from reports.svg import INK, MUTED, PAPER, SERIES, Drawing, draw, shorten, spread

IntArray = npt.NDArray[np.integer]

_ROW = 0.34
#: More states than this make no readable matrix.
_MOST_STATES = 64


def state_figure(setting: Setting, number: int) -> Drawing | None:
    """A bar for each run: interceptions named right and wrong, with a mark where guessing would end."""
    inferred = [
        (cell, 100 * value, inference.chance)
        for cell, result in setting.measured
        if (inference := result.state_inference) is not None and (value := inference.faces.value) is not None
    ]
    if not inferred:
        return None
    size = (4.7, 0.9 + _ROW * len(inferred))
    slug, labels = f"states-{number}", ("interceptions, %", "")
    with draw(slug, "State inference", labels, synthetic=setting.synthetic, size=size) as drawing:
        axes = drawing.axes
        for place, (cell, right, chance) in enumerate(inferred):
            axes.barh(place, right, color=SERIES[0], label="" if place else "named right")
            wrong: Any = {"color": PAPER, "edgecolor": MUTED, "hatch": "///"}
            axes.barh(place, 100 - right, left=right, **wrong, label="" if place else "named wrong")
            told = f"{cell.label}: {right:.1f} % of interceptions named right"
            if chance is not None:
                ends = (place - 0.45, place + 0.45)
                axes.vlines(100 * chance, *ends, color=INK, linewidth=2, label="" if place else "guessing")
                told += f", guessing {100 * chance:.1f} %"
            drawing.told.append(told)
        names = [shorten(f"{cell.attack} ({cell.knowledge})")[:32] for cell, _, _ in inferred]
        axes.set_yticks(range(len(inferred)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
    return drawing


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
    title, labels = f"State confusion: {shorten(who)}", ("state named", "state drawn")
    with draw(slug, title, labels, synthetic=setting.synthetic, size=(3.6, 3.6)) as drawing:
        axes = drawing.axes
        for row, place in zip(*np.nonzero(counts), strict=True):
            style: Any = {
                "facecolor": SERIES[0] if row == place else SERIES[1],
                "alpha": 0.25 + 0.75 * shares[row, place],
            }
            axes.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, **style))
        axes.set_xlim(-0.5, states + 0.5)
        axes.set_ylim(states - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.axvline(states - 0.5, color=MUTED, linewidth=0.8)
        ticks = spread(range(states), most=9)
        axes.set_xticks([*ticks, states], [*map(str, ticks), "none"])
        axes.set_yticks(ticks)
        right = int(counts.diagonal().sum())
        drawing.told.append(f"{who}: {right} of {len(drawn)} interceptions named right")
        np.fill_diagonal(counts, 0)
        if counts.any():
            row, place = np.unravel_index(counts.argmax(), counts.shape)
            taken = "none of the states" if place == states else f"state {place}"
            drawing.told.append(f"most often wrong: state {row} taken for {taken}, {counts[row, place]} times")
    return drawing


# -- frequencies -----------------------------------------------------------------------------------

_SIDE = 8
_ALL = range(_SIDE * _SIDE)


def frequency_figures(setting: Setting, number: int) -> list[Drawing]:
    """One map for each defence that names the frequencies it keeps (``kept_channels`` of its details)."""
    drawings = []
    for place, (defense, cells) in enumerate(setting.defenses.items()):
        info = next((cell.run.result.defense for cell in cells if cell.run.result.defense is not None), None)
        kept = _numbers(info, "kept_channels")
        if kept and all(0 <= channel < len(_ALL) for channel in kept):
            energy = _numbers(info, "channel_energy")
            drawings.append(_map(f"frequencies-{number}-{place}", defense, [int(c) for c in kept], energy, setting))
    return drawings


def _numbers(info: DefenseInfo | None, name: str) -> list[float]:
    values = [] if info is None else info.details.get(name)
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return []
    return [float(value) for value in values]


def _map(slug: str, defense: str, kept: Sequence[int], energy: Sequence[float], setting: Setting) -> Drawing:
    known = len(energy) == len(_ALL) and all(math.isfinite(value) and value >= 0 for value in energy)
    # Energy spans orders of magnitude between the mean and the highest frequency.
    shade = np.log10(np.maximum(energy, 1e-3)) if known else np.zeros(len(_ALL))
    shade = (shade - shade.min()) / max(float(np.ptp(shade)), 1e-9)
    title = f"Frequencies of {defense}" + (": energy" if known else ": kept and pruned")
    labels = ("horizontal frequency", "vertical frequency")
    with draw(slug, title, labels, synthetic=known and setting.synthetic, size=(3.6, 3.5)) as drawing:
        axes = drawing.axes
        for channel in _ALL:
            row, place = divmod(channel, _SIDE)
            sent = channel in kept
            style: Any = {"facecolor": SERIES[0] if known or sent else PAPER, "edgecolor": INK, "linewidth": 0.8}
            alpha = 0.15 + 0.85 * float(shade[channel]) if known else 0.75 if sent else 0.2
            axes.add_patch(Rectangle((place - 0.47, row - 0.47), 0.94, 0.94, **style, alpha=alpha))
            if not sent:
                axes.text(place, row, "×", ha="center", va="center", fontsize=11, color=INK)
        axes.set_xlim(-0.6, _SIDE - 0.4)
        axes.set_ylim(_SIDE - 0.4, -0.6)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xticks(range(_SIDE))
        axes.set_yticks(range(_SIDE))
        dropped = sorted(set(_ALL) - set(kept))
        sent_of = f"{defense} may send {len(kept)} of 64 frequencies of each colour"
        drawing.told += [sent_of, f"never sent (crosses): {dropped}"]
        drawing.closing = (
            " Darker holds more energy." if known else " The run does not hold the energy of the frequencies."
        )
    return drawing


# -- what is relied on -----------------------------------------------------------------------------

_COLOURS = ("Y", "Cb", "Cr")


def frequency(place: int) -> str:
    """A frequency by its number 64 colour + 8u + v.

    >>> frequency(64 + 8 * 2 + 5)
    'Cb (2, 5)'
    """
    colour, channel = divmod(place, len(_ALL))
    return "{} ({}, {})".format(_COLOURS[colour], *divmod(channel, _SIDE))


def reliances(explanation: Explanation) -> Iterator[tuple[str, Reliance]]:
    """Who relies on frequencies: the recogniser, then each attack."""
    if explanation.recogniser is not None:
        yield "recogniser", explanation.recogniser
    yield from explanation.attacks.items()


def reliance_figures(setting: Setting, number: int) -> list[Drawing]:
    """For each run that ``bench explain`` has looked at, what each relies on: a row of three 8x8 grids for each.

    Shades are shares of the frequency of most; one figure for what occlusion tells, and one for gradients.
    """
    made: list[Drawing] = []
    for label, cell in setting.runs:
        explanation = cell.run.explanation
        if explanation is None:
            continue
        for what in ("occlusion", "gradient"):
            known = [(who, values) for who, r in reliances(explanation) if (values := getattr(r, what)) is not None]
            shares = [(who, _shares(values)) for who, values in known if len(values) == len(_COLOURS) * len(_ALL)]
            if shares:
                slug = f"reliance-{what}-{number}-{len(made)}"
                made.append(_grids(slug, label, what, shares, explanation.faces, setting.synthetic))
    return made


def _shares(values: Sequence[float | None]) -> list[float | None]:
    most = max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
    return [None if value is None else max(0.0, value) / most if most > 0 else 0.0 for value in values]


def _grids(
    slug: str,
    label: str,
    what: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    faces: int,
    synthetic: bool,
) -> Drawing:
    pitch, height = _SIDE + 1, _SIDE + 2
    size = (4.7, 0.35 + 1.85 * len(rows))
    title = f"Frequencies relied on, by {'occlusion' if what == 'occlusion' else 'gradient energy'}: {shorten(label)}"
    with draw(slug, title, ("", ""), synthetic=synthetic, size=size) as drawing:
        axes = drawing.axes
        for row, (who, shares) in enumerate(rows):
            top = height * row
            axes.text(-0.6, top - 1.1, shorten(who), fontsize=8, va="bottom")
            for place, share in enumerate(shares):
                colour, channel = divmod(place, len(_ALL))
                down, across = divmod(channel, _SIDE)
                x, y = pitch * colour + across, top + down
                # Shares span orders of magnitude; a cell without a fill was sent of no face.
                shade = 0.0 if share is None else 0.06 + 0.94 * math.sqrt(share)
                style: Any = {"facecolor": SERIES[0], "edgecolor": MUTED, "linewidth": 0.3}
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style | {"facecolor": PAPER}))
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style, alpha=shade))
                if share is None:
                    axes.text(x, y, "×", ha="center", va="center", fontsize=5, color=MUTED)
            known = [(share, place) for place, share in enumerate(shares) if share is not None]
            most = ", ".join(frequency(place) for _, place in sorted(known, reverse=True)[:3])
            drawing.told.append(f"{who}: most on {most}")
        for colour, name in enumerate(_COLOURS):
            axes.text(pitch * colour + 3.5, -2.5, name, ha="center", va="bottom", fontsize=8)
        axes.set_xlim(-0.8, pitch * len(_COLOURS) - 1.2)
        axes.set_ylim(height * len(rows) - 2.2, -3.6)
        axes.set_aspect("equal")
        axes.axis("off")
        drawing.closing = (
            f" Of {faces} faces. Each grid has vertical frequencies downwards and horizontal ones to the right; the "
            "darkest is relied on most, crosses were never sent."
        )
    return drawing
