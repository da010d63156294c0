"""Which frequencies a defence sends, on the 8 x 8 grid of the block DCT, and how much energy each holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bench.results import DefenseInfo
from reports.cells import Setting
from reports.figures.svg import INK, PAPER, SERIES, Drawing, draw

_SIDE = 8


def frequency_figures(setting: Setting, number: int) -> list[Drawing]:
    """One map for each defence that names the frequencies it keeps (``kept_channels`` of its details)."""
    drawings = []
    for place, (defense, cells) in enumerate(setting.defenses.items()):
        info = next((cell.run.result.defense for cell in cells if cell.run.result.defense is not None), None)
        kept = _numbers(info, "kept_channels")
        if kept and all(0 <= one < _SIDE * _SIDE for one in kept):
            energy = _numbers(info, "channel_energy")
            drawings.append(_map(f"frequencies-{number}-{place}", defense, [int(one) for one in kept], energy, setting))
    return drawings


def _numbers(info: DefenseInfo | None, name: str) -> list[float]:
    found = [] if info is None else info.details.get(name)
    if not isinstance(found, list) or not all(isinstance(one, int | float) for one in found):
        return []
    return [float(one) for one in found]


def _map(slug: str, defense: str, kept: Sequence[int], energy: Sequence[float], setting: Setting) -> Drawing:
    known = len(energy) == _SIDE * _SIDE and all(math.isfinite(one) and one >= 0 for one in energy)
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
