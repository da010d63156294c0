"""Batches of a source, read ahead by threads or processes, resumable between any two of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bench.data.decode import AHEAD, by_threads
from bench.data.encoded import Batch, RecordSource
from bench.data.stream.sampler import EpochOrder
from bench.errors import BenchError, DataError, UsageError


class StreamLoader:
    """Reads a source in the order of an :class:`EpochOrder`.

    Iterating gives the rest of the epoch under way; the next iteration is of the next epoch. What is
    stored counts the batches that were handed out, not those that were read ahead, and does not depend on how
    many workers or processes there are: a training can go on with other numbers of both.

    ``workers`` read and decode ahead; with 0 of them a batch is read when it is asked for. Threads share the source and
    hand batches over for nothing; processes do not share an interpreter, which pays where many cores wait for one.
    ``pin_memory`` puts batches where a GPU can fetch them by itself.

    ``epoch`` is the one under way, from 0, and ``position`` the batches of it that were handed out; ``skipped`` says
    which images were left out so far, and why, where the source skips those that cannot be decoded.

    Raises:
        UsageError: an order over another number of images, or options that cannot be.
    """

    def __init__(
        self,
        source: RecordSource,
        order: EpochOrder,
        *,
        workers: int = 0,
        kind: Literal["threads", "processes"] = "threads",
        pin_memory: bool = False,
    ) -> None:
        if order.images != len(source):
            raise UsageError(f"the order is of {order.images} images, {source.path} has {len(source)}")
        if workers < 0 or kind not in ("threads", "processes"):
            raise UsageError(f"workers must be 0 or more threads or processes, got {workers} {kind}")
        self.source, self.order, self.workers, self.kind, self.pin_memory = source, order, workers, kind, pin_memory
        self.epoch = self.position = 0
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch that were not handed out yet.

        Raises:
            DataError: what cannot be read.
            BenchError: a reading process was lost.
        """
        known = len(self.skipped)
        for batch in self._ahead(self.order.batches(self.epoch, self.position)):
            if isinstance(batch, BenchError):
                raise batch
            self.skipped.update((entry.where, entry.reason) for entry in batch.skipped)
            if not len(batch.labels):
                raise DataError(f"{batch.skipped[0].where}: {batch.skipped[0].reason}; nor can the rest of its batch")
            self.position += 1
            if self.position == self.order.steps:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch
        if len(self.skipped) > known:
            where, reason = list(self.skipped.items())[known]
            warnings.warn(
                f"{len(self.skipped) - known} images were skipped, the first of them {where}: {reason}", stacklevel=2
            )

    def _ahead(self, rows: Iterator[NDArray[np.int64]]) -> Iterator[Batch | BenchError]:
        reader = _Reader(self.source)
        ahead = _by_processes if self.kind == "processes" else by_threads
        for batch in ahead(reader, rows, self.workers) if self.workers else map(reader, rows):
            if self.pin_memory and isinstance(batch, Batch):
                batch = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the reading stands, and of what: JSON."""
        return {"epoch": self.epoch, "position": self.position, "order": _shared(self.order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Raises:
            DataError: that was a reading of other data or in another order.
        """
        ours, theirs = _shared(self.order), state.get("order")
        if theirs != ours:
            raise DataError(f"the reading to resume is of {theirs}, not of {ours}: start again, or restore the options")
        epoch, position = state["epoch"], state["position"]
        if not (epoch >= 0 and 0 <= position < self.order.steps):
            raise DataError(f"no batch {position} of epoch {epoch} to resume at: an epoch has {self.order.steps}")
        self.epoch, self.position = epoch, position


def _shared(order: EpochOrder) -> dict[str, int]:
    """What an order is of, whoever takes which part of it."""
    return {name: value for name, value in asdict(order).items() if name not in ("rank", "size")}


class _Reader(Dataset[Any]):
    """Reads batches of rows; problems are values, so that they cross threads and processes as they are."""

    def __init__(self, source: RecordSource) -> None:
        self.source = source

    def __call__(self, rows: NDArray[np.int64]) -> Batch | BenchError:
        try:
            return self.source.read(rows)
        except BenchError as error:
            return error

    __getitem__ = __call__


def _by_processes(reader: _Reader, rows: Iterator[NDArray[np.int64]], workers: int) -> Iterator[Batch | BenchError]:
    loader: DataLoader[Any] = DataLoader(
        reader, sampler=rows, batch_size=None, num_workers=workers, prefetch_factor=AHEAD, collate_fn=_as_it_is
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            raise BenchError(f"a process that reads {reader.source.path} was lost: {error}") from error
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch
