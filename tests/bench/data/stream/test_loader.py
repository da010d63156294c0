from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.data.base import Skipped
from bench.data.encoded import Batch
from bench.data.stream.loader import StreamLoader
from bench.data.stream.sampler import EpochOrder
from bench.errors import BenchError, DataError, UsageError


class Numbers:
    """A source whose images show their row; some rows misbehave."""

    image_size = 8
    identities = 7
    path = "numbers"

    def __init__(self, images=103, *, damaged=(), skipped=(), deadly=None):
        self.labels = np.arange(images, dtype=np.int32) % 7
        self.damaged, self.skipped, self.deadly = damaged, skipped, deadly

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        if self.deadly in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        if bad := set(self.damaged) & set(rows.tolist()):
            raise DataError(f"row {min(bad)} is damaged")
        left = rows[~np.isin(rows, self.skipped)]
        images = torch.from_numpy(left).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
        out = tuple(Skipped(f"row {row}", "blank") for row in np.setdiff1d(rows, left))
        return Batch(images, torch.from_numpy(self.labels[left].astype(np.int64)), torch.from_numpy(left), out)


ORDER = EpochOrder(images=103, batch_size=10, seed=0, block=4, blocks=5)
WAYS = [{"workers": 0}, {"workers": 3}, {"workers": 2, "kind": "processes"}]
each_way = pytest.mark.parametrize("way", WAYS, ids=["inline", "threads", "processes"])


def rows(batches):
    return [batch.rows.tolist() for batch in batches]


@each_way
def test_every_way_of_reading_gives_the_order(way):
    loader = StreamLoader(Numbers(), ORDER, **way)
    for epoch in range(2):
        batches = list(loader)
        assert rows(batches) == [batch.tolist() for batch in ORDER.batches(epoch)]
        for batch in batches:
            assert batch.images[:, 0, 0, 0].tolist() == batch.rows.tolist()
            assert batch.labels.tolist() == (batch.rows % 7).tolist()
            assert batch.images.dtype == torch.uint8
    assert (loader.epoch, loader.position) == (2, 0)


@each_way
@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 13])
def test_resumes_after_what_was_consumed_not_what_was_read(way, consumed):
    loader = StreamLoader(Numbers(), ORDER, **way)
    for _ in range(consumed // len(loader)):
        list(loader)
    stream = iter(loader)
    for _ in range(consumed % len(loader)):
        next(stream)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = rows(stream) if consumed % len(loader) else rows(loader)
    again = StreamLoader(Numbers(), ORDER, workers=1)  # other workers, same batches
    again.load_state_dict(state)
    assert rows(again) == rest
    assert again.epoch == loader.epoch


def test_one_process_goes_on_where_two_stopped():
    shared = StreamLoader(Numbers(), replace(ORDER, rank=1, size=2))
    stream = iter(shared)
    next(stream), next(stream)
    alone = StreamLoader(Numbers(), ORDER)
    alone.load_state_dict(shared.state_dict())
    assert rows(alone)[0] == list(ORDER.batches(0))[2].tolist()


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 20}, {"block": 8}])
def test_another_reading_is_not_resumed(other):
    state = StreamLoader(Numbers(), replace(ORDER, **other)).state_dict()
    with pytest.raises(DataError, match="reading to resume is of"):
        StreamLoader(Numbers(), ORDER).load_state_dict(state)


def test_an_impossible_position_is_refused():
    loader = StreamLoader(Numbers(), ORDER)
    with pytest.raises(DataError, match="no batch 10 of epoch 0"):
        loader.load_state_dict({**loader.state_dict(), "position": 10})


@each_way
def test_what_is_damaged_is_one_clear_line_wherever_it_was_read(way):
    loader = StreamLoader(Numbers(damaged=[int(list(ORDER.batches(0))[4][0])]), ORDER, **way)
    seen = []
    with pytest.raises(DataError, match=r"^row \d+ is damaged$"):
        seen.extend(loader)
    assert len(seen) == loader.position == 4  # what lies before it arrives, read ahead or not


@each_way
def test_what_is_skipped_is_counted_and_warned_of_once(way):
    loader = StreamLoader(Numbers(skipped=[5, 77]), ORDER, **way)
    with pytest.warns(UserWarning, match=r"2 images were skipped, the first of them row (5|77): blank"):
        assert sum(len(batch.labels) for batch in loader) == 101
    assert loader.skipped == {"row 5": "blank", "row 77": "blank"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        list(loader)


def test_a_batch_of_nothing_is_refused():
    loader = StreamLoader(Numbers(skipped=list(range(103))), ORDER)
    with pytest.raises(DataError, match="nor can the rest of its batch"):
        next(iter(loader))


def test_a_lost_process_is_reported():
    victim = int(list(ORDER.batches(0))[1][0])
    loader = StreamLoader(Numbers(deadly=victim), ORDER, workers=2, kind="processes")
    with pytest.raises(BenchError, match="a process that reads numbers was lost"):
        list(loader)


def test_stopping_early_leaves_nothing_behind():
    loader = StreamLoader(Numbers(), ORDER, workers=2)
    stream = iter(loader)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bench-stream")]


def test_reads_a_bounded_number_of_batches_ahead():
    class Counting(Numbers):
        reads = 0

        def read(self, rows):
            self.reads += 1
            return super().read(rows)

    source = Counting(1000)
    loader = StreamLoader(source, EpochOrder(images=1000, batch_size=10, seed=0), workers=1)
    stream = iter(loader)
    next(stream)
    stream.close()
    assert source.reads <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be 0 or more"),
        ({"kind": "fibres"}, "threads or processes"),
        ({"order": EpochOrder(images=4, batch_size=2, seed=0)}, "the order is of 4 images, numbers has 103"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        StreamLoader(Numbers(), **{"order": ORDER, **options})
