"""The batches that a training sees, of faces in memory or on disk, shared out among processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bench.data.decode import workers
from bench.data.faceset import FaceSet
from bench.data.stream import EpochOrder, RecordSource, StreamLoader
from bench.errors import DataError
from bench.randomness import Streams
from bench.recognition.processes import Processes


class Batches(Protocol):
    """Every image so many times an epoch, in an order of the epoch's own.

    Attributes:
        resumable: whether a training can go on behind any batch, and not only behind a whole epoch.
    """

    resumable: ClassVar[bool]

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        """Of each batch its number, this process's part (indices int64 (n,) and uint8 (n, 3, H, W)), the whole's size.

        The epoch that :meth:`resume` names starts where that says.
        """

    def reached(self) -> dict[str, Any]:
        """What to :meth:`resume` from: JSON, empty unless resumable."""

    def resume(self, reached: Mapping[str, Any]) -> None:
        """Go on behind the batch after which :meth:`reached` was called.

        Raises:
            DataError: that was another order.
        """


def epoch_order(images: int, views: int, steps: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Batches of one epoch: every image ``views`` times, fully shuffled, split evenly.

    An even split leaves no small last batch, whose statistics would be noise to batch norm, and drops no image.

    Returns:
        ``steps`` int64 tensors of indices into the images, whose sizes differ by at most one.
    """
    return torch.tensor_split(torch.randperm(images * views, generator=generator) % images, steps)


class MemoryBatches:
    """Of faces in memory, on the device: batching is one gather, and no loader to feed."""

    resumable: ClassVar[bool] = False

    def __init__(self, faces: FaceSet, views: int, steps: int, streams: Streams, processes: Processes) -> None:
        self._faces, self._views, self._steps = faces, views, steps
        self._streams, self._processes = streams, processes

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        """See :class:`Batches`."""
        generator, images = self._streams.generator(f"training/order/{epoch}"), self._faces.images
        for step, batch in enumerate(epoch_order(len(images), self._views, self._steps, generator)):
            chosen = batch[self._processes.rank :: self._processes.size]
            yield step, chosen, images[chosen.to(images.device)], len(batch)

    def reached(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def resume(self, reached: Mapping[str, Any]) -> None:
        """Refuse.

        Raises:
            DataError: always.
        """
        raise DataError("faces in memory are trained on by whole epochs, the checkpoint was left within one")


class StreamBatches:
    """Of faces on disk, read ahead by threads."""

    resumable: ClassVar[bool] = True

    def __init__(
        self,
        faces: RecordSource,
        views: int,
        batch_size: int,
        streams: Streams,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._device, self._processes = device, processes
        self._order = EpochOrder(
            images=len(faces),
            batch_size=batch_size,
            seed=streams.seed_for("training/order"),
            views=views,
            rank=processes.rank,
            size=processes.size,
        )
        self._loader = StreamLoader(faces, self._order, workers=workers(), pin_memory=device.type == "cuda")

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, Tensor, int]]:
        """See :class:`Batches`.

        Raises:
            DataError: what cannot be read; an image that cannot be decoded, where several processes share a batch.
        """
        loader = self._loader
        if loader.epoch != epoch:
            loader.epoch, loader.position = epoch, 0
        for step, read in enumerate(loader, loader.position):
            if read.skipped and self._processes.size > 1:
                bad = read.skipped[0]
                raise DataError(f"{bad.where}: {bad.reason}; several processes cannot skip images (on_error=refuse)")
            total = self._order.batch_total(step) - len(read.skipped)
            yield step, read.rows, read.images.to(self._device, non_blocking=True), total

    def reached(self) -> dict[str, Any]:
        """See :class:`Batches`."""
        return self._loader.state_dict()

    def resume(self, reached: Mapping[str, Any]) -> None:
        """See :class:`Batches`."""
        self._loader.load_state_dict(reached)
