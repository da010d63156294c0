"""Draws with matplotlib and makes of it an SVG that can stand inside a page: readable on any background, and inert.

The colours of a figure are style names of the page: text and axes take ``currentColor``, the n-th series
``var(--series-n)``. Identifiers are made unique to the figure: those of all inlined figures share one namespace.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import Container
from matplotlib.figure import Figure

#: Stand-ins that matplotlib is given, in the order of ``--series-n`` of report.css.
SERIES = ("#0000f1", "#0000f2", "#0000f3", "#0000f4", "#0000f5", "#0000f6", "#0000f7", "#0000f8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 2, 2)))
#: Text, axes and what is neither series nor background.
INK = "#0000e1"
MUTED = "#0000e2"
PAPER = "#0000e3"

_STYLES = {
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
    INK: "currentColor",
    MUTED: "var(--muted)",
    PAPER: "var(--paper)",
}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "ppfr-bench",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
}
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_LEGEND_LINE = 0.142
_LONGEST_LABEL = 58
#: Width on a page, so that letters have one size in all figures.
_REM_PER_INCH = 7.2


@dataclass
class Drawing:
    """A figure for a page.

    Attributes:
        title: its heading, which says it if the faces are synthetic.
        axes: to paint into while it is being drawn; labelled lines get a legend below the plot.
        told: what it shows, in words, for those who do not see it: a sentence in parts.
        closing: what the words end with.
        svg: the element, safe to inline.
    """

    title: str
    axes: Axes = field(repr=False, compare=False)
    told: list[str] = field(default_factory=list)
    closing: str = ""
    svg: str = ""

    @property
    def description(self) -> str:
        """All of the words."""
        return f"{'; '.join(self.told)}.{self.closing}"

    def file(self, style: str) -> str:
        """An SVG file that stands alone, in the colours that ``style``, the style sheet of the page, defines first."""
        colours = style.partition("* {")[0]
        paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
        start, end, rest = self.svg.partition(">")
        start = start.replace("<svg", '<svg color="var(--ink)"', 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{start}{end}<style>{colours}</style>{paper}{rest}\n'


@contextmanager
def draw(
    name: str, title: str, labels: tuple[str, str], *, synthetic: bool, size: tuple[float, float] = (4.7, 3.1)
) -> Iterator[Drawing]:
    """A figure that is painted in the block and finished at its end.

    Args:
        name: unique within the page; letters, digits and dashes.
        title: heading.
        labels: of the axes, to the right and upwards.
        synthetic: whether the figure is of synthetic faces; it then says so within the picture, too.
        size: inches of the plot without its legend; as it is about as wide as a phone, its letters need not shrink.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
        drawing = Drawing(f"{title} (synthetic faces)" if synthetic else title, axes)
        yield drawing
        bottom = _legend(figure, axes, size)
        if synthetic:
            figure.text(0.995, 0.985, "synthetic faces", ha="right", va="top", fontsize=7, style="italic")
        figure.tight_layout(pad=0.5, rect=(0, bottom, 1, 0.95 if synthetic else 1))
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    drawing.svg = _inline(buffer.getvalue(), name, drawing, size[0])


def series(place: int, *, line: bool = True, marker: bool = True) -> dict[str, Any]:
    """Colour, line and marker of the series at ``place``: told apart in black and white, too.

    Colours come again after eight series, with another line and marker each time: no two of 64 are alike.
    """
    shape = place + place // len(SERIES)
    return {
        "color": SERIES[place % len(SERIES)],
        "linestyle": LINES[shape % len(LINES)] if line else "none",
        "marker": MARKERS[shape % len(MARKERS)] if marker else "none",
    }


def entry(label: str) -> str:
    """``label`` for a legend: matplotlib leaves out those that start with an underscore."""
    return f" {label}"


def shorten(label: str) -> str:
    """A label that fits under a plot."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"


def spread(points: Sequence[int], most: int = 160) -> list[int]:
    """At most about ``most`` of ``points``, evenly spread, with the first and the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(index * step)] for index in range(most)]


def _legend(figure: Figure, axes: Axes, size: tuple[float, float]) -> float:
    """Put the legend below the plot and make the figure so much higher; the share of the height that it takes."""
    # matplotlib lists plain lines before points with error bars; points are what a figure is about.
    pairs = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda p: not isinstance(p[0], Container))
    if not pairs:
        return 0.0
    height = _LEGEND_LINE * len(pairs) + 0.05
    figure.set_size_inches(size[0], size[1] + height)
    handles, labels = [handle for handle, _ in pairs], [shorten(label.strip()) for _, label in pairs]
    figure.legend(handles, labels, loc="lower left", borderaxespad=0.2, labelspacing=0.25)
    return height / (size[1] + height)


def _inline(document: bytes, name: str, drawing: Drawing, width: float) -> str:
    """The ``<svg>`` element of a file, without what is a file's own, in the page's colours."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        # A style sheet inside an inlined figure would style the whole page.
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            element.set(key, _restyle(value, name))
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF).replace("#", f"#{name}-", 1))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {
        "role": "img",
        "style": f"max-width: {_REM_PER_INCH * width:g}rem",
        "aria-labelledby": f"{name}-title {name}-description",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    for tag, identifier, text in (("desc", "description", drawing.description), ("title", "title", drawing.title)):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", id=f"{name}-{identifier}")
        element.text = text
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(value: str, name: str) -> str:
    for stand_in, style in _STYLES.items():
        value = value.replace(stand_in, style)
    return value.replace("url(#", f"url(#{name}-")
