"""Face packs of any number of images, written as fast as the disk takes them: one small JPEG under changing headers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bench.data.recordio import MAGIC


def small_jpeg(size: int, seed: int = 0) -> bytes:
    """Smooth noise of ``size`` x ``size`` pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", optimize=True)
    return buffer.getvalue()


def write_big_records(path: Path, images: int, per_identity: int, jpeg: bytes) -> None:
    """Write ``path`` and its index as InsightFace lays them out: ``images`` images, ``per_identity`` of each person."""
    people = images // per_identity
    assert people * per_identity == images
    body = np.frombuffer(jpeg + bytes(-len(jpeg) % 4), dtype=np.uint8)
    record = np.dtype(
        [("part", "<u4", 2), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8", 2), ("body", "u1", len(body))]
    )
    pair = np.dtype([("part", "<u4", 2), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8", 2), ("labels", "<f4", 2)])
    with path.open("wb") as file:
        _pairs(pair, np.array([0]), np.array([[images + 1, images + 1 + people]])).tofile(file)
        for start in range(0, images, 50_000):
            part = np.zeros(min(50_000, images - start), dtype=record)
            number = np.arange(start, start + len(part))
            part["part"] = MAGIC, 24 + len(jpeg)
            part["label"], part["id"][:, 0], part["body"] = number // per_identity, number + 1, body
            part.tofile(file)
        first = 1 + np.arange(people) * per_identity
        _pairs(pair, images + 1 + np.arange(people), np.stack((first, first + per_identity), axis=1)).tofile(file)
    sizes = np.concatenate(([pair.itemsize], np.full(images, record.itemsize), np.full(people, pair.itemsize)))
    index = np.stack((np.arange(len(sizes)), np.cumsum(sizes) - sizes), axis=1)
    np.savetxt(path.with_suffix(".idx"), index, fmt="%d", delimiter="\t")


def _pairs(kind, keys, labels):
    records = np.zeros(len(keys), dtype=kind)
    records["part"], records["flag"] = (MAGIC, 32), 2
    records["id"][:, 0], records["labels"] = keys, labels
    return records
