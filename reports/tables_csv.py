"""Tables as CSV: values as they are stored, names that no spreadsheet takes for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from bench.measures import KINDS
from bench.results import Measure, measures
from reports.cells import Cell, Setting

#: A cell that starts with one of these is a formula to spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_HEADINGS = (
    "run_id", "protocol", "dataset", "image_size", "defense", "attack", "knowledge", "seed", "status",
    "figure", "value", "low", "high", "n", "reason",
)  # fmt: skip


def text(value: Any) -> str:
    """``value`` as a cell of text: one that looks like a formula gets an apostrophe before it.

    Example:
        >>> text("=1+1"), text("unet")
        ("'=1+1", 'unet')
    """
    shown = "" if value is None else str(value).replace("\x00", "")
    return f"'{shown}" if shown.lstrip(" ").startswith(_FORMULA) else shown


def report_csv(settings: Sequence[Setting]) -> str:
    """One line for each measure of each attack, floors and ceilings included; rates are shares of 1.

    A failed run has one line, with its reason.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADINGS)
    for setting in settings:
        for cell in setting.cells:
            manifest, result = cell.run.manifest, cell.run.result
            config = manifest.config
            head = [manifest.run_id, setting.protocol, config.get("dataset"), config.get("image_size")]
            head += [cell.defense, cell.attack, cell.knowledge, cell.seed, result.status]
            names = [text(one) for one in head]
            for figure, measure in _figures(cell):
                low, high = measure.ci95 or ("", "")
                value = "" if measure.value is None else measure.value
                writer.writerow([*names, text(figure), value, low, high, measure.n, text(measure.reason)])
            if cell.run.failed:
                writer.writerow([*names, "", "", "", "", "", text(result.error)])
    return buffer.getvalue()


def _figures(cell: Cell) -> Iterable[tuple[str, Measure]]:
    """(place, measure) of everything measured, with bytes and rates as measures without an interval."""
    result = cell.run.result
    parts = {"utility": result.utility}
    parts |= {name: value for name, value in cell.result or () if name != "attack"}
    yield from measures(parts)
    if result.defense is not None:
        kind = KINDS["bytes"]
        yield "bytes_per_face", Measure(value=result.defense.bytes_per_face, direction=kind.direction)
    for operation, speed in (result.throughput or {}).items():
        rate = speed.images_per_second
        reason = f"quartiles {rate.q1:g} to {rate.q3:g}"
        yield (
            f"throughput.{operation}.images_per_second",
            Measure(value=rate.median, direction=KINDS["protect"].direction, reason=reason),
        )
