"""Verification pairs: LFW-style lists read from a file, and pairs drawn by seed where a dataset has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.data.decode import read_text, shown, whole_number
from bench.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.data.faces import PairProtocol


@dataclass(frozen=True, slots=True)
class PairRows:
    """Verification pairs of images on disk: ``first[i]`` against ``second[i]``, rows of a source, int64 (P,).

    ``same`` says where both are of one person, bool (P,); ``fold`` int64 (P,) counts 0..F-1.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    same: NDArray[np.bool_]
    fold: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NamedPair:
    """Two images by person and number, as an LFW list has them.

    Each is (name, number), counted from 1; ``fold`` counts from 0, the ``line`` of the file from 1.
    """

    first: tuple[str, int]
    second: tuple[str, int]
    fold: int
    line: int

    @property
    def same(self) -> bool:
        """Whether the two are of one person."""
        return self.first[0] == self.second[0]


@dataclass(frozen=True, slots=True)
class PairList:
    """An LFW-style list in the order of the file, per fold the genuine ``pairs``, then the impostor pairs.

    ``folds`` is how many the file defines (1 for the View 1 lists).
    """

    pairs: tuple[NamedPair, ...]
    folds: int

    @property
    def names(self) -> tuple[str, ...]:
        """Every person named, in order of first appearance."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name, _ in (pair.first, pair.second)))

    @property
    def same(self) -> NDArray[np.bool_]:
        """bool (P,)."""
        return np.asarray([pair.same for pair in self.pairs], dtype=np.bool_)

    @property
    def fold(self) -> NDArray[np.int64]:
        """int64 (P,): the list's own folds; a list without any (View 1) is cut into ten, each with its share of both
        kinds: somebody has to choose the threshold on other pairs than those it is judged on.
        """
        if self.folds > 1:
            return np.asarray([pair.fold for pair in self.pairs], dtype=np.int64)
        return np.tile(even_folds(len(self.pairs) // 2), 2)


def even_folds(pairs: int) -> NDArray[np.int64]:
    """Ten folds of consecutive pairs, equal in size up to one; one fold per pair below ten pairs."""
    return np.arange(pairs, dtype=np.int64) * min(10, pairs) // pairs


def read_pairs(path: Path) -> PairList:
    """Read an LFW-style list.

    The first line is ``folds <tab> n`` (View 2: ``10 300``) or ``n`` alone (View 1). Each fold has n lines ``name,
    number, number`` of one person and then n lines ``name, number, name, number`` of two. Columns are
    separated by tabs, or by blanks where tabs do not give as many. A byte-order mark is passed over, and UTF-16 read.

    Raises:
        MissingError: no such file.
        DataError: a line that is no such thing, with its number.
    """
    lines = read_text(path).split("\n")

    def wrong(number: int, what: str) -> DataError:
        return DataError(f"{shown(path)} line {number}: {what}, got '{shown(lines[number - 1].strip()[:60])}'")

    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{shown(path)} is empty")
    line, first = rows[0]
    header = [whole_number(field) or 0 for field in first.split()]
    if len(header) not in (1, 2) or not all(header):
        raise wrong(line, "expected 'folds<tab>pairs of each kind per fold' or the number of pairs of each kind")
    folds, each = (1, *header) if len(header) == 1 else header
    if len(rows) - 1 != 2 * folds * each:
        raise wrong(
            line, f"the header promises {folds} x (2 x {each}) = {2 * folds * each} pairs, {len(rows) - 1} follow"
        )
    pairs = []
    for position, (line, text) in enumerate(rows[1:]):
        fold, within = divmod(position, 2 * each)
        columns, kind = (3, "a genuine") if within < each else (4, "an impostor")
        fields = _columns(text, columns)
        if len(fields) != columns:
            raise wrong(line, f"expected {columns} columns ({kind} pair), found {len(fields)}")
        name, number, other = fields[0], whole_number(fields[1]), whole_number(fields[-1])
        second = fields[2] if columns == 4 else name
        if not number or not other:
            raise wrong(line, "image numbers are whole numbers from 1")
        pair = NamedPair((name, number), (second, other), fold, line)
        if pair.first == pair.second:
            raise wrong(line, "an image is paired with itself")
        if pair.same != (columns == 3):
            raise wrong(line, "an impostor pair names the same person twice")
        pairs.append(pair)
    return PairList(tuple(pairs), folds)


def _columns(line: str, wanted: int) -> list[str]:
    """The fields between tabs, which names with blanks need; those between blanks where only these are as many."""
    tabs, blanks = [field.strip() for field in line.split("\t")], line.split()
    return blanks if len(tabs) != wanted and (len(blanks) == wanted or len(tabs) == 1) else tabs


def draw_pairs(labels: Tensor, generator: torch.Generator, *, folds: int = 10, per_fold: int = 600) -> PairProtocol:
    """Pairs by seed, with identity-disjoint folds.

    Identities are dealt to the folds, those with several images first, so that both identities of any pair are in one
    fold. Each fold has as many impostor as genuine pairs, none twice. Genuine pairs are spread over the
    identities: everyone's first pair comes before anyone's second.

    ``labels`` int64 (N,) are the identities of the images. There are ``folds`` folds where the identities allow (each
    needs two, one of them with two images), of at most ``per_fold`` pairs; they come by fold, genuine before impostor.

    Raises:
        DataError: not even two folds can be filled.
    """
    import torch

    from bench.data.faces import PairProtocol

    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    values = labels.numpy()
    ends_of = np.unique(values, return_counts=True)[1].cumsum()
    members = np.split(values.argsort(kind="stable"), ends_of[:-1])
    order = draws.permutation(len(members))
    several = [int(i) for i in order if len(members[i]) > 1]
    single = [int(i) for i in order if len(members[i]) == 1]
    folds = min(folds, len(several), len(members) // 2)
    if folds < 2:
        raise DataError(
            f"{len(members)} identities, {len(several)} of them with two images or more, are too few to draw "
            "verification pairs from: at least 4 are needed, 2 of them with two images or more"
        )
    ends, same, fold = [], [], []
    dealt = several + single
    for number in range(folds):
        people = [members[i] for i in dealt[number::folds]]
        genuine = _genuine(people, per_fold // 2, draws)
        impostor = _impostor(people, len(genuine), draws)
        genuine = genuine[: len(impostor)]
        ends += [genuine, impostor]
        same.append(np.repeat([True, False], len(impostor)))
        fold.append(np.full(2 * len(impostor), number))
    first, second = np.concatenate(ends).T
    return PairProtocol.of(PairRows(first, second, np.concatenate(same), np.concatenate(fold)))


def _genuine(people: list[NDArray[np.int64]], quota: int, draws: np.random.Generator) -> NDArray[np.int64]:
    pairs, rounds = [], []
    for images in people:
        total = len(images) * (len(images) - 1) // 2
        chosen = draws.choice(total, min(total, quota), replace=False)
        # Pair number k of a triangle: row b holds b pairs (0, b) .. (b-1, b), after b (b-1) / 2 others.
        b = ((1 + np.sqrt(1 + 8 * chosen.astype(np.float64))) // 2).astype(np.int64)
        pairs.append(np.stack([images[chosen - b * (b - 1) // 2], images[b]], axis=1).reshape(-1, 2))
        rounds.append(np.arange(len(chosen)))
    everyone, turn = np.concatenate(pairs), np.concatenate(rounds)
    # By turn, and at random within a turn.
    return everyone[np.lexsort((draws.random(len(turn)), turn))][:quota]


def _impostor(people: list[NDArray[np.int64]], quota: int, draws: np.random.Generator) -> NDArray[np.int64]:
    owner = np.concatenate([np.full(len(images), i) for i, images in enumerate(people)])
    images = np.concatenate(people)
    counts = np.asarray([len(p) for p in people])
    available = (len(images) ** 2 - int((counts**2).sum())) // 2
    if available <= 8 * quota:  # few: list them all and choose
        a, b = np.triu_indices(len(images), k=1)
        cross = np.flatnonzero(owner[a] != owner[b])
        chosen = cross[draws.choice(len(cross), min(quota, len(cross)), replace=False)]
        return np.stack([images[a[chosen]], images[b[chosen]]], axis=1)
    # Many: two people at random, an image of each, until there are enough different pairs.
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    pairs = np.empty(0, dtype=np.int64)
    while len(pairs) < quota:
        left = draws.integers(len(people), size=2 * quota)
        right = (left + draws.integers(1, len(people), size=2 * quota)) % len(people)
        a, b = (starts[person] + draws.integers(counts[person]) for person in (left, right))
        pairs = np.concatenate([pairs, np.minimum(a, b) * len(images) + np.maximum(a, b)])
        pairs = pairs[np.sort(np.unique(pairs, return_index=True)[1])]
    return np.stack([images[half] for half in np.divmod(pairs[:quota], len(images))], axis=1)
