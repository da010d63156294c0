"""Finding people who would stand on both sides of a split, under one name or two."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bench.data.faceset import FaceSet, Skipped


def drop_victims(faces: FaceSet, victims: FaceSet) -> tuple[FaceSet, tuple[Skipped, ...]]:
    """Leave out of ``faces`` every identity that is a victim, by name or by an identical image.

    Datasets name people in ways of their own, so equal names prove an overlap and different ones prove nothing;
    hence the second test. A photo that was cropped or encoded anew escapes both.

    Args:
        faces: what is to be learned from.
        victims: who is to be attacked; images of the same size.

    Returns:
        The faces that remain, and one entry per identity left out.
    """
    named = victims.used_names
    hits = _found_in(faces.images, victims.images)
    shared = set(faces.labels[hits].tolist())
    reasons = {}
    for identity in torch.unique(faces.labels).tolist():
        if faces.names[identity] in named:
            reasons[identity] = "a victim has this name"
        elif identity in shared:
            reasons[identity] = "shares an identical image with a victim"
    return _without(faces, reasons)


def drop_twins(faces: FaceSet) -> tuple[FaceSet, tuple[Skipped, ...]]:
    """Leave out identities that share an identical image with another one: most likely one person under two labels.

    Large collections gathered from the web have such people, and a split that took the labels at their word would
    put one of them on either side. Of those that are linked, the one with the most images stays. Blank images
    link nobody.

    Args:
        faces: what is to be shared out.

    Returns:
        The faces that remain, and one entry per identity left out.
    """
    groups = _identical(faces.images)
    labels = faces.labels.numpy()
    ends = [(labels[group[0]], labels[other]) for group in groups for other in group[1:]]
    ends = [(a, b) for a, b in ends if a != b]
    if not ends:
        return faces, ()
    links = np.asarray(ends, dtype=np.int64)
    size = len(faces.names)
    graph = coo_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    counts = np.bincount(labels, minlength=size)
    reasons = {}
    for group in np.unique(component[links[:, 0]]):
        linked = np.flatnonzero(component == group)
        stays = int(linked[np.argmax(counts[linked])])
        for identity in linked.tolist():
            if identity != stays:
                reasons[identity] = f"shares an identical image with {faces.names[stays]} or with another twin of it"
    return _without(faces, reasons)


def _without(faces: FaceSet, reasons: dict[int, str]) -> tuple[FaceSet, tuple[Skipped, ...]]:
    if not reasons:
        return faces, ()
    keep = ~torch.isin(faces.labels, torch.tensor(sorted(reasons), dtype=torch.int64))
    remaining = FaceSet(faces.images[keep], faces.labels[keep], faces.names, faces.skipped)
    return remaining, tuple(Skipped(faces.names[i], reason) for i, reason in sorted(reasons.items()))


def _rows(images: Tensor) -> NDArray[np.uint8]:
    rows: NDArray[np.uint8] = images.cpu().contiguous().flatten(1).numpy()
    return rows


def _probe(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A few pixels of every image: they tell nearly all apart, and cost a hundredth of reading all."""
    return rows[:, np.linspace(0, rows.shape[1] - 1, 64).astype(np.int64)]


def _identical(images: Tensor) -> list[list[int]]:
    """Groups of two and more images that are equal pixel for pixel and not blank."""
    rows = _rows(images)
    alike: dict[bytes, list[int]] = {}
    for i, probe in enumerate(_probe(rows)):
        alike.setdefault(probe.tobytes(), []).append(i)
    equal: dict[bytes, list[int]] = {}
    for group in alike.values():
        if len(group) > 1:
            for i in group:
                if rows[i].std() >= 2:
                    equal.setdefault(hashlib.blake2b(rows[i].tobytes(), digest_size=16).digest(), []).append(i)
    return [group for group in equal.values() if len(group) > 1]


def _found_in(images: Tensor, others: Tensor) -> Tensor:
    """bool (N,), whether each image is among the others, pixel for pixel."""
    pixels, wanted = _rows(images), _rows(others)
    candidates: dict[bytes, list[int]] = {}
    for i, key in enumerate(_probe(wanted)):
        candidates.setdefault(key.tobytes(), []).append(i)
    hits = [
        any(np.array_equal(pixels[i], wanted[k]) for k in candidates.get(key.tobytes(), ()))
        for i, key in enumerate(_probe(pixels))
    ]
    return torch.tensor(hits, dtype=torch.bool)
