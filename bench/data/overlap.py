"""Finding people who would stand on both sides of a split, under one name or two."""

from __future__ import annotations

import hashlib
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bench.data.faceset import FaceSet, Skipped
from bench.data.stream.contents import Contents, is_blank
from bench.data.stream.view import IdentityView

#: Faces in memory, whose pixels are compared, or on disk, where the digests of a scan stand for them.
Faces = TypeVar("Faces", bound=FaceSet | IdentityView)


def drop_victims(faces: Faces, victims: FaceSet) -> tuple[Faces, tuple[Skipped, ...]]:
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
    labels = np.asarray(faces.labels)
    shared = set(np.unique(labels[_shown_too(faces, victims.images)]).tolist())
    reasons = {}
    for identity in np.unique(labels).tolist():
        if faces.name(identity) in named:
            reasons[identity] = "a victim has this name"
        elif identity in shared:
            reasons[identity] = "shares an identical image with a victim"
    return _without(faces, reasons)


def drop_twins(faces: Faces) -> tuple[Faces, tuple[Skipped, ...]]:
    """Leave out identities that share an identical image with another one: most likely one person under two labels.

    Large collections gathered from the web have such people, and a split that took the labels at their word would
    put one of them on either side. Of those that are linked, the one with the most images stays. Blank images
    link nobody.

    Args:
        faces: what is to be shared out.

    Returns:
        The faces that remain, and one entry per identity left out.
    """
    labels = np.asarray(faces.labels)
    links = labels[_equal(faces)]
    links = links[links[:, 0] != links[:, 1]]
    if not len(links):
        return faces, ()
    size = faces.identities
    graph = coo_array((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    counts = np.bincount(labels, minlength=size)
    reasons = {}
    for group in np.unique(component[links[:, 0]]):
        linked = np.flatnonzero(component == group)
        stays = int(linked[np.argmax(counts[linked])])
        for identity in linked.tolist():
            if identity != stays:
                reasons[identity] = f"shares an identical image with {faces.name(stays)} or with another twin of it"
    return _without(faces, reasons)


def _without(faces: Faces, reasons: dict[int, str]) -> tuple[Faces, tuple[Skipped, ...]]:
    if not reasons:
        return faces, ()
    kept = ~np.isin(np.asarray(faces.labels), sorted(reasons))
    remaining = cast("Faces", faces.where_true(kept))  # each kind gives its own
    return remaining, tuple(Skipped(faces.name(i), reason) for i, reason in sorted(reasons.items()))


def _contents(faces: IdentityView) -> Contents:
    if faces.contents is None:
        raise ValueError("the faces were not scanned: nothing is known of their copies")
    return faces.contents


def _equal(faces: FaceSet | IdentityView) -> NDArray[np.int64]:
    """int64 (L, 2): every image that is equal to others and not blank, linked to the first of them."""
    if isinstance(faces, FaceSet):
        groups = _identical(faces.images)
        links = [(group[0], other) for group in groups for other in group[1:]]
        return np.asarray(links, dtype=np.int64).reshape(-1, 2)
    contents = _contents(faces)
    rows = np.flatnonzero(~contents.blank)
    order = rows[np.argsort(contents.digests[rows], kind="stable")]
    ordered = contents.digests[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = order[new][np.cumsum(new) - 1]
    return np.stack((first, order), axis=1)[~new]


def _shown_too(faces: FaceSet | IdentityView, others: Tensor) -> NDArray[np.bool_]:
    """bool (N,), whether each image is among the others, pixel for pixel."""
    if isinstance(faces, FaceSet):
        return _found_in(faces.images, others)
    return np.isin(_contents(faces).digests, Contents.of(others).digests)


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
                if not is_blank(rows[i]):
                    equal.setdefault(hashlib.blake2b(rows[i].tobytes(), digest_size=16).digest(), []).append(i)
    return [group for group in equal.values() if len(group) > 1]


def _found_in(images: Tensor, others: Tensor) -> NDArray[np.bool_]:
    pixels, wanted = _rows(images), _rows(others)
    candidates: dict[bytes, list[int]] = {}
    for i, key in enumerate(_probe(wanted)):
        candidates.setdefault(key.tobytes(), []).append(i)
    hits = [
        any(np.array_equal(pixels[i], wanted[k]) for k in candidates.get(key.tobytes(), ()))
        for i, key in enumerate(_probe(pixels))
    ]
    return np.array(hits, dtype=bool)
