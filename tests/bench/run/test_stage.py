"""The stage cache: what is finished is reused, what is killed is resumed, what changed is made anew."""

import json
import logging
import sys
import threading

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench.files import sha256
from bench.progress import ProgressBars
from bench.run import stage as cache_module
from bench.run.stage import LISTING, Job, StageCache, StageRunner, code_version, make_key


def make(cache, key="k", content="x"):
    with cache.entry("stage", key) as entry:
        if not entry.complete:
            (entry.partial / "file").write_text(content)
    return entry


def killed(cache):
    with cache.entry("stage", "k") as entry:
        (entry.partial / "epoch").write_text("3")
        raise KeyboardInterrupt


def test_second_use_finds_the_first(tmp_path):
    cache = StageCache(tmp_path)
    assert not make(cache).complete
    again = make(cache, content="y")
    assert again.complete
    assert (again.path / "file").read_text() == "x"
    assert cache.holds("stage", "k")
    assert not cache.holds("stage", "other")


def test_what_another_machine_finished_meanwhile_is_not_taken_away(tmp_path):
    cache = StageCache(tmp_path)
    with cache.entry("stage", "k") as entry:
        (entry.partial / "file").write_text("ours")
        theirs = entry.path / "file"
        theirs.parent.mkdir()
        theirs.write_text("theirs")
    assert theirs.read_text() == "theirs"
    assert not entry.partial.exists()
    assert make(cache).complete


def test_a_killed_stage_keeps_its_partial_work_and_is_not_complete(tmp_path):
    cache = StageCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        killed(cache)
    assert not cache.holds("stage", "k")
    with StageCache(tmp_path).entry("stage", "k") as entry:
        assert not entry.complete
        assert (entry.partial / "epoch").read_text() == "3"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["file", LISTING])
@pytest.mark.parametrize("harm", [cut, zeroed, lambda path: path.unlink()], ids=["cut", "zeroed", "lost"])
def test_a_finished_stage_that_is_not_what_was_written_is_made_anew(tmp_path, caplog, name, harm):
    path = make(StageCache(tmp_path), content="whole").path
    harm(path / name)
    with caplog.at_level(logging.WARNING):
        entry = make(StageCache(tmp_path), content="again")
    lost_listing = name == LISTING and harm not in (cut, zeroed)  # older versions wrote none
    assert entry.complete is lost_listing
    assert (path / "file").read_text() == ("whole" if lost_listing else "again")
    assert [str(path) in record.message for record in caplog.records] == [True] * (not lost_listing)
    assert make(StageCache(tmp_path)).complete


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("part.safetensors", None, True),
        ("part.safetensors", b"\0" * 64, False),
        ("state.json", b'{"a": 1', False),
        ("state.json", b'{"a": 1}', True),
        ("fit.ckpt", b"PK\x03\x04 and no more", False),
        ("queries", b"", False),
        ("state.json", 100_000 * b"[", False),
        (".part.safetensors.x1.beside.safetensors", b"half", True),
    ],
)
def test_what_a_killed_stage_left_is_used_where_it_can_be_read(tmp_path, caplog, name, content, kept):
    with pytest.raises(KeyboardInterrupt):
        killed(StageCache(tmp_path))
    file = tmp_path / "stage-k.partial" / name
    save_file({"a": torch.ones(9)}, file) if content is None else file.write_bytes(content)
    with StageCache(tmp_path).entry("stage", "k") as entry:
        assert (entry.partial / "epoch").exists() is kept
    assert bool(caplog.records) is not kept
    assert not list(tmp_path.rglob(".*"))
    assert not [file for file in json.loads((entry.path / LISTING).read_text()) if file.startswith(".")]


def test_the_name_of_no_file_in_the_listing(tmp_path):
    path = make(StageCache(tmp_path)).path
    (tmp_path / "other").write_text("x")
    for name in ("../other", 300 * "a", "nul\0"):
        (path / LISTING).write_text(json.dumps({name: sha256(tmp_path / "other")}))
        assert not make(StageCache(tmp_path)).complete


def test_a_stage_that_was_half_removed_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    """Killed while it removes a stage that is to be made anew: without its listing, the rest would look complete."""
    path = make(StageCache(tmp_path), content="old").path
    (path / "file").write_text("altered")

    def killed_within(folder, **_):
        if folder.is_dir():
            (folder / LISTING).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.shutil, "rmtree", killed_within)
        with pytest.raises(KeyboardInterrupt):
            make(StageCache(tmp_path))
    entry = make(StageCache(tmp_path), content="new")
    assert not entry.complete
    assert (path / "file").read_text() == "new"
    assert make(StageCache(tmp_path)).complete


def test_no_resume_starts_anew_but_reuses_its_own(tmp_path):
    make(StageCache(tmp_path), content="old")
    fresh = StageCache(tmp_path, resume=False)
    assert not fresh.holds("stage", "k")
    entry = make(fresh, content="new")
    assert (entry.path / "file").read_text() == "new"
    assert make(fresh, content="newer").complete


def test_no_resume_forgets_partial_work(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        killed(StageCache(tmp_path))
    with StageCache(tmp_path, resume=False).entry("stage", "k") as entry:
        assert list(entry.partial.iterdir()) == []


def test_key_depends_on_inputs_and_code(monkeypatch):
    one = make_key({"a": 1, "b": [1, 2]}, ("bench.errors",))
    assert one == make_key({"b": [1, 2], "a": 1}, ("bench.errors",))
    assert one != make_key({"a": 2, "b": [1, 2]}, ("bench.errors",))
    assert one != make_key({"a": 1, "b": [1, 2]}, ("bench.registry",))
    monkeypatch.setattr(cache_module, "code_version", lambda module: "changed")
    assert one != make_key({"a": 1, "b": [1, 2]}, ("bench.errors",))


def test_code_version_sees_every_file_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("a = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        before = code_version("some_package")
        code_version.cache_clear()
        assert code_version("some_package") == before
        (package / "part.py").write_text("a = 2")
        code_version.cache_clear()
        assert code_version("some_package") != before
        assert code_version("some_package.part") != code_version("some_package")
    finally:
        sys.modules.pop("some_package", None)
        code_version.cache_clear()


def test_code_version_of_nothing():
    with pytest.raises(ModuleNotFoundError):
        code_version("no_such_module_here")


def test_a_stage_that_another_is_at_waits_while_others_are_made(tmp_path):
    cache, order = StageCache(tmp_path), []
    started, ended = threading.Event(), threading.Event()

    def elsewhere():
        with StageCache(tmp_path).entry("first", "k") as entry:
            started.set()
            assert ended.wait(60)
            (entry.partial / "file").write_text("theirs")

    def job(name):
        def make(folder, report):
            order.append(name)
            (folder / "file").write_text("ours")
            if name == "third":
                ended.set()

        return Job(name, "k", name, make, lambda folder: (folder / "file").read_text())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert started.wait(60)
    runner = StageRunner(cache, ProgressBars(Console(quiet=True), lambda *_, **__: None), lambda *_, **__: None)
    runner.beside = {(name, "k"): job(name) for name in ("first", "second", "third", "fourth")}
    assert not cache.wanting("first", "k")
    assert cache.wanting("second", "k")
    assert runner.do(runner.beside["first", "k"]) == "theirs"
    thread.join()
    assert order[:2] == ["second", "third"]  # the fourth, where the other has not quite ended yet
    assert not cache.wanting("second", "k")
    assert "first" not in runner.cached
    assert runner.do(job("fourth")) == "ours"
