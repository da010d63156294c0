"""The order in which an epoch shows a set that is too large to be shuffled: near each other on disk, far apart in kind.

The images are cut into blocks of neighbours. The blocks are shuffled, and dealt to windows of some hundred blocks; the
images of a window are shuffled as a whole. A batch thus mixes what lies in hundreds of places, while a disk is asked
for a few hundred stretches at a time, each read once. A set no larger than one window is shuffled fully. Memory: one
number per block, and one window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bench.errors import UsageError
from bench.randomness import Streams


@dataclass(frozen=True)
class EpochOrder:
    """Batches of every epoch, as a function of seed, epoch and batch number alone.

    Every image comes ``views`` times an epoch. The batches are even: their sizes differ by at most one. Of several
    processes each takes its own images of every batch, so that the batches stay the same however many there are.

    ``batch_size`` counts images over all processes; ``block`` neighbours on disk stay together until their window, of
    about ``blocks`` blocks, is shuffled; ``rank`` is this process, of ``size``.

    >>> order = EpochOrder(images=10, batch_size=4, seed=0)
    >>> [len(batch) for batch in order.batches(0)]
    [5, 5]
    >>> sorted(np.concatenate(list(order.batches(0))).tolist()) == list(range(10))
    True

    Raises:
        UsageError: numbers that cannot be, or more processes than a batch has room for.
    """

    images: int
    batch_size: int
    seed: int
    views: int = 1
    block: int = 64
    blocks: int = 256
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "views", "block", "blocks", "size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank must be in 0..{self.size - 1}, got {self.rank}")
        if self.total // self.steps < self.size:
            raise UsageError(f"{self.size} processes cannot share batches of {self.total // self.steps}: start fewer")

    @property
    def total(self) -> int:
        """Images shown in an epoch, repeats counted."""
        return self.images * self.views

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return max(1, round(self.total / self.batch_size))

    def batch_total(self, step: int) -> int:
        """Images of the batch ``step``, over all processes."""
        small, larger = divmod(self.total, self.steps)
        return small + (step < larger)

    def batches(self, epoch: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """This process's rows of the batches ``start``, ``start`` + 1, ... of an epoch."""
        small, larger = divmod(self.total, self.steps)
        ends = [step * small + min(step, larger) for step in range(start, self.steps + 1)]
        windows, place = self._rows_from(epoch, ends[0]), ends[0]
        waiting = np.empty(0, dtype=np.int64)
        for end in ends[1:]:
            while len(waiting) < end - place:
                waiting = np.concatenate((waiting, next(windows)))
            yield waiting[: end - place][self.rank :: self.size].copy()
            waiting, place = waiting[end - place :], end

    def _rows_from(self, epoch: int, place: int) -> Iterator[NDArray[np.int64]]:
        """The epoch's rows from ``place`` on, window by window."""
        shuffled, bounds, starts = self._windows(epoch)
        first = int(np.searchsorted(starts, place, side="right")) - 1
        for window in range(first, len(starts) - 1):
            begins = shuffled[bounds[window] : bounds[window + 1], None] * self.block
            rows = (begins + np.arange(self.block)).reshape(-1)
            rows = rows[rows < self.total]
            draws = Streams(self.seed).generator(f"stream/order/{epoch}/{window}")
            rows = rows[torch.randperm(len(rows), generator=draws).numpy()]
            yield (rows[place - int(starts[window]) :] if window == first else rows) % self.images

    def _windows(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The blocks in their order, the bounds of each window among them, and the place where each window starts."""
        count = -(-self.total // self.block)
        shuffled = torch.randperm(count, generator=Streams(self.seed).generator(f"stream/order/{epoch}")).numpy()
        # Even windows: a small last one would show neighbours, who are of one person, side by side.
        windows = max(1, round(count / self.blocks))
        bounds = np.arange(windows + 1) * count // windows
        starts = bounds * self.block
        short = count * self.block - self.total
        starts[bounds > int(np.flatnonzero(shuffled == count - 1)[0])] -= short
        return shuffled, bounds, starts
