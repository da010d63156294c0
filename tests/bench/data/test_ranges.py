from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data.ranges import GAP, read_ranges
from bench.errors import DataError, MissingError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    contents = [np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i, size in enumerate((100_000, 77))]
    for i, content in enumerate(contents):
        (root / f"{i}.bin").write_bytes(content.tobytes())
    return [root / f"{i}.bin" for i in range(2)], contents


@given(data=st.data())
def test_the_same_bytes_as_slicing(files, data):
    paths, contents = files
    stretches = []
    for _ in range(data.draw(st.integers(0, 12))):
        file = data.draw(st.integers(0, 1))
        begin = data.draw(st.integers(0, len(contents[file])))
        stretches.append((file, begin, data.draw(st.integers(0, min(40_000, len(contents[file]) - begin)))))
    columns = np.array(stretches, dtype=np.int64).reshape(-1, 3).T
    buffer, at = read_ranges(paths, *columns, spare=5)
    for (file, begin, size), place in zip(stretches, at.tolist(), strict=True):
        assert np.array_equal(buffer[place : place + size], contents[file][begin : begin + size])
    assert not buffer[len(buffer) - 5 :].any()


def test_neighbours_are_read_at_once_and_far_ones_are_not(files, monkeypatch):
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, b, at: calls.append(at) or real(d, b, at))
    offsets = np.array([5000, 0, 10, 5000 + 100 + GAP + 1])
    read_ranges(files[0], np.zeros(4, dtype=np.int64), offsets, np.full(4, 100))
    assert calls == [0, 5000 + 100 + GAP + 1]


def test_a_file_that_ends_too_early(files):
    with pytest.raises(DataError, match=r"1\.bin is truncated: it has 77 bytes, .* from offset 50 to 80"):
        read_ranges(files[0], np.array([1]), np.array([50]), np.array([30]))


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(MissingError, match=r"gone\.bin is no longer there"):
        read_ranges([tmp_path / "gone.bin"], np.array([0]), np.array([0]), np.array([1]))
