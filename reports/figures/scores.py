"""What pairs of faces score: ROC curves, and the distributions of genuine and impostor pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from reports.cells import Setting
from reports.figures.svg import INK, LINES, MUTED, SERIES, Drawing, draw, entry, spread

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
            axes.plot(
                far,
                tar,
                color=SERIES[place % len(SERIES)],
                linestyle=LINES[place % len(LINES)],
                label=entry(label),
                drawstyle="steps-post",
            )
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
    for cell in setting.measured:
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
    for cell in setting.measured:
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
