"""Files appear whole or not at all."""

import hashlib
import json

import pytest

from bench.files import keep, kept, new_folder, replacing, sha256, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_failure_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "made") as scratch:
        (scratch / "file").touch()
        assert not (tmp_path / "made").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]

    def fail():
        with new_folder(tmp_path / "other") as scratch:
            (scratch / "file").touch()
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1000)
    assert sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_what_is_kept_is_had_back_whole_or_not_at_all(tmp_path):
    path, content = tmp_path / "kept.json", {"seconds": 0.1, "names": ["ä", None], "deep": {"a": [1, float("inf")]}}
    assert kept(path) is None
    assert keep(path, content | {"place": tmp_path}) == kept(path) == content | {"place": str(tmp_path)}
    whole = json.loads(path.read_text())
    for damaged in (
        whole | {"content": content | {"seconds": 0.2}},
        whole | {"sha256": 5},
        whole["content"],
        [whole],
        {"content": {}},
    ):
        path.write_text(json.dumps(damaged))
        assert kept(path) is None
    for text in ("", "cut sh", "[" * 10**5, '{"content": 1' + "0" * 5000):
        path.write_text(text)
        assert kept(path) is None
