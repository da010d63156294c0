"""Reads single records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.data.recordio import RecordFile


def read_record(path: Path, key: int) -> tuple[list[float], bytes]:
    """Labels (the first two at most) and image of a record."""
    records = RecordFile(path)
    buffer, begin, end, (head,) = records.bodies(np.flatnonzero(records.keys == key))
    labels = [head["first"], head["second"]][: head["count"]] if head["count"] else [head["label"]]
    return [float(label) for label in labels], buffer[begin[0] : end[0]].tobytes()
