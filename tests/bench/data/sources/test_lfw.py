from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from open_source import load_set

from bench.data.decode import decode_image
from bench.data.sources import lfw
from bench.data.sources.lfw import Remote, default_root, unpack
from bench.errors import DataError, MissingError

DEV_TEST = b"2\nAnn_A\t1\t2\nAnn_A\t1\t3\nAnn_A\t2\tBob_B\t1\nBob_B\t2\tAnn_A\t3\n"
PEOPLE = {"Ann_A": 3, "Bob_B": 2, "Cy_C": 3, "Dee_D": 1}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path, make_tree, monkeypatch) -> Iterator[Path]:
    """A server on the loopback with a small LFW; the module believes it to be the published mirror."""
    served = tmp_path / "served"
    served.mkdir()
    tree = make_tree(PEOPLE, "lfw_funneled", size=250)
    with tarfile.open(served / "funneled", "w:gz") as tar:
        tar.add(tree, "lfw_funneled")
    (served / "pairs").write_bytes(DEV_TEST)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    archive = Remote("lfw-funneled.tgz", f"{base}/funneled", sha256(served / "funneled"))
    monkeypatch.setitem(lfw.ARCHIVES, "funneled", archive)
    monkeypatch.setattr(lfw, "PAIRS", Remote("pairsDevTest.txt", f"{base}/pairs", sha256(served / "pairs")))
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_unpack_and_load(mirror, tmp_path):
    root = tmp_path / "new" / "root"
    source = load_set("lfw", root, 64)
    assert source.name == "lfw"
    assert source.faces.names == ("Cy_C", "Dee_D")
    assert source.victims.names == ("Ann_A", "Bob_B")
    assert source.pairs.same.tolist() == [True, True, False, False]
    assert source.pairs.fold.tolist() == [0, 1, 0, 1]
    photo = (tmp_path / "lfw_funneled/Cy_C/Cy_C_0001.jpg").read_bytes()
    assert torch.equal(source.faces.images[0], decode_image(photo, 64, crop=144 / 250))
    # The second time nothing is fetched.
    for file in mirror.iterdir():
        file.unlink()
    again = load_set("lfw", root, 64, download=False)
    assert torch.equal(again.faces.images, source.faces.images)


def test_crop_is_in_pixels_of_the_photo(mirror, tmp_path):
    photo = (tmp_path / "lfw_funneled/Cy_C/Cy_C_0001.jpg").read_bytes()
    source = load_set("lfw", tmp_path, 100, crop=100)
    whole = decode_image(photo)
    assert torch.equal(source.faces.images[0], whole[:, 75:175, 75:175])


def test_archive_put_there_by_hand(mirror, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (mirror / "funneled").rename(root / "lfw-funneled.tgz")
    (mirror / "pairs").rename(root / "pairsDevTest.txt")
    assert len(load_set("lfw", root, 32, download=False).faces) == 4


def test_cache_folder_is_the_default_and_can_be_moved(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    load_set("lfw", None, 32)
    assert (tmp_path / "cache/ppfr-bench/lfw/lfw_funneled/Cy_C/Cy_C_0001.jpg").is_file()
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "lfw"


def test_offline_or_not_on_the_server_says_what_to_put_where(mirror, tmp_path, monkeypatch):
    root = tmp_path / "root"
    with pytest.raises(MissingError, match=r"pairsDevTest\.txt is not there: download http.* and save it as .*root"):
        load_set("lfw", root, 32, download=False)
    (mirror / "pairs").unlink()
    with pytest.raises(MissingError, match="cannot be downloaded"):
        load_set("lfw", root, 32)
    monkeypatch.setattr(lfw, "PAIRS", Remote("pairsDevTest.txt", "http://127.0.0.1:9/pairs", "0" * 64))
    with pytest.raises(MissingError, match=r"cannot be downloaded.*download http://127\.0\.0\.1:9/pairs and save"):
        load_set("lfw", root, 32)


def test_wrong_content(mirror, tmp_path):
    (mirror / "pairs").write_bytes(DEV_TEST + b"\n")
    with pytest.raises(DataError, match=r"wrong SHA-256"):
        load_set("lfw", tmp_path / "root", 32)
    assert not (tmp_path / "root/pairsDevTest.txt").exists()
    (tmp_path / "root/pairsDevTest.txt").write_text("changed")
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected .*: delete it"):
        load_set("lfw", tmp_path / "root", 32)


def archive_with(tmp_path: Path, *members: tarfile.TarInfo) -> Path:
    path = tmp_path / "evil.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside"),
        member("lfw/link", tarfile.SYMTYPE, "/etc"),
        member("lfw/link", tarfile.SYMTYPE, "../../.."),
        member("lfw/hard", tarfile.LNKTYPE, "../../outside"),
        member("lfw/device", tarfile.CHRTYPE),
    ],
    ids=lambda m: f"{m.name}>{m.linkname}",
)
def test_unsafe_archives_are_refused_whole(tmp_path, evil):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    with pytest.raises(DataError, match="is refused"):
        unpack(archive_with(tmp_path, member("lfw/good.jpg"), evil), root)
    assert list(root.iterdir()) == []
    assert not (tmp_path / "a" / "outside").exists()


def test_damaged_archive(tmp_path):
    path = archive_with(tmp_path, member("lfw/good.jpg"))
    path.write_bytes(path.read_bytes()[:-30])
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(path, root)
    assert list(root.iterdir()) == []


def test_published_hashes_are_scikit_learns():
    installed = importlib.util.find_spec("sklearn")
    if installed is None or not installed.submodule_search_locations:
        pytest.skip("scikit-learn is not installed")
    # Read, not imported: the import takes seconds.
    source = (Path(installed.submodule_search_locations[0]) / "datasets" / "_lfw.py").read_text(encoding="utf-8")
    calls = [
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RemoteFileMetadata"
    ]
    published = {(call["filename"], call["url"], call["checksum"]) for call in calls}
    assert {(r.name, r.url, r.sha256) for r in (*lfw.ARCHIVES.values(), lfw.PAIRS)} <= published
