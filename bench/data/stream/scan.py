"""One pass over a set on disk before it is shared out: which images can be used, and which are copies of others."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from bench.data.base import Contents, Skipped
from bench.data.decode import AT_ONCE, by_threads, own_limits, workers
from bench.data.encoded import IdentityView, OnError
from bench.errors import DataError
from bench.files import write_text
from bench.progress import Report, no_report


@dataclass(frozen=True, slots=True)
class Scan:
    """What a pass over the N images of a view found: their contents, and why some, by row, cannot be decoded.

    Of the latter the contents say nothing.
    """

    contents: Contents
    reasons: dict[int, str]

    def applied_to(self, view: IdentityView) -> IdentityView:
        """The view without what cannot be decoded and whoever is left without an image; relabelled 0..K-1."""
        kept = np.ones(len(view), dtype=bool)
        kept[list(self.reasons)] = False
        usable = replace(view, contents=self.contents).where_true(kept)
        skipped = tuple(Skipped(view.where(row), reason) for row, reason in sorted(self.reasons.items()))
        present = np.unique(usable.labels)
        return replace(usable.of_identities(present), contents=usable.contents, skipped=view.skipped + skipped)

    def save(self, folder: Path) -> None:
        """Write it."""
        save_file({"digests": self.contents.digests, "blank": self.contents.blank}, folder / "scan.safetensors")
        write_text(folder / "scan.json", json.dumps(self.reasons))

    @classmethod
    def read(cls, folder: Path) -> Scan:
        """The inverse of :meth:`save`."""
        arrays = load_file(folder / "scan.safetensors")
        reasons = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
        contents = Contents(arrays["digests"], arrays["blank"])
        return cls(contents, {int(row): str(reason) for row, reason in reasons.items()})

    @classmethod
    def unknown(cls, view: IdentityView) -> Scan:
        """A finding that all images can be used and none is a copy: to plan with, not to compute with."""
        contents = Contents(np.arange(len(view), dtype=np.uint64), np.zeros(len(view), dtype=bool))
        return cls(contents, {})


def scan(view: IdentityView, on_error: OnError, report: Report = no_report) -> Scan:
    """Decode every image once, on as many threads as there are cores; memory holds a few hundred at a time.

    Raises:
        DataError: a damaged file; or an image that cannot be decoded, and those are refused.
    """
    source = view.source.reading("skip", exact=True)
    digests, blank = np.zeros(len(view), dtype=np.uint64), np.zeros(len(view), dtype=bool)
    reasons: dict[int, str] = {}

    def look(start: int) -> tuple[NDArray[np.int64], Contents, dict[int, str]]:
        wanted = view.rows[start : start + AT_ONCE]
        batch = source.read(wanted)
        usable = np.searchsorted(view.rows, batch.rows.numpy())
        lost = np.setdiff1d(np.arange(start, start + len(wanted)), usable)
        return (
            usable,
            Contents.of(batch.images),
            {row: entry.reason for row, entry in zip(lost.tolist(), batch.skipped, strict=True)},
        )

    done = 0
    with own_limits():
        for usable, contents, lost in by_threads(look, range(0, len(view), AT_ONCE), workers()):
            digests[usable], blank[usable] = contents.digests, contents.blank
            reasons |= lost
            if lost and on_error == "refuse":
                row, reason = next(iter(lost.items()))
                raise DataError(
                    f"{view.where(row)}: {reason} (--set stream_on_error=skip leaves out and counts what cannot be "
                    "decoded)"
                )
            done += len(usable) + len(lost)
            report(done, len(view))
    return Scan(Contents(digests, blank), reasons)
