from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.stream.sampler import EpochOrder
from bench.errors import UsageError

orders = st.builds(
    EpochOrder,
    images=st.integers(6, 500),
    batch_size=st.integers(4, 60),
    seed=st.integers(0, 3),
    views=st.integers(1, 3),
    block=st.integers(1, 20),
    blocks=st.integers(1, 9),
)


@given(order=orders, epoch=st.integers(0, 3))
def test_every_image_comes_views_times_in_even_batches(order, epoch):
    batches = list(order.batches(epoch))
    assert len(batches) == order.steps
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [order.batch_total(step) for step in range(order.steps)]
    assert np.bincount(np.concatenate(batches), minlength=order.images).tolist() == [order.views] * order.images


@given(order=orders, epoch=st.integers(0, 1), data=st.data())
def test_an_epoch_can_be_entered_anywhere(order, epoch, data):
    start = data.draw(st.integers(0, order.steps))
    whole = list(order.batches(epoch))[start:]
    entered = list(order.batches(epoch, start))
    assert len(whole) == len(entered)
    assert all(np.array_equal(a, b) for a, b in zip(whole, entered, strict=True))


@given(size=st.integers(1, 4), seed=st.integers(0, 3))
def test_processes_share_each_batch_of_one(size, seed):
    order = EpochOrder(images=203, batch_size=20, seed=seed, block=4, blocks=5)
    each = [replace(order, rank=rank, size=size).batches(1) for rank in range(size)]
    for batch, *parts in zip(order.batches(1), *each, strict=True):
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_epochs_and_seeds_differ_and_repeat():
    def first(seed, epoch):
        return next(EpochOrder(images=5000, batch_size=100, seed=seed).batches(epoch)).tolist()

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1)
    assert first(0, 0) != first(1, 0)


def test_reads_stay_near_each_other_and_people_mix():
    """60,000 images of 1,500 people in the order of the file, as packs are."""
    order = EpochOrder(images=60_000, batch_size=100, seed=0, block=32, blocks=64)
    people, stretches = [], []
    for start in range(0, order.steps, 20):  # about a window's worth of batches
        rows = [row for _, row in zip(range(20), order.batches(0, start), strict=False)]
        people.append(np.mean([len(np.unique(row // 40)) for row in rows]))
        stretches.append(len(np.unique(np.concatenate(rows) // 32)))
    # A full shuffle shows about 97 people in a batch of 100, and touches all 1,875 stretches of 32 images.
    assert min(people) > 50
    assert max(stretches) <= 2 * 64 + 4


def test_the_last_window_is_as_large_as_the_others():
    # 65 blocks in windows of 64: one window, not one of a single block whose neighbours would be one person's.
    order = EpochOrder(images=65 * 10, batch_size=10, seed=0, block=10, blocks=64)
    *_, last = order.batches(0)
    assert len(np.unique(last // 10)) > 4


def test_a_set_within_one_window_is_shuffled_fully():
    order = EpochOrder(images=1000, batch_size=1000, seed=0)
    (rows,) = order.batches(0)
    neighbours = np.mean(np.abs(np.diff(rows)) == 1)
    assert neighbours < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "images must be at least 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"rank": 2, "size": 2}, r"rank must be in 0\.\.1"),
        ({"batch_size": 3, "size": 4}, "4 processes cannot share batches of 3"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        EpochOrder(**{"images": 30, "batch_size": 10, "seed": 0, **changes})
