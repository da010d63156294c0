"""A machine that does not share files, locks or code with the one that started a sweep is not trusted with a cell."""

import dataclasses
from pathlib import Path

import pytest
from filelock import FileLock

from bench.sweep.journal import LOCK
from bench.sweep.place import Place


@pytest.fixture
def place(tmp_path):
    return Place.here(tmp_path)


def test_whoever_is_kept_out_by_the_lock_is_trusted(place):
    with FileLock(place.journal / LOCK):
        assert place.problem() is None
        assert "runs other code" in dataclasses.replace(place, code=("another",)).problem()


def test_locks_that_keep_nobody_out(place):
    (place.journal / LOCK).touch()  # nobody holds it: as if locks did not reach from one machine to another
    assert "not kept out by the lock" in place.problem()


def test_files_that_are_not_there(place, tmp_path):
    assert "does not see" in place.problem()
    assert "has no folder" in dataclasses.replace(place, folder=tmp_path / "no").problem()


def test_entering(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Place.here(Path("runs"))
    assert place.journal == tmp_path / "runs"
    monkeypatch.chdir("/")
    place.enter()
    assert Path.cwd() == tmp_path
