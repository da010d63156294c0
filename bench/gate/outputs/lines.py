"""One line on a figure or a run, for outputs that have no table."""

from __future__ import annotations

from bench.gate.verdict import CellVerdict, FigureVerdict


def figure_line(figure: FigureVerdict) -> str:
    """Everything that is known of one figure.

    Example:
        >>> figure_line(FigureVerdict(figure="ssim", role="privacy", higher_is_better_for="utility", baseline=0.7,
        ...     now=0.8, change=0.1, ci95=(0.08, 0.12), tolerance=0.02, margin=0.05, outcome="regress"))
        'ssim regress: 0.7 -> 0.8, change +0.1 [+0.08, +0.12], tolerated 0.02, a pass rules out 0.05'
    """
    head = f"{figure.figure} {figure.outcome}: {number(figure.baseline)} -> {number(figure.now)}"
    parts = [head]
    if figure.change is not None:
        interval = f" [{figure.ci95[0]:+.3g}, {figure.ci95[1]:+.3g}]" if figure.ci95 else ""
        parts.append(f"change {figure.change:+.3g}{interval}")
    parts += [f"tolerated {figure.tolerance:.3g}", f"a pass rules out {figure.margin:.3g}"]
    if figure.detectable is not None:
        parts.append(f"detectable {figure.detectable:.3g}")
    if figure.note:
        parts.append(figure.note)
    return ", ".join(parts)


def cell_lines(cell: CellVerdict) -> list[str]:
    """What is wrong with a run: its bad figures and its notes; of a run that passes, nothing."""
    if cell.outcome == "pass":
        return []
    return [figure_line(figure) for figure in cell.figures if figure.outcome != "pass"] + cell.notes


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"
